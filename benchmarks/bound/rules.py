"""Tiny models, one for each way the engines come to a norm, with sizes drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.models.layers import WSConv2d


@dataclass(frozen=True)
class Drawn:
    """A model and the shape of one view of its inputs.

    Attributes:
        vocabulary: of ids; 0 where inputs are numbers.
    """

    model: nn.Module
    shape: tuple[int, ...]
    vocabulary: int = 0


Rule = Callable[[random.Random], Drawn]


class Difference(nn.Module):
    """One weight used twice, so that the uses nearly cancel where both halves of the input agree."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, out)

    def forward(self, x: Tensor) -> Tensor:
        """Layer of the first half less layer of the second."""
        first, second = x.chunk(2, dim=1)
        return self.inner(first) - self.inner(second)


class Scaled(nn.Module):
    """Gain, shift, a table of positions and a temperature without axes."""

    def __init__(self, positions: int, features: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(features)), nn.Parameter(torch.randn(features))
        self.position = nn.Parameter(torch.randn(1, positions, features))
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        """All of them on x (n, positions, features)."""
        return (x * self.gain + self.shift + self.position) * self.temperature


class Product(nn.Module):
    """A weight that is a product of two, and an einsum."""

    def __init__(self, features: int, rank: int, out: int) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(rank, features)), nn.Parameter(torch.randn(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        """The product applied, plus the einsum of the factors."""
        return F.linear(x, self.up @ self.down) + torch.einsum("nti,ri,or->nto", x, self.down, self.up)


class Recurrent(nn.Module):
    """All states of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Its first output."""
        return self.layer(x)[0]


class Attending(nn.Module):
    """Attention of an example to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Its output."""
        return self.layer(x, x, x, need_weights=False)[0]


class Pairs(nn.Module):
    """A bilinear layer on both halves of the features."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Bilinear(features, features, out)

    def forward(self, x: Tensor) -> Tensor:
        """Of the halves."""
        return self.layer(*x.chunk(2, dim=-1))


def linear(draw: random.Random) -> Drawn:
    """A linear layer on a vector."""
    features, out = draw.randint(1, 40), draw.randint(1, 12)
    return Drawn(nn.Linear(features, out, bias=draw.random() < 0.7), (features,))


def linear_at_positions(draw: random.Random) -> Drawn:
    """A linear layer at few positions of many features: norms by Gram matrices pay here."""
    features, out = draw.choice((32, 64, 128)), draw.choice((16, 32, 64))
    return Drawn(nn.Linear(features, out, bias=draw.random() < 0.7), (draw.randint(2, 8), features))


def linear_at_many_positions(draw: random.Random) -> Drawn:
    """A linear layer at many positions of few features."""
    features, out = draw.randint(1, 6), draw.randint(1, 6)
    return Drawn(nn.Linear(features, out), (draw.randint(8, 60), features))


def wide_linear(draw: random.Random) -> Drawn:
    """Many entries a gradient."""
    features = draw.choice((3000, 20000))
    return Drawn(nn.Linear(features, draw.randint(2, 4)), (features,))


def conv1d(draw: random.Random) -> Drawn:
    """Conv1d."""
    groups = draw.choice((1, 1, 2))
    layer = nn.Conv1d(
        4, 6, draw.randint(1, 3), stride=draw.randint(1, 2), padding=draw.randint(0, 1), groups=groups
    )
    return Drawn(layer, (4, draw.randint(4, 16)))


def conv2d(draw: random.Random) -> Drawn:
    """Conv2d."""
    channels, groups = draw.choice(((3, 1), (4, 2), (4, 4), (8, 1)))
    layer = nn.Conv2d(
        channels, draw.choice((4, 8)), draw.randint(1, 3), stride=draw.randint(1, 2),
        padding=draw.randint(0, 1), groups=groups, dilation=draw.choice((1, 1, 2)), bias=draw.random() < 0.7,
    )  # fmt: skip
    return Drawn(layer, (channels, draw.randint(5, 8), draw.randint(5, 8)))


def wide_conv2d(draw: random.Random) -> Drawn:
    """Conv2d of many channels at few places."""
    return Drawn(nn.Conv2d(32, 32, 3, padding=draw.randint(0, 1)), (32, 4, draw.randint(3, 5)))


def conv3d(draw: random.Random) -> Drawn:
    """Conv3d."""
    return Drawn(nn.Conv3d(2, 4, 2, stride=draw.randint(1, 2)), (2, 4, 4, draw.randint(3, 5)))


def transposed(draw: random.Random) -> Drawn:
    """ConvTranspose2d."""
    return Drawn(
        nn.ConvTranspose2d(4, 4, 3, stride=draw.randint(1, 2), groups=draw.choice((1, 2))), (4, 3, 3)
    )


def standardised(draw: random.Random) -> Drawn:
    """WSConv2d; small kernels are divided by the smallest length instead of their own."""
    size = draw.randint(1, 3)
    layer = WSConv2d(draw.choice((2, 4, 8)), draw.choice((1, 4)), size, bias=draw.random() < 0.7)
    layer.reset(torch.Generator().manual_seed(draw.getrandbits(30)))
    with torch.no_grad():
        layer.gain.copy_(torch.randn(layer.gain.shape) * draw.choice((0.01, 1.0, 100.0)))
        layer.weight.mul_(draw.choice((1e-3, 1.0, 1.0, 1e3)))
        layer.weight.add_(draw.choice((0.0, 0.0, 10.0)))
    edge = size + draw.choice((0, 0, 1, 4))
    return Drawn(layer, (layer.in_channels, edge, edge))


def layer_norm(draw: random.Random) -> Drawn:
    """LayerNorm."""
    features = draw.randint(2, 24)
    return Drawn(nn.LayerNorm(features), (draw.randint(1, 12), features))


def rms_norm(draw: random.Random) -> Drawn:
    """RMSNorm."""
    features = draw.randint(2, 24)
    return Drawn(nn.RMSNorm(features), (draw.randint(1, 12), features))


def group_norm(draw: random.Random) -> Drawn:
    """GroupNorm."""
    return Drawn(nn.GroupNorm(draw.choice((1, 2, 4)), 8), (8, draw.randint(2, 6), draw.randint(2, 6)))


def instance_norm(draw: random.Random) -> Drawn:
    """InstanceNorm1d."""
    return Drawn(nn.InstanceNorm1d(6, affine=True), (6, draw.randint(2, 24)))


def prelu(draw: random.Random) -> Drawn:
    """PReLU."""
    return Drawn(nn.PReLU(draw.choice((1, 5))), (5, draw.randint(1, 12)))


def embedding(draw: random.Random) -> Drawn:
    """Embedding: ids that occur many times, or once."""
    vocabulary = draw.choice((1, 2, 50))
    settings = {"padding_idx": 0} if draw.random() < 0.3 else {}
    return Drawn(
        nn.Embedding(vocabulary, draw.randint(1, 16), **settings), (draw.randint(1, 40),), vocabulary
    )


def bag(draw: random.Random) -> Drawn:
    """EmbeddingBag."""
    vocabulary = draw.choice((2, 20))
    mode = draw.choice(("sum", "mean", "max"))
    return Drawn(
        nn.EmbeddingBag(vocabulary, draw.randint(1, 8), mode=mode), (draw.randint(1, 20),), vocabulary
    )


def bilinear(draw: random.Random) -> Drawn:
    """Bilinear."""
    half = draw.randint(2, 8)
    return Drawn(Pairs(half, draw.randint(1, 4)), (draw.randint(1, 6), 2 * half))


def recurrent(draw: random.Random) -> Drawn:
    """RNN, LSTM, GRU."""
    kind = draw.choice((nn.RNN, nn.LSTM, nn.GRU))
    return Drawn(Recurrent(kind(4, 5, batch_first=True)), (draw.randint(1, 8), 4))


def attention(draw: random.Random) -> Drawn:
    """MultiheadAttention."""
    return Drawn(Attending(8, draw.choice((1, 2))), (draw.randint(2, 6), 8))


def tied(draw: random.Random) -> Drawn:
    """One weight twice; the uses cancel."""
    features = draw.choice((4, 32, 64))
    return Drawn(Difference(features, draw.choice((4, 32))), (2 * draw.randint(1, 6), features))


def scaled(draw: random.Random) -> Drawn:
    """Gains, shifts, positions, a temperature."""
    positions, features = draw.randint(1, 10), draw.randint(1, 10)
    return Drawn(Scaled(positions, features), (positions, features))


def product(draw: random.Random) -> Drawn:
    """Weights made of others."""
    features = draw.randint(2, 12)
    return Drawn(Product(features, draw.randint(1, 3), draw.randint(1, 6)), (draw.randint(1, 8), features))


def several(draw: random.Random) -> Drawn:
    """Layers behind each other, of which one may have most of the gradient."""
    width = draw.choice((4, 24))
    layers = [nn.Linear(6, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 5)]
    return Drawn(nn.Sequential(*layers), (draw.randint(1, 8), 6))


def pictures(draw: random.Random) -> Drawn:
    """Convolutions, a norm and a head."""
    layers = [
        nn.Conv2d(3, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 3),
    ]
    return Drawn(nn.Sequential(*layers), (3, 6, 6))


def weight_norm(draw: random.Random) -> Drawn:
    """A parametrised weight."""
    return Drawn(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), (draw.randint(1, 8), 6))


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        linear, linear_at_positions, linear_at_many_positions, wide_linear, conv1d, conv2d, wide_conv2d,
        conv3d, transposed, standardised, layer_norm, rms_norm, group_norm, instance_norm, prelu, embedding,
        bag, bilinear, recurrent, attention, tied, scaled, product, several, pictures, weight_norm,
    )
}  # fmt: skip
