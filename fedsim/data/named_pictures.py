"""Small pictures with names, to put into scenes: shapes drawn here, or files that were fetched."""

from __future__ import annotations

import csv
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.validate import InputError

EDGE = 64
PIXELS, NAMES = "pictures.npy", "pictures.csv"
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (250, 210, 40),
    "green": (50, 160, 70),
    "blue": (40, 90, 200),
    "purple": (130, 60, 170),
    "pink": (245, 140, 180),
    "brown": (120, 75, 40),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
_FINE = 4  # points of a pixel's edge that are looked at, for smooth edges


@dataclass(frozen=True, eq=False)
class NamedPictures:
    """NamedPictures with names.

    Attributes:
        pixels: (n, EDGE, EDGE, 4) uint8, red, green, blue and how much of what lies behind is covered.
        names: n, in lower case.
        categories: n.
    """

    pixels: NDArray[np.uint8]
    names: tuple[str, ...]
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def among(self, chosen: NDArray[np.bool_]) -> NamedPictures:
        """Return those that are chosen, (n,)."""
        rows = np.flatnonzero(chosen)
        pick = tuple(rows.tolist())
        return NamedPictures(
            self.pixels[rows],
            tuple(self.names[row] for row in pick),
            tuple(self.categories[row] for row in pick),
        )

    def digest(self) -> str:
        """Return a digest of all of it."""
        found = hashlib.sha256("\n".join([*self.names, *self.categories]).encode())
        found.update(np.ascontiguousarray(self.pixels).data)
        return found.hexdigest()


def read(folder: Path) -> NamedPictures:
    """Return the pictures in a folder: pictures.npy, and pictures.csv with the columns name and category.

    Raises:
        InputError: files that are missing, damaged, or do not fit together.
    """
    try:
        pixels = np.load(folder / PIXELS, mmap_mode="r", allow_pickle=False)
        with open(folder / NAMES, encoding="utf-8", newline="") as handle:
            rows = [(row["name"], row["category"]) for row in csv.DictReader(handle)]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} must hold {PIXELS} and {NAMES} with names and categories: {error}. Run python -m "
            "fedsim.data.fetch emoji, or use data.options.pictures=shapes."
        ) from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(rows), EDGE, EDGE, 4) or not rows:
        raise InputError(
            f"{folder / PIXELS} must be uint8 of shape ({len(rows)}, {EDGE}, {EDGE}, 4), a picture for every "
            f"row of {NAMES}, got {pixels.dtype} of shape {pixels.shape}."
        )
    return NamedPictures(pixels, tuple(name.lower() for name, _ in rows), tuple(kind for _, kind in rows))


@functools.cache
def shapes() -> NamedPictures:
    """Return every shape in every colour, such as "red circle"; its category is the shape."""
    fine = EDGE * _FINE
    axis = (np.arange(fine) + 0.5) / fine * 2.0 - 1.0
    across, down = np.meshgrid(axis, axis)
    pixels, names, kinds = [], [], []
    for shape, inside in _inside(across, down).items():
        cover = inside.reshape(EDGE, _FINE, EDGE, _FINE).mean((1, 3))
        for colour, rgb in COLOURS.items():
            picture = np.empty((EDGE, EDGE, 4), np.uint8)
            picture[..., :3] = rgb
            picture[..., 3] = np.rint(255 * cover)
            pixels.append(picture)
            names.append(f"{colour} {shape}")
            kinds.append(shape)
    return NamedPictures(np.stack(pixels), tuple(names), tuple(kinds))


def _inside(x: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
    """Return which points of [-1, 1]^2 each shape has; y points down."""
    r, wide, high = np.hypot(x, y), np.abs(x), np.abs(y)
    angle = np.arctan2(x, -y)
    return {
        "circle": r < 0.9,
        "ring": (r < 0.9) & (r > 0.5),
        "square": np.maximum(wide, high) < 0.8,
        "frame": (np.maximum(wide, high) < 0.85) & (np.maximum(wide, high) > 0.5),
        "triangle": (y < 0.8) & (wide < 0.5 * (y + 0.9)),
        "diamond": wide + high < 0.95,
        "cross": ((wide < 0.28) & (high < 0.9)) | ((high < 0.28) & (wide < 0.9)),
        "bar": (wide < 0.9) & (high < 0.3),
        "column": (wide < 0.3) & (high < 0.9),
        "moon": (r < 0.9) & (np.hypot(x - 0.45, y) > 0.75),
        "flower": r < 0.6 + 0.3 * np.cos(5 * angle),
        "half circle": (r < 0.95) & (y > -0.05),
    }
