"""Image folders whose images have different sizes, or owners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsim.config import DataConfig
from fedsim.data.datasets import load
from fedsim.data.examples import Splits
from fedsim.validate import InputError

RNG = np.random.default_rng(5)


def written(root: Path, train: dict[str, np.ndarray]) -> Path:
    """A folder with these training images and one test image a class, that of the class's first."""
    for name, pixels in train.items():
        for path in (root / "train" / f"{name}.png", root / "test" / f"{name}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def opened(root: Path, **options: Any) -> Splits:
    return load(DataConfig("image_folder", options, str(root)))


def noise(high: int, wide: int) -> np.ndarray:
    return RNG.integers(0, 256, (high, wide, 3), dtype=np.uint8)


def halved(pixels: np.ndarray) -> np.ndarray:
    """Bilinear with antialiasing to half the size, written out: weights 1, 3, 3, 1 over eighths; at a border
    the pixel that lies outside is left out and the others make up for it."""

    def along(values: np.ndarray) -> np.ndarray:
        out = []
        for place in range(len(values) // 2):
            near = [(2 * place + k - 1, weight) for k, weight in enumerate((1, 3, 3, 1))]
            near = [(i, weight) for i, weight in near if 0 <= i < len(values)]
            out.append(sum(values[i] * w for i, w in near) / sum(w for _, w in near))
        return np.array(out)

    return along(along(pixels.astype(float)).swapaxes(0, 1)).swapaxes(0, 1)


def test_the_middle_of_the_longer_edge_is_kept(tmp_path: Path) -> None:
    """Of 4 x 9 the columns 2 to 5, of 9 x 4 those rows; 4 x 4 as it is: nothing is scaled."""
    wide, tall, square = noise(4, 9), noise(9, 4), noise(4, 4)
    held = opened(written(tmp_path, {"a/0": wide, "a/1": tall, "b/2": square}), size=4).train
    assert held.inputs.shape == (3, 4, 4, 3)
    assert np.array_equal(held.inputs[0], wide[:, 2:6])
    assert np.array_equal(held.inputs[1], tall[2:6])
    assert np.array_equal(held.inputs[2], square)
    assert held.targets.tolist() == [0, 0, 1]
    assert held.declared.names == ("a", "b")


def test_images_are_scaled_before_the_middle_is_cut_out(tmp_path: Path) -> None:
    pixels = noise(8, 12)
    held = opened(written(tmp_path, {"a/0": pixels}), size=4).train
    np.testing.assert_allclose(held.inputs[0], halved(pixels)[:, 1:5], atol=1.01)
    flat = opened(written(tmp_path / "flat", {"a/0": np.full((7, 31, 3), 99, np.uint8)}), size=5).train
    assert np.array_equal(flat.inputs[0], np.full((5, 5, 3), 99))


def test_squeezed_images_lose_nothing(tmp_path: Path) -> None:
    pixels = noise(8, 8)
    held = opened(written(tmp_path, {"a/0": pixels}), size=4, fit="squeeze").train
    np.testing.assert_allclose(held.inputs[0], halved(pixels), atol=1.01)
    edges = np.zeros((4, 16, 3), np.uint8)
    edges[:, :4], edges[:, -4:] = 200, 100
    narrow = opened(written(tmp_path / "edges", {"a/0": edges}), size=4, fit="squeeze").train.inputs[0]
    assert narrow[0, 0, 0] > 150
    assert 70 < narrow[0, -1, 0] < 130
    cropped = opened(tmp_path / "edges", size=4).train.inputs[0]
    assert not cropped.any()


def test_sizes_are_refused_where_none_is_said(tmp_path: Path) -> None:
    root = written(tmp_path, {"a/0": noise(4, 9), "a/1": noise(9, 4)})
    with pytest.raises(InputError, match=r"9 x 4 pixels like the first one.*Set data.options.size"):
        opened(root)
    for options, message in (
        ({"size": 0}, "data.options.size must be"),
        ({"size": 4, "fit": "cropp"}, "Did you mean 'crop'"),
        ({"fit": "squeeze"}, "nothing reads it"),
    ):
        with pytest.raises(InputError, match=message):
            opened(root, **options)


def test_folders_below_a_class_own_its_images(tmp_path: Path) -> None:
    names = ["a/zoe/0", "a/ann/0", "b/zoe/0", "b/ben/deep/0"]
    root = written(tmp_path, {name: noise(4, 4) for name in names})
    held = opened(root, owners=True).train
    assert held.groups is not None
    assert held.targets.tolist() == [0, 0, 1, 1]
    assert held.groups.tolist() == [0, 2, 1, 2], "ann, zoe, ben, zoe in the order of the files"
    assert opened(root).train.groups is None
    Image.fromarray(noise(4, 4)).save(root / "train" / "a" / "stray.png")
    with pytest.raises(InputError, match=r"must lie at CLASS/OWNER/FILE, got .*stray.png"):
        opened(root, owners=True, classes=2)
