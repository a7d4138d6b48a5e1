"""A public function of one image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FeatureMap(ABC):
    """A public function of one image; its fields are the options, and part of the cache's key."""

    @abstractmethod
    def version(self) -> str:
        """Return what names the map, its constants and the code that computes it."""

    @abstractmethod
    def output_shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the features of an image (H, W, C).

        Raises:
            InputError: images that it cannot take.
        """

    @abstractmethod
    def compute(self, images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        """Yield the features (n, *shape) of images (N, H, W, C), batch by batch, in order.

        Those of an image must not depend on the others. Cut N as it comes into batches of a multiple of 32:
        kernels round differently for a few images, and a node that computes its part is to have the bits that
        the whole data set has.
        """
