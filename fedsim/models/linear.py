"""Models on flattened inputs: multinomial logistic regression and a small multilayer perceptron."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedsim import validate
from fedsim.models.initialise import initialise

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


@dataclass(frozen=True)
class LinearOptions:
    """zero_init: start from zero weights and bias, so that the first loss is log(classes) exactly."""

    zero_init: bool = True


class Linear(nn.Module):
    """One linear layer on the flattened input: the head trained on features in Mehta et al. 2022."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: LinearOptions) -> None:
        super().__init__()
        self.zero_init = options.zero_init
        self.head = nn.Linear(math.prod(input_shape), outputs)

    def reset(self, generator: torch.Generator) -> None:
        """Zero the head, or initialise it like any linear layer when `zero_init` is off."""
        if self.zero_init:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        else:
            initialise(self.head, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, *input_shape) to logits (n, classes)."""
        return self.head(inputs.flatten(1))


@dataclass(frozen=True)
class MlpOptions:
    """hidden: widths of the hidden layers, possibly none. activation: relu, tanh or gelu."""

    hidden: list[int] = field(default_factory=lambda: [32])
    activation: str = "relu"


class Mlp(nn.Module):
    """Fully connected network on the flattened input."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: MlpOptions) -> None:
        super().__init__()
        validate.one_of(options.activation, ACTIVATIONS, "model.options.activation")
        layers: list[nn.Module] = []
        width = math.prod(input_shape)
        for size in options.hidden:
            validate.positive(size, "model.options.hidden")
            layers += [nn.Linear(width, size), ACTIVATIONS[options.activation]()]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, *input_shape) to logits (n, classes)."""
        return self.layers(inputs.flatten(1))
