"""Scattering coefficients, whitened, and random features of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.data import random_features
from fedsim.data.feature_maps import FEATURES
from fedsim.data.feature_maps.base import FeatureMap


@FEATURES.register("scattering_random")
@dataclass(frozen=True)
class ScatteringRandom(FeatureMap):
    """Scattering coefficients whitened by public images, with random features of them."""

    def version(self) -> str:
        """See `FeatureMap.version`."""
        return random_features.version()

    def output_shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """See `FeatureMap.output_shape`."""
        return random_features.output_shape(image)

    def compute(self, images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        """See `FeatureMap.compute`."""
        return random_features.compute(images)
