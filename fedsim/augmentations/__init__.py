"""Random changes of images, one file each."""

from __future__ import annotations

from fedsim.augmentations.base import Augmentation, Function
from fedsim.registry import Registry

__all__ = ["AUGMENTATIONS", "Augmentation"]

AUGMENTATIONS: Registry[Augmentation] = Registry(
    "train.augmentations", "fedsim.augmentations", Augmentation, function=Function
)
