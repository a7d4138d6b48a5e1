"""An update rule on flat parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.grads.flat import FlatSpec


@dataclass(frozen=True)
class Update:
    """What a rule is given beside parameters and gradient.

    Attributes:
        rate: learning rate of the step.
        number: updates made, this one included.
        weight_decay: of the configuration.
        layout: which entries of the flat vector are which parameter tensor.
    """

    rate: float
    number: int
    weight_decay: float
    layout: FlatSpec


@dataclass(frozen=True)
class Optimizer(ABC):
    """An update rule; its fields are `optimizer.options`. It works after the noise and costs no privacy."""

    slots: ClassVar[tuple[str, ...]] = ()
    """Names of the vectors (P,) that it keeps between steps, zero at first."""

    @abstractmethod
    def updated(self, params: Tensor, gradient: Tensor, slots: Mapping[str, Tensor], step: Update) -> Tensor:
        """Return the new parameters (P,); `params` stays as it is, the slots are changed in place.

        Args:
            params: (P,) current parameters.
            gradient: (P,) noisy mean gradient.
            slots: what `slots` names, (P,) each.
            step: rate, number, weight decay, layout.
        """


def with_l2(params: Tensor, gradient: Tensor, decay: float) -> Tensor:
    """Return the gradient with that of decay / 2 * |params|^2 added."""
    return gradient + decay * params if decay else gradient
