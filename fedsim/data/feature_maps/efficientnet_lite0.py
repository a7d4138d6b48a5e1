"""Features of a network that public images taught."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.data import backbone
from fedsim.data.feature_maps import FEATURES
from fedsim.data.feature_maps.base import FeatureMap


@FEATURES.register("efficientnet_lite0")
@dataclass(frozen=True)
class EfficientNetLite0(FeatureMap):
    """Last-layer features of EfficientNet-Lite0 on ImageNet, whitened by public images."""

    def version(self) -> str:
        """See `FeatureMap.version`."""
        return backbone.version()

    def output_shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """See `FeatureMap.output_shape`."""
        return backbone.output_shape(image)

    def compute(self, images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        """See `FeatureMap.compute`."""
        return backbone.compute(images)
