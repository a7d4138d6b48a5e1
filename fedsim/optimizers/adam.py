"""Rules by running moments of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim import validate
from fedsim.optimizers import OPTIMIZERS
from fedsim.optimizers.base import Optimizer, Update, with_l2


@OPTIMIZERS.register("adam")
@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015); weight decay is added to the mean gradient.

    Attributes:
        beta1, beta2: shares of the first and second moment that are kept.
        epsilon: added to the root of the second.
    """

    slots: ClassVar[tuple[str, ...]] = ("first", "second")
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        validate.in_range(self.beta1, 0.0, 1.0 - 1e-12, "optimizer.options.beta1")
        validate.in_range(self.beta2, 0.0, 1.0 - 1e-12, "optimizer.options.beta2")
        validate.positive(self.epsilon, "optimizer.options.epsilon")

    def updated(self, params: Tensor, gradient: Tensor, slots: Mapping[str, Tensor], step: Update) -> Tensor:
        """See `Optimizer.updated`."""
        direction = self._direction(with_l2(params, gradient, step.weight_decay), slots, step.number)
        return params - step.rate * direction

    def _direction(self, gradient: Tensor, slots: Mapping[str, Tensor], number: int) -> Tensor:
        first = slots["first"].mul_(self.beta1).add_(gradient, alpha=1.0 - self.beta1)
        second = slots["second"].mul_(self.beta2).addcmul_(gradient, gradient, value=1.0 - self.beta2)
        mean = first / (1.0 - self.beta1**number)
        scale = (second / (1.0 - self.beta2**number)).sqrt()
        return mean / (scale + self.epsilon)


@OPTIMIZERS.register("adamw")
@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    def updated(self, params: Tensor, gradient: Tensor, slots: Mapping[str, Tensor], step: Update) -> Tensor:
        """See `Optimizer.updated`."""
        kept = params * (1.0 - step.rate * step.weight_decay)
        return kept - step.rate * self._direction(gradient, slots, step.number)


@OPTIMIZERS.register("lamb")
@dataclass(frozen=True)
class Lamb(Adam):
    """LAMB (You et al. 2020, algorithm 2, phi the identity); weight decay is part of the rescaled update.

    Each parameter tensor is a layer whose update is rescaled to the norm of its weights, by 1 where either
    norm is 0.
    """

    def updated(self, params: Tensor, gradient: Tensor, slots: Mapping[str, Tensor], step: Update) -> Tensor:
        """See `Optimizer.updated`."""
        update = self._direction(gradient, slots, step.number) + step.weight_decay * params
        for weights, part in zip(step.layout.split(params), step.layout.split(update), strict=True):
            size, length = weights.norm(), part.norm()
            ratio = torch.where((size > 0) & (length > 0), size / length, torch.ones_like(size))
            part.mul_(ratio)
        return params - step.rate * update
