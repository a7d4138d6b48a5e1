"""No clipping: nothing that a configuration can choose, but what a run without privacy sums by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.clipping.base import ClipRule, zero_unless_finite


@dataclass(frozen=True)
class NoClip(ClipRule):
    """Take gradients as they are: for non-private training. Non-finite ones still count as zero."""

    @property
    def sensitivity(self) -> float:
        """Infinity: one example can change the sum by any amount."""
        return math.inf

    def coefficients(self, norms: Tensor) -> Tensor:
        """Map norms (n,) to 1; 0 where a norm is not finite."""
        return zero_unless_finite(torch.ones_like(norms), norms)
