"""Whole gradients scaled to nearly one length."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim import validate
from fedsim.clipping import CLIPPING
from fedsim.clipping.base import BoundedRule, zero_unless_finite


@CLIPPING.register("normalised")
@dataclass(frozen=True)
class NormalisedClip(BoundedRule):
    """Scale every gradient to nearly `clip_norm` (Bu et al. 2022, "Automatic clipping", AUTO-S).

    Coefficient C / (norm + gamma); every contribution has norm C * norm / (norm + gamma), below C.

    Attributes:
        gamma: keeps short gradients short.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.positive(self.gamma, "privacy.clipping.options.gamma")

    def coefficients(self, norms: Tensor) -> Tensor:
        """Map norms (n,) to C / (norm + gamma); 0 where a norm is not finite."""
        return zero_unless_finite(self.clip_norm / (norms + self.gamma), norms)
