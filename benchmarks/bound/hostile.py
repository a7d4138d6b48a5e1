"""Inputs and output gradients that make a norm hard to compute in float32."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bound.rules import Drawn
from fedsim.models.layers import WSConv2d

Fill = Callable[[random.Random, tuple[int, ...]], Tensor]


def plain(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    """Normal, of some scale."""
    return torch.randn(shape) * draw.choice((1e-3, 1.0, 1e3))


def offset(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    """A constant of 1e2 to 1e4, plus or minus 1."""
    return draw.choice((1e2, 1e3, 1e4)) + torch.randn(shape)


def shared_direction(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    """The same long vector at every position, plus little."""
    axis = draw.randrange(1, len(shape))
    vector = torch.randn([size if i == axis else 1 for i, size in enumerate(shape)])
    return vector * draw.choice((1e2, 1e4)) + torch.randn(shape)


def equal(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    """All entries equal: every rounding goes the same way."""
    return torch.full(shape, draw.choice((0.1, 1 / 3, -0.7, 1e-3, 123.4)))


def longer(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    """One example a million times longer than the rest."""
    out = torch.randn(shape)
    out[0] *= 1e6
    return out


def tiny(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    """Numbers whose squares vanish, some of them denormal."""
    return torch.randn(shape) * draw.choice((1e-10, 1e-22, 1e-38, 1e-41))


def huge(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    """Numbers whose squares, or products, overflow."""
    return torch.randn(shape) * draw.choice((1e8, 1e17, 1e20, 1e30))


def spike(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    """One long entry an example, little beside it."""
    flat = torch.randn(shape).flatten(1) * draw.choice((0.0, 1e-4, 1e-3))
    flat[:, draw.randrange(flat.shape[1])] = draw.choice((1.0, 1e4))
    return flat.reshape(shape)


def alternating(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    """Signs that alternate over an axis, plus little: sums over it nearly cancel."""
    axis = draw.randrange(1, len(shape))
    signs = 1.0 - 2.0 * (torch.arange(shape[axis]) % 2).float()
    signs = signs.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return signs * draw.choice((1.0, 1e3)) + torch.randn(shape) * draw.choice((0.0, 1e-4, 1e-2))


def cancelling(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    """Normal, less its mean over an axis: sums over that axis are zero up to rounding."""
    out = torch.randn(shape) * draw.choice((1e-3, 1.0, 1e3))
    return out - out.mean(draw.randrange(1, len(shape)), keepdim=True)


FILLS: dict[str, Fill] = {
    fill.__name__: fill
    for fill in (plain, offset, shared_direction, equal, longer, tiny, huge, spike, alternating, cancelling)
}
# Long products that cancel: where a norm is a difference, it is a small one.
SAME = ("offset", "shared_direction", "equal")
OPPOSED = ("alternating", "cancelling")
PARALLEL = "parallel"  # inputs along the kernel of a standardised convolution


def kinds(draw: random.Random, standardised: bool) -> tuple[str, str]:
    """Draw the kinds of inputs and output gradients; half of the pairs are such that products cancel."""
    chance = draw.random()
    if standardised and chance < 0.3:
        return PARALLEL, draw.choice(("plain", "spike", "equal"))
    if chance < 0.5:
        pair = draw.choice(SAME), draw.choice(OPPOSED)
        return pair if draw.random() < 0.7 else pair[::-1]
    return draw.choice(list(FILLS)), draw.choice(list(FILLS))


def inputs(draw: random.Random, drawn: Drawn, kind: str, examples: int, views: int) -> Tensor:
    """Inputs (examples, views, ...) of a kind; ids are drawn, and all equal for `equal` and `spike`."""
    shape = (examples, views, *drawn.shape)
    if drawn.vocabulary:
        if kind in ("equal", "spike"):
            return torch.full(shape, draw.randrange(drawn.vocabulary))
        return torch.randint(0, drawn.vocabulary, shape)
    if kind == PARALLEL:
        return parallel(draw, drawn, shape)
    return FILLS[kind](draw, shape)


def parallel(draw: random.Random, drawn: Drawn, shape: tuple[int, ...]) -> Tensor:
    """Patches along the first channel's kernel, on a constant: its gradient is a small rest of long ones."""
    out = torch.randn(shape) * draw.choice((0.0, 1e-5, 1e-3))
    if isinstance(drawn.model, WSConv2d):
        kernel = drawn.model.weight.detach()[0]
        size = kernel.shape[-1]
        out[..., :size, :size] += kernel * draw.choice((1.0, 1e2))
    return out + draw.choice((0.0, 1.0, 1e3))
