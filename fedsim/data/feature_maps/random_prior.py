"""Features of a network that has seen images of random processes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.data import random_prior
from fedsim.data.feature_maps import FEATURES
from fedsim.data.feature_maps.base import FeatureMap


@FEATURES.register("random_prior")
@dataclass(frozen=True)
class RandomPrior(FeatureMap):
    """What a small encoder that learned from random images sees in a grey image, no real data behind it.

    Attributes:
        scattering: put random features of scattering coefficients (scattering_random) beside them.
    """

    scattering: bool = True

    def version(self) -> str:
        """See `FeatureMap.version`."""
        return random_prior.version(self.scattering)

    def output_shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """See `FeatureMap.output_shape`; grey images."""
        return random_prior.output_shape(image, self.scattering)

    def compute(self, images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        """See `FeatureMap.compute`."""
        return random_prior.compute(images, self.scattering)
