"""A part of random size and proportions, scaled to the size that models get."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsim.augmentations import AUGMENTATIONS
from fedsim.augmentations.base import Images, Part, Words
from fedsim.validate import InputError

TRIES = 10
_NUMBERS = 4  # of a try
_STEP, _MIX1, _MIX2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@AUGMENTATIONS.register("random_resized_crop")
@dataclass(frozen=True)
class RandomResizedCrop(Part):
    """Scale a part of random area, proportions and place to the size of the images; the first of the list.

    Area and the logarithm of width over height are uniform; up to ten tries to fit such a part into the
    picture, then the largest part in the middle whose proportions are allowed (Szegedy et al. 2015, s. 6, as
    torchvision's RandomResizedCrop has it). Of pictures in files the part is cut out before anything is
    scaled.

    Attributes:
        scale: least and largest share of the picture's area.
        ratio: least and largest width over height of the part.
    """

    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])

    def __post_init__(self) -> None:
        for name, given, most in (("scale", self.scale, 1.0), ("ratio", self.ratio, 1e3)):
            if len(given) != 2 or not 0.0 < given[0] <= given[1] <= most:
                raise InputError(
                    f"{name} of random_resized_crop must be two numbers, 0 < least <= largest <= {most:g}, "
                    f"got {given}."
                )

    def boxes(self, sizes: NDArray[np.int64], words: Words) -> NDArray[np.int64]:
        """See `Part.boxes`."""
        high, wide = (sizes[:, axis, None].astype(np.float64) for axis in (0, 1))
        found = np.broadcast_to(self._middle(sizes)[:, None], (*words.shape, 4)).copy()
        missing = np.ones(words.shape, np.bool_)
        low, top = (math.log(edge) for edge in self.ratio)
        for attempt in range(TRIES):
            share, form, down, right = (
                _uniform(words, _NUMBERS * attempt + number) for number in range(_NUMBERS)
            )
            area = high * wide * (self.scale[0] + (self.scale[1] - self.scale[0]) * share)
            ratio = np.exp(low + (top - low) * form)
            across, along = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
            fits = missing & (across > 0) & (across <= wide) & (along > 0) & (along <= high)
            places = np.floor(down * (high - along + 1)), np.floor(right * (wide - across + 1))
            box = np.stack([*places, along, across], axis=-1).astype(np.int64)
            found[fits] = box[fits]
            missing &= ~fits
            if not missing.any():
                break
        return found

    def _middle(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B, 4): the largest part in the middle whose proportions are allowed."""
        high, wide = sizes[:, 0], sizes[:, 1]
        ratio = wide / high
        along = np.where(ratio < self.ratio[0], np.rint(wide / self.ratio[0]).astype(np.int64), high)
        across = np.where(ratio > self.ratio[1], np.rint(high * self.ratio[1]).astype(np.int64), wide)
        along, across = np.maximum(along, 1), np.maximum(across, 1)  # torchvision fails where one is 0
        return np.stack([(high - along) // 2, (wide - across) // 2, along, across], axis=-1)

    def views(self, images: Images, words: Words) -> Images:
        """See `Augmentation.views`."""
        from PIL import Image

        high, wide, channels = images.shape[2:]
        boxes = self.boxes(np.tile(np.array([high, wide]), (len(images), 1)), words)
        out = np.empty((*words.shape, high, wide, channels), np.uint8)
        for place in np.ndindex(*words.shape):
            top, left, along, across = boxes[place]
            source = images[place[0], place[1] if images.shape[1] > 1 else 0]
            part = source[top : top + along, left : left + across]
            for channel in range(channels):  # of any number: Pillow scales one as it scales three
                plane = Image.fromarray(np.ascontiguousarray(part[..., channel]))
                out[place][..., channel] = plane.resize((wide, high), Image.Resampling.BILINEAR)
        return out


def _uniform(words: Words, number: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) of each word, independent for different `number` (SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = words + _STEP * np.uint64(number + 1)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX1
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX2
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
