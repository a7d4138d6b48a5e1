"""Augmentations: keyed by example and view, right pixels, right frequencies (budget: 3 s)."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from fedsim import given, seeds
from fedsim.augmentations.crop import MirrorPadCrop
from fedsim.data.augment import check, views
from fedsim.validate import InputError

PAD = MirrorPadCrop().pad

KEY = seeds.derive(0, "augment", 3)
BOTH = ["mirror_pad_crop", "flip"]
RNG = np.random.default_rng(5)
IMAGES = RNG.integers(0, 256, (40, 12, 10, 3), dtype=np.uint8)
IDS = RNG.choice(10**9, size=40, replace=False)


def places_of(size: int, ids: np.ndarray, k: int, key: bytes = KEY) -> np.ndarray:
    """(B, K, 2) top-left corners of the crops, read off an image whose pixels are their own coordinates."""
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    one = np.stack([rows, columns], axis=-1).astype(np.uint8)
    out = views(np.repeat(one[None], len(ids), axis=0), ids, k, key, ["mirror_pad_crop"])
    return out[:, :, PAD, PAD].astype(int)  # the pixel at (PAD, PAD) came from (down, right)


def test_a_view_depends_on_key_example_and_index_alone() -> None:
    whole = views(IMAGES, IDS, 8, KEY, BOTH)
    assert whole.shape == (40, 8, 12, 10, 3)
    assert whole.dtype == np.uint8
    order = RNG.permutation(40)
    assert np.array_equal(views(IMAGES[order], IDS[order], 8, KEY, BOTH), whole[order])
    for rows in (slice(0, 1), slice(13, 30)):
        assert np.array_equal(views(IMAGES[rows], IDS[rows], 8, KEY, BOTH), whole[rows])
    assert np.array_equal(views(IMAGES, IDS, 3, KEY, BOTH), whole[:, :3])


def test_keys_examples_and_views_differ() -> None:
    same = np.repeat(IMAGES[:1], 40, axis=0)
    out = views(same, IDS, 8, KEY, BOTH)
    other = views(same, IDS, 8, seeds.derive(0, "augment", 4), BOTH)
    # 162 equally likely outcomes: two views agree by chance with probability 1/162.
    assert np.mean(np.all(out == other, axis=(2, 3, 4))) < 0.05
    assert np.mean(np.all(out[:, 0] == out[:, 1], axis=(1, 2, 3))) < 0.2
    assert len({view.tobytes() for view in out.reshape(-1, 12, 10, 3)}) > 100


def test_every_view_is_a_crop_of_the_mirrored_image_or_its_flip() -> None:
    out = views(IMAGES, IDS, 6, KEY, BOTH)
    for image, its_views in zip(IMAGES, out, strict=True):
        rows = np.abs(np.arange(-PAD, 12 + PAD))
        rows = np.where(rows > 11, 22 - rows, rows)
        columns = np.abs(np.arange(-PAD, 10 + PAD))
        columns = np.where(columns > 9, 18 - columns, columns)
        padded = image[rows][:, columns]
        crops = [padded[y : y + 12, x : x + 10] for y in range(2 * PAD + 1) for x in range(2 * PAD + 1)]
        possible = {c.tobytes() for crop in crops for c in (crop, crop[:, ::-1])}
        assert all(view.tobytes() in possible for view in its_views)


def test_crop_places_are_uniform() -> None:
    """Chi-square over the 81 places, 16,000 views; false-alarm rate 1e-6, fixed keys.

    The same test rejects a crop that never moves by the full margin (64 of the 81 places).
    """
    out = places_of(20, np.arange(1_000), 16)
    cells = np.bincount((out[..., 0] * 9 + out[..., 1]).ravel(), minlength=81)
    assert len(cells) == 81
    assert stats.chisquare(cells).pvalue > 1e-6
    cut = np.minimum(out, 7)
    wrong = np.bincount((cut[..., 0] * 9 + cut[..., 1]).ravel(), minlength=81)
    assert stats.chisquare(wrong).pvalue < 1e-6


def test_flips_are_fair_and_independent_of_crops_and_of_other_views() -> None:
    """Binomial tests, 16,000 views, fixed keys; false-alarm rate 1e-6 each. Skipping every third fails."""
    ids = np.arange(1_000)
    image = np.zeros((1_000, 12, 12, 1), np.uint8)
    image[:, :, :6] = 1  # bright left half
    flipped = views(image, ids, 16, KEY, ["flip"])[:, :, 0, 0, 0] == 0

    def fair(hits: np.ndarray) -> bool:
        return bool(stats.binomtest(int(hits.sum()), hits.size).pvalue > 1e-6)

    assert fair(flipped)
    assert fair(flipped[:, :-1] ^ flipped[:, 1:])
    assert fair(flipped[:-1] ^ flipped[1:])
    assert not fair(flipped & (np.arange(16) % 3 > 0))
    # Second in the list, the flip reads another word: it must not follow the crop's.
    both = views(image, ids, 16, KEY, BOTH)
    flipped_second = both[:, :, 0, -1, 0] > both[:, :, 0, 0, 0]
    low = places_of(20, ids, 16)[..., 0] % 2 == 0
    table = np.array(
        [
            [np.sum(flipped_second & low), np.sum(flipped_second & ~low)],
            [np.sum(~flipped_second & low), np.sum(~flipped_second & ~low)],
        ]
    )
    assert stats.chi2_contingency(table).pvalue > 1e-6
    assert fair(flipped_second ^ flipped)


def test_no_augmentation_copies() -> None:
    assert np.array_equal(views(IMAGES, IDS, 3, KEY, []), np.stack([IMAGES] * 3, axis=1))
    one = views(IMAGES, IDS, 1, KEY, [])
    assert one.shape == (40, 1, 12, 10, 3)
    assert np.shares_memory(one, IMAGES)
    features = RNG.normal(size=(40, 7)).astype(np.float32)
    assert np.array_equal(views(features, IDS, 2, KEY, [])[:, 1], features)


def test_inputs_are_not_changed() -> None:
    before = IMAGES.copy()
    frozen = IMAGES.view()
    frozen.flags.writeable = False
    for names in (["flip"], ["flip", "mirror_pad_crop"], BOTH, []):
        out = views(frozen, IDS, 2, KEY, names)
        assert out.shape == (40, 2, 12, 10, 3)
    assert np.array_equal(before, IMAGES)


def test_empty_batch() -> None:
    for names in ([], BOTH):
        assert views(IMAGES[:0], IDS[:0], 4, KEY, names).shape == (0, 4, 12, 10, 3)


def test_one_function_adds_an_augmentation() -> None:
    def invert(images: np.ndarray, words: np.ndarray) -> np.ndarray:
        chosen = (words & np.uint64(1)).astype(bool)[:, :, None, None, None]
        return np.where(chosen, 255 - images, images)

    out = views(IMAGES, IDS, 5, KEY, [given.hold("augmentation", "0", invert)])
    inverted = np.all(out == 255 - IMAGES[:, None], axis=(2, 3, 4))
    assert np.all(inverted | np.all(out == IMAGES[:, None], axis=(2, 3, 4)))
    assert 0.3 < inverted.mean() < 0.7


def test_what_cannot_be_augmented_is_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'flip'"):
        views(IMAGES, IDS, 1, KEY, ["flp"])
    with pytest.raises(InputError, match="must be empty for data that is not uint8 images"):
        views(np.zeros((2, 7), np.float32), np.array([0, 1]), 1, KEY, ["flip"])
    with pytest.raises(InputError, match=r"at least 5 x 5 pixels.*got 4 x 9"):
        check(["mirror_pad_crop"], np.zeros((4, 9, 1), np.uint8))
    with pytest.raises(InputError, match="at most 16"):
        check(["flip"] * 17, IMAGES[0])
    with pytest.raises(InputError, match="ids must be 40"):
        views(IMAGES, IDS[:3], 1, KEY, [])
    with pytest.raises(InputError, match="0 or above"):
        views(IMAGES, IDS - 10**9, 1, KEY, [])
    with pytest.raises(InputError, match="augment_multiplicity must be between 1"):
        views(IMAGES, IDS, 0, KEY, [])


def test_fast_enough_for_a_training_step() -> None:
    """1,024 CIFAR-sized images with 16 views: about 0.1 s on one core; per-view code would take over 1 s."""
    images = RNG.integers(0, 256, (1_024, 32, 32, 3), dtype=np.uint8)
    seconds = []
    for _ in range(4):
        start = time.process_time()
        views(images, np.arange(1_024), 16, KEY, BOTH)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.3
