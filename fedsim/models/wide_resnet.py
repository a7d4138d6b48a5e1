"""Wide residual network with GroupNorm and weight standardisation, as trained with DP by De et al. 2022."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedsim import validate
from fedsim.models.cnn import image_shape
from fedsim.models.initialise import fan_in_truncated_normal_
from fedsim.models.layers import CONVOLUTIONS, NORMALISATIONS, Convolution, WSConv2d, normalisation
from fedsim.models.linear import ACTIVATIONS
from fedsim.rules import read_with
from fedsim.validate import InputError

__all__ = ["WSConv2d", "WideResNet", "WideResNetOptions"]


@dataclass(frozen=True)
class WideResNetOptions:
    """Options of `WideResNet`.

    Attributes:
        depth: 6 n + 4, with n blocks in each of the three stages.
        width: multiplier k of the stage widths 16 k, 32 k, 64 k.
        groups: groups of every GroupNorm; must divide 16. 1 makes it a layer norm.
        convolution: "weight_standardised", or "plain" for an ordinary convolution with bias.
        normalisation: "group", or "none" for a network without norms.
        activation: relu (the paper), tanh or gelu.
    """

    depth: int = 16
    width: int = 4
    groups: int = field(default=16, metadata=read_with(normalisation=("group",)))
    convolution: str = "weight_standardised"
    normalisation: str = "group"
    activation: str = "relu"


class _Block(nn.Module):
    """Two times activation, norm, 3x3 convolution, added to the input or, when `first`, to its projection."""

    def __init__(
        self, conv: Convolution, channels: int, out: int, stride: int, options: WideResNetOptions, first: bool
    ) -> None:
        super().__init__()
        kind, groups = options.normalisation, options.groups
        self.activation = ACTIVATIONS[options.activation]()
        self.norm1 = normalisation(kind, groups, channels)
        self.conv1 = conv(channels, out, 3, stride, 1)
        self.norm2 = normalisation(kind, groups, out)
        self.conv2 = conv(out, out, 3, 1, 1)
        self.skip_norm = normalisation(kind, groups, channels) if first else None
        self.skip_conv = conv(channels, out, 1, stride, 0) if first else None

    def forward(self, inputs: Tensor) -> Tensor:
        active = self.activation(inputs)
        skip = inputs
        if self.skip_norm is not None and self.skip_conv is not None:
            skip = self.skip_conv(self.skip_norm(active))
        hidden = self.conv1(self.norm1(active))
        return skip + self.conv2(self.norm2(self.activation(hidden)))


class WideResNet(nn.Module):
    """WRN-depth-width of Zagoruyko and Komodakis 2016 in the form De et al. 2022 (arXiv 2204.13650) trained.

    First convolution of 16 channels; three stages, the second and third halving the image; ReLU before each
    GroupNorm; a projection with its own norm in the first block of each stage; ReLU, GroupNorm, global
    average pooling, linear head. 2.75 million parameters for depth 16, width 4, 10 classes. Weights start
    from a truncated normal of variance 1 / fan in, biases at 0, gains at 1. One difference from the JAX
    original: strided 3x3 convolutions pad one pixel on both sides, so their windows sit one pixel earlier.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: WideResNetOptions) -> None:
        super().__init__()
        validate.one_of(options.convolution, CONVOLUTIONS, "model.options.convolution")
        validate.one_of(options.normalisation, NORMALISATIONS, "model.options.normalisation")
        validate.one_of(options.activation, ACTIVATIONS, "model.options.activation")
        validate.one_of(options.groups, (1, 2, 4, 8, 16), "model.options.groups")
        validate.positive(options.width, "model.options.width")
        blocks, rest = divmod(options.depth - 4, 6)
        if blocks < 1 or rest:
            raise InputError(
                f"model.options.depth must be 6 n + 4 with n >= 1 blocks a stage, got {options.depth}. "
                "Use 10, 16, 22, 28 or 40."
            )
        channels, _, _ = image_shape(input_shape, "wide_resnet", smallest=4)
        conv = CONVOLUTIONS[options.convolution]
        self.first = conv(channels, 16, 3, 1, 1)
        stages: list[nn.Module] = []
        channels = 16
        for stage, stride in enumerate((1, 2, 2)):
            out = 16 * options.width * 2**stage
            for index in range(blocks):
                first = index == 0
                stages.append(_Block(conv, channels, out, stride if first else 1, options, first))
                channels = out
        self.blocks = nn.Sequential(*stages)
        self.activation = ACTIVATIONS[options.activation]()
        self.norm = normalisation(options.normalisation, options.groups, channels)
        self.head = nn.Linear(channels, outputs)

    def reset(self, generator: torch.Generator) -> None:
        """Truncated normal weights, zero biases, unit gains and norms."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                fan_in_truncated_normal_(parameter, generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, channels, height, width) to logits (n, classes)."""
        hidden = self.norm(self.activation(self.blocks(self.first(inputs))))
        return self.head(hidden.mean((2, 3)))
