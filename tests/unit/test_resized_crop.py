"""Parts of random size: torchvision's definition, keyed by word, cut out of the picture as it is (budget 5
s)."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from fedsim import seeds
from fedsim.augmentations.resized_crop import TRIES, RandomResizedCrop
from fedsim.data import augment
from fedsim.data.pictures.decode import Encoded
from fedsim.validate import InputError
from tests.pictures import encoded, noise

WORDS = seeds.words(seeds.derive(0, "words"), 0, 1500)
MASK = 2**64 - 1


def uniform(word: int, number: int) -> float:
    """SplitMix64 with Python's own integers."""
    z = (word + 0x9E3779B97F4A7C15 * (number + 1)) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return ((z ^ (z >> 31)) >> 11) / 2.0**53


def by_definition(high: int, wide: int, word: int, scale: Any, ratio: Any) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params of torchvision in its own order, on the numbers of a word."""
    for attempt in range(TRIES):
        share, form, down, right = (uniform(word, 4 * attempt + i) for i in range(4))
        area = high * wide * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * form)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= wide and 0 < h <= high:
            return int(down * (high - h + 1)), int(right * (wide - w + 1)), h, w
    if wide / high < min(ratio):
        w, h = wide, round(wide / min(ratio))
    elif wide / high > max(ratio):
        w, h = round(high * max(ratio)), high
    else:
        w, h = wide, high
    w, h = max(w, 1), max(h, 1)
    return (high - h) // 2, (wide - w) // 2, h, w


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 900),
    st.integers(1, 900),
    st.integers(0, MASK),
    st.sampled_from([((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.2, 0.3)), ((1e-6, 1e-5), (1.0, 1.0))]),
)
def test_boxes_are_those_of_the_definition(high: int, wide: int, word: int, how: Any) -> None:
    scale, ratio = how
    crop = RandomResizedCrop(list(scale), list(ratio))
    found = crop.boxes(np.array([[high, wide]]), np.array([[word]], np.uint64))[0, 0]
    assert tuple(found) == by_definition(high, wide, word, scale, ratio)
    top, left, h, w = found
    assert 0 <= top <= high - h
    assert 0 <= left <= wide - w
    assert min(h, w) >= 1


def test_a_box_is_of_its_own_size_and_word_alone() -> None:
    sizes = np.array([[60, 80], [500, 375], [30, 300]])
    words = WORDS[:12].reshape(3, 4)
    whole = RandomResizedCrop().boxes(sizes, words)
    for row in range(3):
        for view in range(4):
            alone = RandomResizedCrop().boxes(sizes[row : row + 1], words[row : row + 1, view : view + 1])
            assert np.array_equal(alone[0, 0], whole[row, view])


def test_boxes_are_spread_as_torchvisions() -> None:
    """Two-sample tests of area, proportions and place, 1,500 boxes each; false-alarm rate 1e-6 a test.

    The same tests reject a crop whose sides, and not whose area, are uniform.
    """
    from torchvision.transforms import RandomResizedCrop as Theirs

    high, wide = 300, 400
    found = RandomResizedCrop().boxes(np.array([[high, wide]]), WORDS[None])[0]
    with torch.random.fork_rng():
        torch.random.manual_seed(5)
        image = torch.empty(3, high, wide)
        theirs = np.array([Theirs.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(len(WORDS))])

    def measures(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, h, w = boxes.T.astype(float)
        return {"area": h * w, "form": w / h, "down": top / (high - h + 1), "right": left / (wide - w + 1)}

    ours, others = measures(found), measures(theirs)
    for name, values in ours.items():
        assert stats.ks_2samp(values, others[name]).pvalue > 1e-6, name
    side = np.sqrt(0.08) + (1 - np.sqrt(0.08)) * np.random.default_rng(0).random(len(WORDS))
    assert stats.ks_2samp(side**2 * high * wide, others["area"]).pvalue < 1e-6


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_part_is_cut_out_before_it_is_scaled(kind: str) -> None:
    """As torchvision does it: crop, then bilinear with antialiasing. JPEG at its full scale too."""
    pixels = noise(90, 120)
    content = encoded(pixels, kind)
    with Image.open(io.BytesIO(content)) as image:
        whole = np.asarray(image.convert("RGB"))
    found = Encoded(content).cut((10, 20, 50, 60), 32)
    part = Image.fromarray(np.ascontiguousarray(whole[10:60, 20:80]))
    assert np.array_equal(found, np.asarray(part.resize((32, 32), Image.Resampling.BILINEAR)))


def test_what_is_shrunk_much_is_decoded_smaller_and_looks_the_same() -> None:
    """A JPEG at an eighth: nearly the pixels of the full decode, and the scale follows from this view
    alone."""
    pixels = noise(700, 900)
    content = encoded(pixels)
    picture = Encoded(content)
    small = picture.cut((40, 60, 600, 800), 32)
    assert set(picture._decoded) == {8}
    exact = Encoded(encoded(pixels, "PNG")).cut((40, 60, 600, 800), 32)
    assert np.abs(small.astype(int) - exact).mean() < 1.5
    near = picture.cut((0, 0, 100, 100), 32)
    assert set(picture._decoded) == {8, 1}
    assert np.array_equal(picture.cut((40, 60, 600, 800), 32), small)
    assert np.array_equal(Encoded(content).cut((0, 0, 100, 100), 32), near)


def test_parts_of_images_in_arrays_are_scaled_to_their_size() -> None:
    images = np.stack([noise(24, 24, seed) for seed in range(3)])
    ids = np.array([5, 9, 70])
    key = seeds.derive(0, "augment", 1)
    found = augment.views(images, ids, 2, key, ["random_resized_crop"])
    assert found.shape == (3, 2, 24, 24, 3)
    assert np.array_equal(
        augment.views(images[1:], ids[1:], 1, key, ["random_resized_crop"])[:, 0], found[1:, 0]
    )
    words = augment._words(ids, 2, key, 1)[:, :, 0]
    boxes = RandomResizedCrop().boxes(np.full((3, 2), 24), words)
    top, left, h, w = boxes[2, 1]
    part = Image.fromarray(np.ascontiguousarray(images[2][top : top + h, left : left + w]))
    assert np.array_equal(found[2, 1], np.asarray(part.resize((24, 24), Image.Resampling.BILINEAR)))


def test_wrong_options_and_places_are_refused() -> None:
    for wrong in ({"scale": [0.0, 1.0]}, {"scale": [0.5, 1.2]}, {"ratio": [2.0, 1.0]}, {"ratio": [1.0]}):
        with pytest.raises(InputError, match="random_resized_crop must be two numbers"):
            RandomResizedCrop(**wrong)
    with pytest.raises(InputError, match="must start with random_resized_crop"):
        augment.check(["flip", "random_resized_crop"], noise(8, 8))
