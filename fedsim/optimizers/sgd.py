"""Gradient descent, plain and with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim import validate
from fedsim.optimizers import OPTIMIZERS
from fedsim.optimizers.base import Optimizer, Update, with_l2


@OPTIMIZERS.register("sgd")
@dataclass(frozen=True)
class Sgd(Optimizer):
    """Gradient descent; weight decay is added to the mean gradient."""

    def updated(self, params: Tensor, gradient: Tensor, slots: Mapping[str, Tensor], step: Update) -> Tensor:
        """See `Optimizer.updated`."""
        return params - step.rate * with_l2(params, gradient, step.weight_decay)


@OPTIMIZERS.register("momentum")
@dataclass(frozen=True)
class Momentum(Optimizer):
    """Gradient descent with momentum, in PyTorch's form without dampening; weight decay as in sgd.

    Attributes:
        momentum: share of the velocity that is kept.
    """

    slots: ClassVar[tuple[str, ...]] = ("velocity",)
    momentum: float = 0.9

    def __post_init__(self) -> None:
        validate.in_range(self.momentum, 1e-12, 1.0 - 1e-12, "optimizer.options.momentum")

    def updated(self, params: Tensor, gradient: Tensor, slots: Mapping[str, Tensor], step: Update) -> Tensor:
        """See `Optimizer.updated`."""
        gradient = with_l2(params, gradient, step.weight_decay)
        velocity = slots["velocity"].mul_(self.momentum).add_(gradient)
        return params - step.rate * self._direction(gradient, velocity)

    def _direction(self, gradient: Tensor, velocity: Tensor) -> Tensor:
        return velocity


@OPTIMIZERS.register("nesterov")
@dataclass(frozen=True)
class Nesterov(Momentum):
    """Nesterov's momentum (Sutskever et al. 2013), in PyTorch's form; weight decay as in sgd."""

    def _direction(self, gradient: Tensor, velocity: Tensor) -> Tensor:
        return gradient + self.momentum * velocity
