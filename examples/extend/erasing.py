"""An augmentation: random erasing, a grey rectangle at a random place.

Guarantee: a view is a function of its image and its 64-bit word alone. The word is of the step's key, the
example's id and the view, so views are the same whatever holders, nodes and physical batches there are, and
an example's views tell nothing of other examples. Gradients of an example's views are averaged before
clipping, so views cost no privacy. The grey is a constant: the mean of private images would be a release.
Source: Zhong, Zheng, Kang, Li, Yang 2020, "Random Erasing Data Augmentation"; a rectangle that is longer
than the image is cut off, where they draw again.
"""

import math
from dataclasses import dataclass

import numpy as np

from fedsim import validate
from fedsim.augmentations import Augmentation

BITS = 12  # of the word for each of five choices


@dataclass(frozen=True)
class RandomErasing(Augmentation):
    """Put a grey rectangle over part of a view.

    Attributes:
        chance: of a view to get one.
        smallest, largest: share of the image that it covers.
        aspect: height / width is between this and 1 / this.
        grey: the value of its pixels.
    """

    chance: float = 0.5
    smallest: float = 0.02
    largest: float = 0.4
    aspect: float = 0.3
    grey: int = 128

    def __post_init__(self):
        validate.in_range(self.chance, 0.0, 1.0, "chance of random erasing")
        validate.in_range(self.largest, 0.0, 1.0, "largest of random erasing")
        validate.in_range(self.smallest, 0.0, self.largest, "smallest of random erasing")
        validate.in_range(self.aspect, 1e-3, 1.0, "aspect of random erasing")
        validate.in_range(self.grey, 0, 255, "grey of random erasing")

    def views(self, images, words):
        """Images (B, 1 or K, H, W, C) and words (B, K) to views (B, K, H, W, C)."""
        height, width = images.shape[2:4]
        chosen, size, form, down, right = (
            ((words >> np.uint64(BITS * i)) % np.uint64(2**BITS)) / 2.0**BITS for i in range(5)
        )
        area = height * width * (self.smallest + (self.largest - self.smallest) * size)
        tall_to_wide = np.exp((2.0 * form - 1.0) * math.log(1.0 / self.aspect))
        rows = _span(np.sqrt(area * tall_to_wide), down, height)
        columns = _span(np.sqrt(area / tall_to_wide), right, width)
        covered = rows[..., :, None] & columns[..., None, :] & (chosen < self.chance)[..., None, None]
        return np.where(covered[..., None], np.uint8(self.grey), images)


def _span(length, place, side):
    """Which of 0 .. side - 1 a stretch of that length covers, (B, K, side)."""
    length = np.clip(np.rint(length), 1, side)[..., None]
    start = np.floor(place[..., None] * (side - length + 1))
    at = np.arange(side)
    return (start <= at) & (at < start + length)
