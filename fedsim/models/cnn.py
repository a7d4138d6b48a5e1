"""The two small convolutional networks of the DP literature."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from fedsim import validate
from fedsim.models.layers import CONVOLUTIONS, NORMALISATIONS, normalisation
from fedsim.models.linear import ACTIVATIONS
from fedsim.rules import read_with
from fedsim.validate import InputError


@dataclass(frozen=True)
class SmallCnnOptions:
    """Options of `SmallCnn`; the defaults are the papers' network.

    Attributes:
        activation: tanh (Papernot et al. 2021), relu (Opacus) or gelu.
        convolution: "plain", or "weight_standardised" as in De et al. 2022.
        normalisation: "none", or "group" for a GroupNorm after each convolution.
        groups: groups of each GroupNorm; must divide 16.
    """

    activation: str = "tanh"
    convolution: str = "plain"
    normalisation: str = "none"
    groups: int = field(default=8, metadata=read_with(normalisation=("group",)))


class SmallCnn(nn.Module):
    """Convolutional network for small grey images; 26,010 parameters on (1, 28, 28) and 10 classes.

    conv 16, 8x8, stride 2, padding 3; max-pool 2 stride 1; conv 32, 4x4, stride 2; max-pool 2 stride 1;
    linear 32; linear classes. From Papernot, Thakurta, Song, Chien, Erlingsson 2021, "Tempered sigmoid
    activations for deep learning with differential privacy"; also the MNIST example of Opacus. The first
    linear layer takes whatever size remains, so other image sizes from 14x14 on and several channels work.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: SmallCnnOptions) -> None:
        super().__init__()
        validate.one_of(options.activation, ACTIVATIONS, "model.options.activation")
        validate.one_of(options.convolution, CONVOLUTIONS, "model.options.convolution")
        validate.one_of(options.normalisation, NORMALISATIONS, "model.options.normalisation")
        validate.one_of(options.groups, (1, 2, 4, 8, 16), "model.options.groups")
        activation = ACTIVATIONS[options.activation]
        convolution = CONVOLUTIONS[options.convolution]
        channels, height, width = image_shape(input_shape, "small_cnn", smallest=14)
        layers: list[nn.Module] = []
        for out, kernel, padding in ((16, 8, 3), (32, 4, 0)):
            layers.append(convolution(channels, out, kernel, 2, padding))
            if options.normalisation != "none":
                layers.append(normalisation(options.normalisation, options.groups, out))
            layers += [activation(), nn.MaxPool2d(2, stride=1)]
            channels = out
        self.features = nn.Sequential(*layers)
        remaining = 32 * _after_features(height) * _after_features(width)
        self.head = nn.Sequential(nn.Linear(remaining, 32), activation(), nn.Linear(32, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, channels, height, width) to logits (n, classes)."""
        return self.head(self.features(inputs).flatten(1))


def _after_features(size: int) -> int:
    size = (size + 2 * 3 - 8) // 2 + 1 - 1
    return (size - 4) // 2 + 1 - 1


@dataclass(frozen=True)
class CifarCnnOptions:
    """activation: relu (Opacus), tanh or gelu."""

    activation: str = "relu"


class CifarCnn(nn.Module):
    """Convolutional network for colour images; 131,466 parameters on (3, 32, 32) and 10 classes.

    Four 3x3 convolutions (32, 64, 64, 128), average pooling by two after the first three, global average
    pooling, linear classes: the CIFAR-10 example of Opacus (Yousefpour et al. 2021). Any image of at least
    8x8 fits.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: CifarCnnOptions) -> None:
        super().__init__()
        validate.one_of(options.activation, ACTIVATIONS, "model.options.activation")
        activation = ACTIVATIONS[options.activation]
        channels, _, _ = image_shape(input_shape, "cifar_cnn", smallest=8)
        layers: list[nn.Module] = []
        for width in (32, 64, 64):
            layers += [nn.Conv2d(channels, width, 3, padding=1), activation(), nn.AvgPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers, nn.Conv2d(channels, 128, 3, padding=1), activation())
        self.head = nn.Linear(128, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, channels, height, width) to logits (n, classes)."""
        return self.head(self.features(inputs).mean((2, 3)))


def image_shape(input_shape: tuple[int, ...], model: str, smallest: int) -> tuple[int, int, int]:
    """Return (channels, height, width), or raise InputError if it is not an image of at least `smallest`."""
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise InputError(
            f"model {model} must get images (channels, height, width) of at least {smallest}x{smallest}, "
            f"got {tuple(input_shape)}. Where no model is named it is small_cnn: name mlp, linear, or a "
            "model of your own for this data set."
        )
    channels, height, width = input_shape
    return channels, height, width
