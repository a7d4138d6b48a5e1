"""Weight standardisation in closed form.

A standardised kernel is, for every output channel, gain * s * (w - mean(w)) with D entries. Write
u = s (w - mean(w)). For a gradient G with respect to the kernel, that with respect to w is
gain * s * (G - mean(G) - kappa (G.u) u) and that with respect to the gain is G.u, where kappa = 1 while s
depends on w and |u| = 1, so that

    |dw|^2 = (gain s)^2 (|G|^2 - (G.1)^2 / D - kappa (G.u)^2),

and kappa = 0 where s is clamped and therefore constant. Per-example norms need only |G|^2, G.1 and G.u for
each channel, and the sum over examples is pulled back to w and the gain by the same formula.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.models.layers import WSConv2d


@dataclass(frozen=True)
class Standardisation:
    """How one kernel (p, ...) with D entries a channel came from the parameters of its module.

    Attributes:
        module: its owner.
        direction: the kernel or u itself, (p, D): u = direction / multiplier.
        multiplier: (p,) float64.
        scale: gain * s, (p,) float64.
        kappa: 1 or 0 a channel, (p,) float64.
        of_kernel: `direction` is the kernel, so that G.direction is also the sum over places of output
            gradient times output.
    """

    module: WSConv2d
    direction: Tensor
    multiplier: Tensor
    scale: Tensor
    kappa: Tensor
    of_kernel: bool

    @property
    def factor(self) -> Tensor:
        """What squares of G without its mean and its part along u count for the weight, (p,) float64."""
        return float(self.module.weight.requires_grad) * self.scale.square()

    @property
    def gain(self) -> float:
        """What the square of G.u counts for the gain: 1 if that is trainable, else 0."""
        return float(self.module.gain.requires_grad)

    def squares(self, norms: Tensor, ones: Tensor, along: Tensor) -> Tensor:
        """Squared norms (n,) float64 over weight and gain from |G|, G.1 and G.direction, each (n, p)."""
        units = (along.double() / self.multiplier).square()
        ones = ones.double().square() / self.direction.shape[1]
        inner = norms.double().square() - ones - self.kappa * units
        return (self.factor * inner.clamp(min=0.0) + self.gain * units).sum(1)

    def pull_back(self, gradient: Tensor, out: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Turn gradients (..., *kernel's shape) into those of weight and gain, as far as they are trainable.

        Args:
            out: of the kernel's shape and contiguous: where the weight's gradient may be put.
        """
        module, dtype = self.module, gradient.dtype
        rows = gradient.flatten(-module.weight.dim() + 1)
        units = (rows * self.direction.to(dtype)).sum(-1) / self.multiplier.to(dtype)
        found: list[tuple[Tensor, Tensor]] = []
        if module.weight.requires_grad:
            scale = self.scale.to(dtype)
            place = None if out is None or out.dtype != dtype else out.view(rows.shape)
            pulled = torch.mul(rows, scale.unsqueeze(1), out=place)
            pulled.sub_((rows.mean(-1) * scale).unsqueeze(-1))
            share = units * (self.kappa * self.scale / self.multiplier).to(dtype)
            pulled.addcmul_(self.direction.to(dtype), share.unsqueeze(-1), value=-1.0)
            found.append((module.weight, pulled.view(gradient.shape)))
        if module.gain.requires_grad:
            found.append((module.gain, units))
        return found


@dataclass(frozen=True)
class Measured:
    """A module with the kernel it may have made, measured while its weight is in the cache.

    Attributes:
        module, kernel: of equal shapes.
        mean, length: of the weight's rows, (p,).
    """

    module: WSConv2d
    kernel: Tensor
    mean: Tensor
    length: Tensor

    def standardisation(self) -> Standardisation | None:
        """The standardisation that made the kernel; None if its first channel is something else.

        s = 1 / sqrt(max(D var, 1e-4)), and the kernel is gain * u; u is formed only where a gain is too small
        to divide by.
        """
        weight, gain = self.module.weight.detach().flatten(1), self.module.gain.detach()
        kernel = self.kernel.flatten(1)
        lengths = self.length.double().square()
        spread = lengths - weight.shape[1] * self.mean.double().square()
        multiplier, of_kernel = gain.double(), True
        if bool(((spread < 0.1 * lengths) | (gain.abs() < 1e-2)).any()):  # the difference would lose digits
            centred = weight - self.mean.unsqueeze(1)
            spread = torch.linalg.vector_norm(centred, dim=1).double().square()
            multiplier, of_kernel = torch.ones_like(spread), False
        inverse = spread.clamp(min=1e-4).rsqrt()
        scale = inverse * gain.double()
        expected = (weight[0] - self.mean[0]) * scale[0].to(weight.dtype)
        apart = torch.linalg.vector_norm(expected - kernel[0])
        if bool(apart > 1e-3 * torch.linalg.vector_norm(expected) + 1e-12):
            return None
        direction = kernel if of_kernel else centred * inverse.to(weight.dtype).unsqueeze(1)
        return Standardisation(
            self.module, direction, multiplier, scale, (spread >= 1e-4).double(), of_kernel
        )


def measure(module: nn.Module | None, kernel: Tensor) -> Measured | None:
    """Measure `module`, if it is one whose standardisation is known and the kernel may come from it.

    By exact class: a subclass pulls every example's gradient back, as any other module does.
    """
    if type(module) is not WSConv2d or kernel.shape != module.weight.shape:
        return None
    weight = module.weight.detach().flatten(1)
    return Measured(module, kernel, weight.mean(1), torch.linalg.vector_norm(weight, dim=1))
