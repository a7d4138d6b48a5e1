"""Weight standardisation in closed form.

A standardised kernel is, for every output channel, gain * s * (w - mean(w)) with D entries. Write
u = s (w - mean(w)). For a gradient G with respect to the kernel, that with respect to w is
gain * s * (G - mean(G) - kappa (G.u) u) and that with respect to the gain is G.u, where kappa = 1 while s
depends on w and |u| = 1, so that

    |dw|^2 = (gain s)^2 (|G|^2 - (G.1)^2 / D - kappa (G.u)^2),

and kappa = 0 where s is clamped and therefore constant. Per-example norms need only |G|^2, G.1 and G.u for
each channel, and the sum over examples is pulled back to w and the gain by the same formula. The direction
at hand is the kernel itself, a multiple of u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from fedsim.models.layers import WSConv2d


@dataclass(frozen=True)
class Standardisation:
    """How one kernel (p, ...) with D entries a channel came from the parameters of its module.

    Attributes:
        module: its owner.
        direction: the kernel or u itself, (p, D).
        of_kernel: `direction` is the kernel, so that G.direction is also the sum over places of output
            gradient times output.
        counts: (3p,) float64: what the squares of |G|, G.1 and G.direction count, channel by channel, for
            the squared norm over those of weight and gain that are trainable.
        scale: gain * s, (p,) in the weight's dtype.
        share: of G.direction, what is taken off along `direction`, (p,).
        unit: G.u by G.direction, (p,).
    """

    module: WSConv2d
    direction: Tensor
    of_kernel: bool
    counts: Tensor
    scale: Tensor
    share: Tensor
    unit: Tensor

    def squares(self, *measured: Tensor) -> Tensor:
        """What |G|, G.1 and G.direction, each (n, p), or the last of them, add to squared norms (n,)."""
        joined = torch.cat(measured, dim=1).double()
        return joined.square_() @ self.counts[-joined.shape[1] :]

    def pull_back(self, gradient: Tensor, out: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Turn gradients (..., *kernel's shape) into those of weight and gain, as far as they are trainable.

        Args:
            out: of the kernel's shape and contiguous: where the weight's gradient may be put.
        """
        module, dtype = self.module, gradient.dtype
        rows = gradient.flatten(-module.weight.dim() + 1)
        direction = self.direction.to(dtype)
        along = (rows * direction).sum(-1)
        found: list[tuple[Tensor, Tensor]] = []
        if module.weight.requires_grad:
            scale, share = self.scale.to(dtype), along * self.share.to(dtype)
            offset = rows.mean(-1).mul_(scale).neg_()
            place = None if out is None or out.dtype != dtype else out.view(rows.shape)
            pulled = torch.addcmul(offset.unsqueeze(-1), rows, scale.unsqueeze(1), out=place)
            pulled.addcmul_(direction, share.unsqueeze(-1), value=-1.0)
            found.append((module.weight, pulled.view(gradient.shape)))
        if module.gain.requires_grad:
            found.append((module.gain, along * self.unit.to(dtype)))
        return found


@dataclass(frozen=True)
class Measured:
    """A module with the kernel it may have made, measured while its weight is in the cache.

    Attributes:
        module: with a weight of the kernel's shape.
        weight, kernel: (p, D).
        mean, length: of the weight's rows, (p,).
    """

    module: WSConv2d
    weight: Tensor
    kernel: Tensor
    mean: Tensor
    length: Tensor


def measure(module: nn.Module, kernel: Tensor) -> Measured | None:
    """Measure `module`, if it is one whose standardisation is known and the kernel may come from it.

    By exact class: a subclass pulls every example's gradient back, as any other module does.
    """
    if type(module) is not WSConv2d or kernel.shape != module.weight.shape:
        return None
    weight = module.weight.detach().flatten(1)
    length = torch.linalg.vector_norm(weight, dim=1)
    return Measured(module, weight, kernel.flatten(1), weight.mean(1), length)


def standardisations(layers: Sequence[Measured]) -> list[Standardisation | None]:
    """The standardisations that made the kernels; None where the first channel is something else.

    s = 1 / sqrt(max(D var, 1e-4)), and the kernel is gain * u; u is formed only where a gain is too small to
    divide by. The channels of all layers are worked on together: there are many small layers.
    """
    if not layers:
        return []
    device = layers[0].weight.device

    def by_channel(values: Sequence[float]) -> Tensor:
        own = torch.tensor(values, device=device, dtype=torch.float64)
        return own.repeat_interleave(torch.tensor(channels, device=device))

    channels, widths = zip(*(layer.weight.shape for layer in layers), strict=True)
    gains = torch.cat([layer.module.gain.detach() for layer in layers]).double()
    lengths = torch.cat([layer.length for layer in layers]).double().square_()
    means = torch.cat([layer.mean for layer in layers]).double()
    width = by_channel(widths)
    spread = lengths - width * means.square()
    multiplier = gains.clone()
    directions = [layer.kernel for layer in layers]
    unclear = (spread < 0.1 * lengths) | (gains.abs() < 1e-2)  # the difference would lose digits
    of_kernel = [True] * len(layers)
    if bool(unclear.any()):
        parts = zip(
            layers, unclear.split(channels), spread.split(channels), multiplier.split(channels), strict=True
        )
        for index, (layer, some, own_spread, own_multiplier) in enumerate(parts):
            if bool(some.any()):
                of_kernel[index] = False
                centred = layer.weight - layer.mean.unsqueeze(1)
                own_spread.copy_(torch.linalg.vector_norm(centred, dim=1).double().square_())
                own_multiplier.fill_(1.0)
                inverse = own_spread.clamp(min=1e-4).rsqrt_().to(centred.dtype)
                directions[index] = centred.mul_(inverse.unsqueeze(1))
    scale = gains * spread.clamp(min=1e-4).rsqrt_()
    kappa = (spread >= 1e-4).double()
    trained = [
        by_channel([float(p.requires_grad) for p in own])
        for own in zip(*((layer.module.weight, layer.module.gain) for layer in layers), strict=True)
    ]
    factor = trained[0] * scale.square()
    counts = torch.stack([factor, -factor / width, (trained[1] - factor * kappa) / multiplier.square()])
    dtype = layers[0].weight.dtype
    vectors = torch.stack([scale, kappa * scale / multiplier.square(), 1.0 / multiplier]).to(dtype)
    starts = torch.tensor([0, *accumulate(channels[:-1])], device=device)
    split = counts.split(channels, 1), vectors.split(channels, 1)
    described = zip(layers, directions, of_kernel, *split, strict=True)
    made = _made(layers, means[starts], scale[starts])
    return [
        Standardisation(layer.module, direction, whole, own.flatten(), *factors) if true else None
        for true, (layer, direction, whole, own, factors) in zip(made, described, strict=True)
    ]


def _made(layers: Sequence[Measured], means: Tensor, scales: Tensor) -> list[bool]:
    """Whether the first channel of each kernel is its weight's, less its mean and scaled."""
    widths = torch.tensor([layer.weight.shape[1] for layer in layers], device=means.device)
    layer_of = torch.arange(len(layers), device=means.device).repeat_interleave(widths)
    weights = torch.cat([layer.weight[0] for layer in layers]).double()
    expected = (weights - means[layer_of]) * scales[layer_of]
    apart = expected - torch.cat([layer.kernel[0] for layer in layers])

    def lengths(entries: Tensor) -> Tensor:
        return torch.zeros_like(means).index_add_(0, layer_of, entries.square()).sqrt_()

    found: list[bool] = (lengths(apart) <= 1e-3 * lengths(expected) + 1e-12).tolist()
    return found
