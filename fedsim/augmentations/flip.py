"""A mirror image by chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.augmentations import AUGMENTATIONS
from fedsim.augmentations.base import Augmentation, Images, Words


@AUGMENTATIONS.register("flip")
@dataclass(frozen=True)
class Flip(Augmentation):
    """Mirror left to right with probability one half."""

    def views(self, images: Images, words: Words) -> Images:
        """See `Augmentation.views`."""
        out = np.empty((*words.shape, *images.shape[2:]), dtype=images.dtype)
        out[:] = images
        chosen = (words & np.uint64(1)).astype(bool)
        out[chosen] = out[chosen][:, :, ::-1]
        return out
