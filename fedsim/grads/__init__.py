"""Clipped sums of per-example gradients: one function, several engines."""

from fedsim.clipping.base import ClipRule
from fedsim.clipping.flat import FlatClip
from fedsim.clipping.none import NoClip
from fedsim.clipping.normalised import NormalisedClip
from fedsim.grads.flat import FlatSpec, get_flat, set_flat, spec, trainable_names
from fedsim.grads.per_example import ENGINES, check_engine, clipped_gradient_sum, cross_entropy

__all__ = [
    "ENGINES",
    "ClipRule",
    "FlatClip",
    "FlatSpec",
    "NoClip",
    "NormalisedClip",
    "check_engine",
    "clipped_gradient_sum",
    "cross_entropy",
    "get_flat",
    "set_flat",
    "spec",
    "trainable_names",
]
