"""Whole gradients scaled down."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.clipping import CLIPPING
from fedsim.clipping.base import BoundedRule, zero_unless_finite


@CLIPPING.register("flat")
@dataclass(frozen=True)
class FlatClip(BoundedRule):
    """Scale gradients longer than `clip_norm` down to it (Abadi et al. 2016, algorithm 1).

    Coefficient min(1, C / (norm + 1e-6)), the convention of Opacus, so that sums agree with it to the last
    digits; every contribution has norm at most C.
    """

    def coefficients(self, norms: Tensor) -> Tensor:
        """Map norms (n,) to min(1, C / (norm + 1e-6)); 0 where a norm is not finite."""
        return zero_unless_finite((self.clip_norm / (norms + 1e-6)).clamp(max=1.0), norms)
