"""ResNet-18 v2 with GroupNorm: what Kurakin et al. 2022 (arXiv 2201.12328) trained on ImageNet with DP."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import validate
from fedsim.models.cnn import image_shape
from fedsim.models.layers import SMALLEST, STEMS, stem
from fedsim.validate import InputError

BLOCKS = 2  # a stage
STRIDES = (1, 2, 2, 2)
EPSILON = 1.001e-5


@dataclass(frozen=True)
class ResNet18V2Options:
    """Options of `ResNet18V2`.

    Attributes:
        stem: "imagenet", or "small" for images of 32 pixels (fedsim.models.layers.stem).
        width: channels of the first stage; 64 is the published network.
        groups: groups of every GroupNorm; must divide `width`.
    """

    stem: str = "imagenet"
    width: int = 64
    groups: int = 32


def _convolution(channels: int, out: int, kernel: int, stride: int, padding: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, bias=False)


class _Block(nn.Module):
    """Two times norm, ReLU, 3x3 convolution, the second with the stride, added to the input.

    Where the channels change, a 1x1 convolution of the first activation takes the input's place; where the
    image is halved without that, every second pixel of the input is kept.
    """

    def __init__(self, channels: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm1 = nn.GroupNorm(groups, channels, eps=EPSILON)
        self.conv1 = _convolution(channels, out, 3, 1, 1)
        self.norm2 = nn.GroupNorm(groups, out, eps=EPSILON)
        self.conv2 = _convolution(out, out, 3, stride, 1)
        self.project = _convolution(channels, out, 1, stride, 0) if channels != out else None

    def forward(self, inputs: Tensor) -> Tensor:
        active = F.relu(self.norm1(inputs))
        if self.project is not None:
            shortcut = self.project(active)
        else:
            shortcut = inputs[:, :, :: self.stride, :: self.stride]
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(active))))


class ResNet18V2(nn.Module):
    """Pre-activation ResNet-18 (He et al. 2016) in the form of Objax's model zoo, GroupNorm for BatchNorm.

    Four stages of two blocks, 64 to 512 channels; the second block of stages 2 to 4 halves the image;
    projections where the channels grow; norm, ReLU, global average pooling, linear head: 11,687,720
    parameters for (3, 224, 224) and 1,000 classes. Kernels start from a normal of variance 2 / fan out, the
    head from Glorot's normal, biases at 0, norms at 1 and 0. What Kurakin et al. freeze in their transfer
    ("first 6 layers") is stem and stages 0 to 2: `model.freeze=["stem*", "stages.0.*", "stages.1.*",
    "stages.2.*"]`.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: ResNet18V2Options) -> None:
        super().__init__()
        validate.one_of(options.stem, STEMS, "model.options.stem")
        validate.positive(options.width, "model.options.width")
        validate.positive(options.groups, "model.options.groups")
        if options.width % options.groups:
            raise InputError(
                f"model.options.groups must divide model.options.width ({options.width}), got "
                f"{options.groups}."
            )
        channels, _, _ = image_shape(input_shape, "resnet_18_v2", SMALLEST[options.stem])
        self.stem = stem(options.stem, _convolution, channels, options.width)
        channels = options.width
        stages: list[nn.Module] = []
        for stage, stride in enumerate(STRIDES):
            out = options.width * 2**stage
            blocks = [
                _Block(
                    channels if index == 0 else out, out, stride if index == BLOCKS - 1 else 1, options.groups
                )
                for index in range(BLOCKS)
            ]
            stages.append(nn.Sequential(*blocks))
            channels = out
        self.stages = nn.Sequential(*stages)
        self.norm = nn.GroupNorm(options.groups, channels, eps=EPSILON)
        self.head = nn.Linear(channels, outputs)

    def reset(self, generator: torch.Generator) -> None:
        """Normal kernels of variance 2 / fan out, Glorot's normal head, zero biases, unit norms."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 4:
                fan_out = parameter[:, 0].numel()
                nn.init.normal_(parameter, std=math.sqrt(2.0 / fan_out), generator=generator)
            elif parameter.dim() == 2:
                nn.init.xavier_normal_(parameter, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, channels, height, width) to logits (n, classes)."""
        return self.head(F.relu(self.norm(self.stages(self.stem(inputs)))).mean((2, 3)))
