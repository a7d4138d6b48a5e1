"""A crop at a random place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim import validate
from fedsim.augmentations import AUGMENTATIONS
from fedsim.augmentations.base import Augmentation, Images, Words
from fedsim.validate import InputError


@AUGMENTATIONS.register("mirror_pad_crop")
@dataclass(frozen=True)
class MirrorPadCrop(Augmentation):
    """Mirror pixels at each border (the edge not repeated) and crop the old size at a random place.

    Attributes:
        pad: pixels at each border (4: De et al. 2022).
    """

    pad: int = 4

    def __post_init__(self) -> None:
        validate.in_range(self.pad, 1, 2**15, "pad of mirror_pad_crop")

    def check(self, shape: tuple[int, ...]) -> None:
        """See `Augmentation.check`."""
        if min(shape[:2]) <= self.pad:
            raise InputError(
                f"mirror_pad_crop must have images of at least {self.pad + 1} x {self.pad + 1} pixels to "
                f"mirror {self.pad}, got {shape[0]} x {shape[1]}. Remove it from train.augmentations."
            )

    def views(self, images: Images, words: Words) -> Images:
        """See `Augmentation.views`."""
        height, width = images.shape[2:4]
        border = (self.pad, self.pad)
        padded = np.pad(images, ((0, 0), (0, 0), border, border, (0, 0)), mode="reflect")
        places = np.uint64(2 * self.pad + 1)
        # Two 32-bit halves scaled to 0 .. 2 * self.pad: uneven by at most 9 / 2**32, no rejection needed.
        half = np.uint64(32)
        down = ((words >> half) * places >> half).astype(np.int64)
        right = ((words & np.uint64(2**32 - 1)) * places >> half).astype(np.int64)
        out = np.empty((*words.shape, height, width, images.shape[4]), dtype=images.dtype)
        # One block copy per distinct offset (at most 81) is several times faster than indexing every pixel.
        offset = (down * int(places) + right).ravel()
        order = np.argsort(offset, kind="stable")
        cuts = np.flatnonzero(np.diff(offset[order])) + 1
        for group in np.split(order, cuts):
            rows, columns = np.divmod(group, words.shape[1])
            y, x = divmod(int(offset[group[0]]), int(places))
            source = columns if padded.shape[1] > 1 else np.zeros_like(columns)
            out[rows, columns] = padded[rows, source, y : y + height, x : x + width]
        return out
