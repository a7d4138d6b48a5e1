"""Layers several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fedsim.models.initialise import fan_in_truncated_normal_

SHORTEST = 1e-2  # length a standardised kernel's channel is divided by at least


class Standardised(NamedTuple):
    """A standardised kernel and what it was made from.

    Attributes:
        kernel: (p, ...), the weight's shape.
        centred: weight less the mean of its channel, (p, D).
        length: of `centred`, (p,): sqrt(D * var).
        scale: kernel by `centred`, (p,).
    """

    kernel: Tensor
    centred: Tensor
    length: Tensor
    scale: Tensor


def standardise(weight: Tensor, gain: Tensor) -> Standardised:
    """Standardise `weight` (p, ...) channel by channel; see `standardised`."""
    flat = weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=1)
    scale = gain / length.clamp(min=SHORTEST)
    return Standardised((centred * scale.unsqueeze(1)).view_as(weight), centred, length, scale)


def standardised(weight: Tensor, gain: Tensor) -> Tensor:
    """Return gain * (w - mean) / sqrt(max(fan_in * var, 1e-4)), in the shape of `weight` (p, ...).

    One `gain` (p,) per output channel, population variance: "scaled weight standardisation" (Brock et al.
    2021) with the epsilon of De et al. 2022. A torch function, so that whoever watches those sees it whole.
    """
    if has_torch_function_variadic(weight, gain):
        return handle_torch_function(standardised, (weight, gain), weight, gain)
    return standardise(weight, gain).kernel


class WSConv2d(nn.Conv2d):
    """Convolution with a standardised kernel (Qiao et al. 2019, Brock et al. 2021) and trainable gains.

    The kernel is that of `standardised`.
    """

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__(channels, out, kernel, stride=stride, padding=padding, bias=bias)
        self.gain = nn.Parameter(torch.ones(out))

    def reset(self, generator: torch.Generator) -> None:
        """Truncated normal kernel of variance 1 / fan in, zero bias, unit gain."""
        fan_in_truncated_normal_(self.weight, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        nn.init.ones_(self.gain)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, channels, height, width) to (n, out, ...)."""
        kernel = standardised(self.weight, self.gain)
        return F.conv2d(inputs, kernel, self.bias, self.stride, self.padding)


Convolution = Callable[[int, int, int, int, int], nn.Conv2d]
CONVOLUTIONS: dict[str, Convolution] = {"weight_standardised": WSConv2d, "plain": nn.Conv2d}

NORMALISATIONS = ("group", "none")


def normalisation(name: str, groups: int, channels: int) -> nn.Module:
    """Return the norm over `channels` that `name` (one of NORMALISATIONS) means; one group is a layer norm.

    Statistics are of one example, so they mix no examples and cost no privacy.
    """
    return nn.GroupNorm(groups, channels) if name == "group" else nn.Identity()


STEMS = ("imagenet", "small")
SMALLEST = {"imagenet": 32, "small": 8}  # pixels an edge must have so that three halvings leave something


def stem(name: str, convolution: Convolution, channels: int, out: int) -> nn.Module:
    """Return the first layers of a residual network.

    "imagenet": 7x7 convolution of stride 2, then 3x3 max-pooling of stride 2, for images of 224 pixels;
    "small": 3x3 convolution of stride 1, for images of 32 pixels.
    """
    if name == "small":
        return convolution(channels, out, 3, 1, 1)
    return nn.Sequential(convolution(channels, out, 7, 2, 3), nn.MaxPool2d(3, stride=2, padding=1))
