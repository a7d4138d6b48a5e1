"""Heads on scattering features (81 C, height, width), after Tramer and Boneh 2021.

Channels are first normalised in groups within one example: no statistics of other examples, hence no
privacy cost, unlike the standardisation by private batch statistics that the same paper offers. The norm has
no trainable part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import validate
from fedsim.models.linear import ACTIVATIONS, Linear, LinearOptions
from fedsim.validate import InputError

GROUPS = 27  # the paper's choice for Fashion-MNIST: three channels of 81 a group


@dataclass(frozen=True)
class ScatterLinearOptions(LinearOptions):
    """groups: of channels normalised together; 0 takes the features as they are. See `LinearOptions`."""

    groups: int = GROUPS


class ScatterLinear(Linear):
    """Group-normalised features and one linear layer; 39,700 parameters on (81, 7, 7) and 10 classes."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: ScatterLinearOptions) -> None:
        super().__init__(input_shape, outputs, options)
        self.norm = FeatureNorm(input_shape, options.groups, "scatter_linear")

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, channels, height, width) to logits (n, classes)."""
        return super().forward(self.norm(inputs))


@dataclass(frozen=True)
class ScatterCnnOptions:
    """Options of `ScatterCnn`; the defaults are the paper's network for Fashion-MNIST.

    Attributes:
        groups: groups of channels normalised together; 0 takes the features as they are.
        channels: outputs of each 3x3 convolution.
        strides: of each convolution, as many as `channels`.
        hidden: width of the linear layer before the last; 0 for none.
        activation: tanh, relu or gelu.
    """

    groups: int = GROUPS
    channels: list[int] = field(default_factory=lambda: [16, 32])
    strides: list[int] = field(default_factory=lambda: [2, 1])
    hidden: int = 32
    activation: str = "tanh"


class ScatterCnn(nn.Module):
    """Group-normalised features, two 3x3 convolutions, two linear layers; 33,066 parameters on (81, 7, 7)."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: ScatterCnnOptions) -> None:
        super().__init__()
        validate.one_of(options.activation, ACTIVATIONS, "model.options.activation")
        validate.in_range(options.hidden, 0, 2**20, "model.options.hidden")
        if len(options.channels) != len(options.strides) or not options.channels:
            raise InputError(
                "model.options.channels and strides must name one number a convolution, at least one, got "
                f"{options.channels} and {options.strides}. Use scatter_linear for none."
            )
        activation = ACTIVATIONS[options.activation]
        self.norm = FeatureNorm(input_shape, options.groups, "scatter_cnn")
        channels, height, width = input_shape
        layers: list[nn.Module] = []
        for out, stride in zip(options.channels, options.strides, strict=True):
            validate.positive(out, "model.options.channels")
            validate.positive(stride, "model.options.strides")
            layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1), activation()]
            channels, height, width = out, -(-height // stride), -(-width // stride)
        self.features = nn.Sequential(*layers)
        size = channels * height * width
        hidden = [nn.Linear(size, options.hidden), activation()] if options.hidden else []
        self.head = nn.Sequential(*hidden, nn.Linear(options.hidden or size, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, channels, height, width) to logits (n, classes)."""
        return self.head(self.features(self.norm(inputs)).flatten(1))


class FeatureNorm(nn.Module):
    """Zero mean and unit variance in each group of an example's channels, without gain and bias.

    Args:
        input_shape: (channels, height, width) of the features.
        groups: must divide channels; 0 turns the norm off.
        model: name for the error message.

    Raises:
        InputError: features of another shape, or groups that do not divide the channels.
    """

    def __init__(self, input_shape: tuple[int, ...], groups: int, model: str) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise InputError(
                f"model {model} must get features (channels, height, width), got {tuple(input_shape)}. "
                "Set data.features=scattering, or use model.name=linear for this data set."
            )
        validate.in_range(groups, 0, input_shape[0], "model.options.groups")
        if groups and input_shape[0] % groups:
            raise InputError(
                f"model.options.groups must divide the {input_shape[0]} channels, got {groups}. "
                "Set data.features=scattering, for whose 81 channels 27 groups fit, or other groups."
            )
        self.groups = groups

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, channels, height, width) to the same shape."""
        return F.group_norm(inputs, self.groups) if self.groups else inputs
