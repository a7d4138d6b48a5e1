"""The embedded images with fewer pixels: where a proof does not ask how many parameters there are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fedsim.data import datasets
from fedsim.data.examples import ArrayDataset
from tests.conftest import small

PIXELS = 28


def shrunk(folder: Path, train: int, test: int, pixels: int) -> list[str]:
    """Write images of `pixels` x `pixels`, a divisor of 28, and return the overrides that choose them."""
    splits = datasets.load(small(f"data.train_examples={train}", f"data.test_examples={test}").data)
    arrays = {}
    for name, split in (("train", splits.train), ("test", splits.test)):
        arrays[f"{name}_inputs"] = _pooled(split, pixels)
        arrays[f"{name}_targets"] = split.targets
    np.savez(folder / "images.npz", **arrays)
    chosen = json.dumps({"classes": 10})
    return ["data.name=arrays", f"data.options={chosen}", f"data.root={folder / 'images.npz'}"]


def _pooled(split: ArrayDataset, pixels: int) -> np.ndarray:
    side = PIXELS // pixels
    images = np.asarray(split.inputs).reshape(len(split), pixels, side, pixels, side, 1)
    return images.mean(axis=(2, 4)).astype(np.uint8)
