"""Fixed public maps from images to features."""

from __future__ import annotations

from fedsim.data.feature_maps.base import FeatureMap
from fedsim.registry import Registry

__all__ = ["FEATURES", "FeatureMap"]

FEATURES: Registry[FeatureMap] = Registry("data.features", "fedsim.data.feature_maps", FeatureMap)
