"""Weight standardisation in closed form.

A standardised kernel is, for every output channel, gain * s * (w - mean(w)) with D entries. Write
u = s (w - mean(w)). For a gradient G with respect to the kernel, that with respect to w is
gain * s * (G - mean(G) - kappa (G.u) u) and that with respect to the gain is G.u, where kappa = 1 while s
depends on w and |u| = 1, so that

    |dw|^2 = (gain s)^2 (|G|^2 - (G.1)^2 / D - kappa (G.u)^2),

and kappa = 0 where s is clamped and therefore constant. Per-example norms need only |G|^2, G.1 and G.u for
each channel, and the sum over examples is pulled back to w and the gain by the same formula. In place of u
stands a multiple of it that is at hand, the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedsim.grads import constants, gpu
from fedsim.grads.bookkeeping.mode import Rule, Watch
from fedsim.grads.bookkeeping.precision import of_entries, of_product, of_sum, unit
from fedsim.models import layers


@dataclass(frozen=True)
class Origin:
    """Where a kernel came from: parameters or constants, standardised."""

    weight: Tensor
    gain: Tensor
    made: layers.Standardised


@dataclass(frozen=True)
class Standardisation:
    """How gradients of one kernel (p, ...) with D entries a channel become those of its origin.

    Attributes:
        origin: of the kernel.
        direction: the kernel, or a multiple of it, (p, D).
        of_kernel: `direction` is the kernel, so that G.direction is also the sum over places of output
            gradient times output.
        counts: (3p,) float64: what the squares of |G|, G.1 and G.direction count, channel by channel, for
            the squared norm over those of weight and gain that are trainable.
        scale: gain * s, (p,).
        share: of G.direction, what is taken off along `direction`, (p,).
        unit: G.u by G.direction, (p,).
    """

    origin: Origin
    direction: Tensor
    of_kernel: bool
    counts: Tensor
    scale: Tensor
    share: Tensor
    unit: Tensor

    @cached_property
    def reach(self) -> Tensor:
        """What the square of |G| counts if nothing cancels on the way back, (p,) float64.

        G.u is rounded in proportion to |G|, and the gain's gradient may be all of what counts.
        """
        factor, _, along = self.counts.view(3, -1).abs()
        return factor + along / self.unit.double().square()

    def squares(
        self,
        lengths: Tensor,
        sums: Tensor,
        along: Tensor,
        rounded: tuple[int, int],
        terms: Tensor | None = None,
        whole: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Squared norms (n,) in float64 by |G|, G.1 and G.direction, (n, p) each; their doubt (n,).

        Args:
            rounded: lengths of inner products that are rounded like `sums` and `along` (`of_product`).
            terms: lengths (n, p) of what was added up to G.1 and G.direction; None: they are of G itself.
            whole: False where |G| is only an upper bound: the squares are then without those of |G|.
        """
        parts = torch.stack([lengths, sums, along]).double().square_() * self.counts.view(3, 1, -1)
        _, less, other = parts
        found = (parts if whole else parts[1:]).sum((0, 2))
        dtype = lengths.dtype
        taken = less.abs() + other.abs()
        own = sum(of_product(n, dtype) * t.abs() for n, t in zip(rounded, (less, other), strict=True))
        size = (lengths if terms is None else terms).double().square()
        mixed = (size * self.reach * taken).sqrt_().sum(1)
        doubt = 2.0 * own.sum(1) + 3.0 * of_entries(dtype) * mixed
        if whole:
            doubt += 8.0 * unit(dtype) * taken.sum(1)
        # The sum is rounded before it is pulled back: what is long there and short here must stay rare.
        long = (lengths.double().square() * self.reach).sum(1)
        return found, doubt + 16.0 * of_sum(dtype) * (long * found.clamp(min=0.0)).sqrt()

    def pull_back(self, gradient: Tensor, out: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Turn gradients (..., *kernel's shape) into those of weight and gain, as far as they are trainable.

        Args:
            out: of the kernel's shape and contiguous: where the weight's gradient may be put.
        """
        weight, gain, dtype = self.origin.weight, self.origin.gain, gradient.dtype
        rows = gradient.flatten(-weight.dim() + 1)
        direction = self.direction.to(dtype)
        along = (rows * direction).sum(-1)
        found: list[tuple[Tensor, Tensor]] = []
        if weight.requires_grad:
            scale, share = self.scale.to(dtype), along * self.share.to(dtype)
            offset = rows.mean(-1).mul_(scale).neg_()
            place = None if out is None or out.dtype != dtype else out.view(rows.shape)
            pulled = torch.addcmul(offset.unsqueeze(-1), rows, scale.unsqueeze(1), out=place)
            pulled.addcmul_(direction, share.unsqueeze(-1), value=-1.0)
            found.append((weight, pulled.view(gradient.shape)))
        if gain.requires_grad:
            found.append((gain, along * self.unit.to(dtype)))
        return found


def standardisations(origins: Sequence[Origin]) -> list[Standardisation]:
    """Describe the kernels of all layers together: there are many small ones."""
    if not origins:
        return []
    made = [origin.made for origin in origins]
    gains = torch.cat([origin.gain.detach() for origin in origins]).double()
    scales, lengths = (
        torch.cat(parts).detach().double() for parts in zip(*((m.scale, m.length) for m in made), strict=True)
    )
    channels, widths = zip(*(m.centred.shape for m in made), strict=True)

    def by_channel(values: Sequence[float]) -> Tensor:
        return constants.spread(tuple(map(float, values)), channels, torch.float64, gains.device)

    multiplier = gains.clone()
    of_kernel = [not gpu.on(gains)] * len(made)  # where asking for gains would wait for the GPU
    small = gains.abs() < 1e-2  # not to be divided by
    if gpu.on(gains):
        multiplier = lengths.clamp(min=layers.SHORTEST)
    elif bool(small.any()):
        of_kernel = [not bool(own.any()) for own in small.split(channels)]
        multiplier = torch.where(by_channel(of_kernel) > 0, gains, lengths.clamp(min=layers.SHORTEST))
    trained = by_channel([origin.weight.requires_grad for origin in origins])
    factor = trained * scales.square()
    trained = by_channel([origin.gain.requires_grad for origin in origins])
    kappa = (lengths >= layers.SHORTEST).double()
    along = (trained - factor * kappa) / multiplier.square()
    counts = torch.stack([factor, -factor / by_channel(widths), along])
    vectors = torch.stack([scales, kappa * scales / multiplier.square(), 1.0 / multiplier])
    split = counts.split(channels, 1), vectors.to(made[0].kernel.dtype).split(channels, 1)
    return [
        Standardisation(
            origin,
            (origin.made.kernel.flatten(1) if whole else origin.made.centred).detach(),
            whole,
            own.flatten(),
            *factors,
        )
        for origin, whole, own, factors in zip(origins, of_kernel, *split, strict=True)
    ]


def standardised(watch: Watch, func: Any, weight: Tensor, gain: Tensor) -> Tensor:
    """Rule of `layers.standardised`: what it makes from parameters themselves is noted."""
    made = layers.standardise(weight, gain)
    if not any(t.requires_grad and id(t) not in watch.tape.parameters for t in (weight, gain)):
        watch.note(made.kernel, Origin(weight, gain, made))
    return made.kernel


DERIVATIONS: dict[Any, Rule] = {layers.standardised: standardised}
