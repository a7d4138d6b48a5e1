"""Scattering coefficients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.data import scattering
from fedsim.data.feature_maps import FEATURES
from fedsim.data.feature_maps.base import FeatureMap


@FEATURES.register("scattering")
@dataclass(frozen=True)
class Scattering(FeatureMap):
    """Scattering coefficients of two layers (Oyallon and Mallat 2015), 81 channels an input channel."""

    def version(self) -> str:
        """See `FeatureMap.version`."""
        return scattering.version()

    def output_shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """See `FeatureMap.output_shape`."""
        return scattering.output_shape(image)

    def compute(self, images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        """See `FeatureMap.compute`."""
        return scattering.compute(images)
