"""Scattering features: the map, its precision, the cache, and a run on cached features (budget: 15 s)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedsim.config import DataConfig
from fedsim.data import datasets, features, scattering
from fedsim.data.cache import folder
from fedsim.engine.experiment import prepare
from fedsim.merging import Choice
from fedsim.validate import InputError
from tests.conftest import child_that, end_of, final, small, train

RNG = np.random.default_rng(11)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    datasets._load.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def real_images() -> NDArray[np.uint8]:
    return np.array(datasets.load(DataConfig(test_examples=60)).test.inputs)


def computed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.concatenate(list(scattering.compute(images)))


def image_arrays(root: Path, channels: int = 1, train_rows: int = 40) -> Path:
    root.mkdir()
    for split, rows in (("train", train_rows), ("test", 12)):
        labels = np.arange(rows) % 4
        images = RNG.integers(0, 60, (rows, 12, 12, channels)) + 60 * labels[:, None, None, None]
        np.save(root / f"{split}_inputs.npy", images.astype(np.uint8))
        np.save(root / f"{split}_targets.npy", labels)
    return root


# --- the map


def test_shapes_of_grey_colour_and_odd_images(real_images: NDArray[np.uint8]) -> None:
    assert computed(real_images[:3]).shape == (3, 81, 7, 7) == (3, *scattering.output_shape((28, 28, 1)))
    for shape in ((2, 32, 32, 3), (1, 13, 18, 1), (1, 4, 4, 1)):
        images = RNG.integers(0, 256, shape).astype(np.uint8)
        assert computed(images).shape == (shape[0], *scattering.output_shape(shape[1:]))
    with pytest.raises(InputError, match="at least 4 x 4"):
        scattering.output_shape((3, 28, 1))


def test_colour_channels_are_mapped_one_by_one() -> None:
    images = RNG.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    whole = computed(images)
    for channel in range(3):
        alone = computed(images[..., channel : channel + 1])
        np.testing.assert_allclose(whole[:, 81 * channel : 81 * (channel + 1)], alone, rtol=1e-6, atol=1e-8)


def test_the_first_channel_is_the_local_average_and_flat_images_have_no_wavelet_energy() -> None:
    flat = np.full((1, 28, 28, 1), 51, dtype=np.uint8)
    values = computed(flat)[0]
    np.testing.assert_allclose(values[0], 0.2, rtol=1e-3)
    assert np.abs(values[1:]).max() < 2e-3
    stripes = np.zeros((1, 28, 28, 1), dtype=np.uint8)
    stripes[:, :, ::2] = 102
    assert np.abs(computed(stripes)[0, 1:]).max() > 0.02


def test_features_do_not_depend_on_the_batch(real_images: NDArray[np.uint8]) -> None:
    together = computed(np.concatenate([real_images] * 5))  # 300 images: two batches
    np.testing.assert_array_equal(together[240:], computed(real_images))


def test_float16_costs_no_precision_that_matters(real_images: NDArray[np.uint8]) -> None:
    """Relative error of an image's features as stored, and after the norm that enlarges small ones."""
    exact = torch.tensor(computed(real_images), dtype=torch.float64)
    stored = torch.tensor(features.of_images(Choice("scattering"), real_images), dtype=torch.float64)

    def worst(values: torch.Tensor) -> tuple[float, float]:
        pairs = ((values, exact), (torch.group_norm(values, 27), torch.group_norm(exact, 27)))
        errors = [((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).max() for a, b in pairs]
        return float(errors[0]), float(errors[1])

    plain, normed = worst(stored)
    assert plain < 3e-4
    assert normed < 5e-4
    rough = worst(exact.to(torch.bfloat16).double())  # three bits less: the same bounds reject it
    assert rough[0] > 3e-4
    assert rough[1] > 5e-4


# --- the cache


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the images that are really computed."""
    seen: list[int] = []

    real = scattering.compute

    def compute(images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        seen.append(len(images))
        yield from real(images)

    monkeypatch.setattr(scattering, "compute", compute)
    return seen


def test_cached_features_are_read_not_computed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counting(monkeypatch)
    images = RNG.integers(0, 256, (7, 12, 12, 1)).astype(np.uint8)
    first = features.of_images(Choice("scattering"), images)
    second = features.of_images(Choice("scattering"), images)
    assert seen == [32]  # filled up to whole blocks
    assert isinstance(second, np.memmap)
    assert not second.flags.writeable
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.float16
    changed = images.copy()
    changed[3, 0, 0] ^= 1
    features.of_images(Choice("scattering"), changed)
    assert seen == [32, 32]
    assert len(list(cache.glob("*.npy"))) == 2
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_features_that_float16_cannot_hold_are_refused(
    value: float, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = RNG.integers(0, 256, (3, 12, 12, 1)).astype(np.uint8)
    real = scattering.compute

    def compute(given: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        for batch in real(given):
            batch[0].flat[-1] = value
            yield batch

    monkeypatch.setattr(scattering, "compute", compute)
    with pytest.raises(InputError, match="every feature must be within float16"):
        features.of_images(Choice("scattering"), images)
    monkeypatch.setattr(scattering, "compute", real)
    assert np.isfinite(features.of_images(Choice("scattering"), images)).all()


def test_another_version_of_the_map_is_another_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = RNG.integers(0, 256, (3, 12, 12, 1)).astype(np.uint8)
    features.of_images(Choice("scattering"), images)
    monkeypatch.setattr(scattering, "version", lambda: "newer")
    features.of_images(Choice("scattering"), images)
    assert len(list(cache.glob("*.npy"))) == 2


def test_a_damaged_file_is_named(cache: Path) -> None:
    images = RNG.integers(0, 256, (3, 12, 12, 1)).astype(np.uint8)
    features.of_images(Choice("scattering"), images)
    (path,) = cache.glob("*.npy")
    path.write_bytes(b"no array")
    with pytest.raises(InputError, match=r"damaged.*Delete it"):
        features.of_images(Choice("scattering"), images)
    np.save(path, np.zeros((3, 2), np.float16))
    with pytest.raises(InputError, match=r"must hold float16 of shape \(3, 81, 3, 3\)"):
        features.of_images(Choice("scattering"), images)


def test_the_folder_must_be_absolute_and_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((1, 8, 8, 1), np.uint8)
    monkeypatch.setenv("FEDSIM_CACHE", "cache")
    with pytest.raises(InputError, match="absolute"):
        features.of_images(Choice("scattering"), images)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="writable"):
        features.of_images(Choice("scattering"), images)
    monkeypatch.delenv("FEDSIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "fedsim"


def test_processes_that_ask_at_once_compute_once(tmp_path: Path) -> None:
    """Two processes, one cache: one of them says that it computes, both read the same features."""
    images = (np.arange(200 * 64) % 251).astype(np.uint8).reshape(200, 8, 8, 1)
    began = time.monotonic() + 0.3

    def ask(answer: Path) -> None:
        handler = logging.FileHandler(answer)
        logging.getLogger("fedsim").addHandler(handler)
        logging.getLogger("fedsim").setLevel(logging.INFO)
        time.sleep(max(0.0, began - time.monotonic()))
        found = features.of_images(Choice("scattering"), images)
        logging.getLogger("fedsim").info("%r", float(found.astype(np.float64).sum()))

    places = [tmp_path / "one", tmp_path / "other"]
    children = [child_that(lambda place=place: ask(place)) for place in places]  # type: ignore[misc]
    assert [end_of(child) for child in children] == [0, 0]
    answers = [place.read_text().split() for place in places]
    assert sum("computing" in answer for answer in answers) == 1
    assert len({answer[-1] for answer in answers}) == 1


# --- as a data set


def test_a_feature_data_set_keeps_labels_and_cuts_share_one_file(tmp_path: Path, cache: Path) -> None:
    root = image_arrays(tmp_path / "data")
    plain = datasets.load(DataConfig("arrays", {"classes": 4}, str(root)))
    mapped = datasets.load(DataConfig("arrays", {"classes": 4}, str(root), features=Choice("scattering")))
    assert mapped.train.example_shape == (81, 3, 3)
    assert not mapped.train.is_image
    np.testing.assert_array_equal(mapped.train.targets, plain.train.targets)
    np.testing.assert_allclose(mapped.train.inputs, computed(plain.train.inputs), atol=2e-3)
    cut = datasets.load(
        DataConfig(
            "arrays",
            {"classes": 4},
            str(root),
            train_examples=9,
            holdout_examples=8,
            features=Choice("scattering"),
        )
    )
    whole = datasets.load(
        DataConfig("arrays", {"classes": 4}, str(root), train_examples=9, holdout_examples=8)
    )
    np.testing.assert_allclose(cut.test.inputs, computed(whole.test.inputs), atol=2e-3)
    assert len(list(cache.glob("*.npy"))) == 2  # train and test, whatever the cut


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'scattering'"):
        datasets.load(DataConfig(features=Choice("scatering")))
    root = tmp_path / "floats"
    root.mkdir()
    for split in ("train", "test"):
        np.save(root / f"{split}_inputs.npy", np.zeros((4, 5), np.float32))
        np.save(root / f"{split}_targets.npy", np.zeros(4, np.int64))
    with pytest.raises(InputError, match="must get uint8 images"):
        datasets.load(DataConfig("arrays", {"classes": 4}, str(root), features=Choice("scattering")))
    root = image_arrays(tmp_path / "images")
    config = small(
        "data.name=arrays", f"data.root={root}", "data.options.classes=4", "data.features=scattering",
        "train.augmentations=[flip]",
        "data.train_examples=40", "data.test_examples=12",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"Set train.augmentations=\[\]"):
        prepare(config)


def test_training_on_cached_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run computes features once, and as many nodes as one likes give the same parameters."""
    seen = counting(monkeypatch)
    root = image_arrays(tmp_path / "data", train_rows=60)
    results = []
    for nodes in (1, 3):
        config = small(
            "data.name=arrays", f"data.root={root}", "data.options.classes=4", "data.features=scattering",
            "model.name=linear",
            "data.train_examples=60", "data.test_examples=12", "train.expected_batch_size=30",
            "model.dtype=float64", f"federation.nodes={nodes}", "privacy.noise_multiplier=0.1",
            "optimizer.learning_rate=1.0",
        )  # fmt: skip
        result = train(config, tmp_path / f"run{nodes}")
        results.append(final(tmp_path / f"run{nodes}"))
        assert result["accuracy"] > 0.5  # chance is 0.25
    assert seen == [64, 32]  # 60 and 12, filled up
    assert torch.linalg.vector_norm(results[0] - results[1]) <= 1e-10 * torch.linalg.vector_norm(results[0])
