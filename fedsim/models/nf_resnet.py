"""Residual network without norms (Brock et al. 2021), as trained on ImageNet with DP by De et al. 2022."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import validate
from fedsim.models.cnn import image_shape
from fedsim.models.initialise import fan_in_truncated_normal_
from fedsim.models.layers import SMALLEST, STEMS, WSConv2d, stem

BLOCKS = (3, 4, 6, 3)
GAMMA = math.sqrt(2.0 / (1.0 - 1.0 / math.pi))  # 1.7140: makes ReLU of N(0, 1) have variance 1
HEAD_STD = 0.01


@dataclass(frozen=True)
class NfResNet50Options:
    """Options of `NfResNet50`.

    Attributes:
        stem: "imagenet", or "small" for images of 32 pixels (fedsim.models.layers.stem).
        width: channels of the first stage's 3x3 convolutions; 64 is the published network.
        alpha: what one block adds to the standard deviation of the signal.
    """

    stem: str = "imagenet"
    width: int = 64
    alpha: float = 0.2


class _Block(nn.Module):
    """shortcut + alpha * gain * branch(beta * gamma * relu(x)); the branch is 1x1, 3x3, 1x1 convolutions."""

    def __init__(self, channels: int, out: int, stride: int, beta: float, alpha: float) -> None:
        super().__init__()
        self.beta, self.alpha = beta, alpha
        self.project = WSConv2d(channels, out, 1, stride) if stride > 1 or channels != out else None
        self.reduce = WSConv2d(channels, out // 4, 1)
        self.spatial = WSConv2d(out // 4, out // 4, 3, stride, 1)
        self.expand = WSConv2d(out // 4, out, 1)
        self.skip_gain = nn.Parameter(torch.empty(1))

    def forward(self, inputs: Tensor) -> Tensor:
        active = _activation(inputs) * self.beta
        shortcut = inputs if self.project is None else self.project(active)
        branch = self.spatial(_activation(self.reduce(active)))
        branch = self.expand(_activation(branch)) * self.skip_gain
        return shortcut + self.alpha * branch


def _activation(inputs: Tensor) -> Tensor:
    return F.relu(inputs) * GAMMA


class NfResNet50(nn.Module):
    """NF-ResNet-50 of Brock, De and Smith 2021 (arXiv 2101.08692), without squeeze-excite, dropout and
    stochastic depth: 25,556,984 parameters for (3, 224, 224) and 1,000 classes.

    Pre-activation bottleneck blocks with scaled weight-standardised convolutions. beta divides a block's
    input by its expected standard deviation: 1 at the start, growing by alpha^2 in variance with each block,
    and back to 1 at the projection that starts a stage. Every branch ends in a trainable gain that starts
    at 0 (SkipInit, De and Smith 2020). No layer looks at other examples. Convolutions start from a truncated
    normal of variance 1 / fan in, biases at 0, kernel gains at 1, the head from N(0, 0.01^2).
    Strided windows sit one pixel earlier than in the JAX original, as in `wide_resnet`.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: NfResNet50Options) -> None:
        super().__init__()
        validate.one_of(options.stem, STEMS, "model.options.stem")
        validate.positive(options.width, "model.options.width")
        validate.positive(options.alpha, "model.options.alpha")
        channels, _, _ = image_shape(input_shape, "nf_resnet_50", SMALLEST[options.stem])
        self.stem = stem(options.stem, partial(WSConv2d, bias=False), channels, options.width)
        channels = options.width
        variance = 1.0
        blocks: list[nn.Module] = []
        for stage, (count, stride) in enumerate(zip(BLOCKS, (1, 2, 2, 2), strict=True)):
            out = 4 * options.width * 2**stage
            for index in range(count):
                first = index == 0
                beta = 1.0 / math.sqrt(variance)
                blocks.append(_Block(channels, out, stride if first else 1, beta, options.alpha))
                channels = out
                variance = (1.0 if first else variance) + options.alpha**2
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, outputs)

    def reset(self, generator: torch.Generator) -> None:
        """Truncated normal kernels, zero biases and skip gains, unit kernel gains, small normal head."""
        for name, parameter in self.named_parameters():
            if name == "head.weight":
                nn.init.normal_(parameter, std=HEAD_STD, generator=generator)
            elif parameter.dim() > 1:
                fan_in_truncated_normal_(parameter, generator)
            elif name.endswith(("bias", "skip_gain")):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, channels, height, width) to logits (n, classes)."""
        return self.head(_activation(self.blocks(self.stem(inputs))).mean((2, 3)))
