"""What a clip rule is.

A rule maps the norm of a gradient to a coefficient; the contribution is coefficient * gradient. A rule with
groups of parameters does so for each group's part of the gradient. `sensitivity` is the only place where the
L2 bound of a sum comes from. All bounds are for adding or removing one example, and hold up to the rounding
of the parameters' dtype (relative 1e-6 in float32).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import validate


@dataclass(frozen=True)
class ClipRule(ABC):
    """What the gradient engines ask of a rule; its fields but `clip_norm` are `privacy.clipping.options`."""

    @property
    @abstractmethod
    def sensitivity(self) -> float:
        """L2 bound on the change of the sum when one example is added or removed."""

    def group_of(self, names: Sequence[str]) -> tuple[int, ...] | None:
        """Return the group, 0 .. G - 1, of each trainable parameter; None where all are clipped together."""
        return None

    @abstractmethod
    def coefficients(self, norms: Tensor) -> Tensor:
        """Map gradient norms to factors of the same shape and dtype.

        Args:
            norms: (n,) of whole gradients; for a rule with groups (n, G) of their parts. Where a norm is not
                finite, all factors of that example are exactly 0.
        """

    def clipped(self, norms: Tensor) -> Tensor:
        """Say of each example, (n,) bool, whether a norm, as for `coefficients`, is above its bound."""
        return norms > self.sensitivity


@dataclass(frozen=True)
class BoundedRule(ClipRule):
    """A rule after which no contribution is longer than `clip_norm`.

    Attributes:
        clip_norm: C, of `privacy.clip_norm`.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        validate.positive(self.clip_norm, "clip_norm")

    @property
    def sensitivity(self) -> float:
        """C."""
        return self.clip_norm


def zero_unless_finite(coefficients: Tensor, norms: Tensor) -> Tensor:
    """Return the coefficients, 0 where the norm (of the same shape) is not finite."""
    return torch.where(torch.isfinite(norms), coefficients, torch.zeros_like(norms))
