"""Clipped sums of materialised per-example gradients, by whatever rule bounds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.clipping.base import ClipRule
from fedsim.grads.arithmetic import off
from fedsim.grads.norms import squared_norms_of


def overall(norms: Tensor) -> Tensor:
    """Return norms (n,) of whole gradients from themselves, or from those of their parts (n, G)."""
    return norms if norms.dim() == 1 else torch.linalg.vector_norm(norms, dim=1)


def rounded_down(coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers that `dtype` has (at least float32's), in float64, none above `coefficients`.

    Those of very long gradients are subnormal: rounded up, they would lengthen a contribution.
    """
    near = coefficients.to(torch.promote_types(dtype.to_real(), torch.float32))
    below = torch.nextafter(near, torch.zeros_like(near))
    return torch.where(near.double() > coefficients, below, near).double()


def clip_and_sum(
    gradients: Sequence[Tensor], clip: ClipRule, groups: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Clip materialised per-example gradients and add them up.

    Args:
        gradients: one tensor (n, *shape) a parameter, of one dtype and device, in flat order.
        clip: the rule; sees the norm over all parameters of a group together.
        groups: what the rule's `group_of` says of the parameters.

    Returns:
        The sum (P,) in the gradients' dtype, and the norms in float64 before clipping, (n,), or (n, G) for a
        rule with groups. A norm is not finite where an entry is not; such an example adds exactly 0.
    """
    rows, factors, norms, _ = _clipped(gradients, clip, groups)
    with off(rows[0].device.type):  # a model may have left one on
        sums = [factor.to(row.dtype) @ row for row, factor in zip(rows, factors, strict=True)]
    return torch.cat(sums), norms


def clip_and_sum_by_owner(
    gradients: Sequence[Tensor],
    clip: ClipRule,
    owners: Tensor,
    totals: Tensor,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Clip materialised per-example gradients and add each to the total of its owner.

    Args:
        gradients, clip, groups: as in `clip_and_sum`.
        owners: (n,) int64, row of `totals` that each example belongs to.
        totals: (owners, P) in the gradients' dtype, changed in place.

    Returns:
        The norms in float64 before clipping, as `clip_and_sum`.
    """
    rows, factors, norms, finite = _clipped(gradients, clip, groups)
    owners, start = owners if finite is None else owners[finite], 0
    for row, factor in zip(rows, factors, strict=True):
        part = totals[:, start : start + row.shape[1]]
        part.index_add_(0, owners, factor.to(row.dtype)[:, None] * row)
        start += row.shape[1]
    return norms


def _clipped(
    gradients: Sequence[Tensor], clip: ClipRule, groups: Sequence[int] | None
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]:
    """Return rows and coefficients, one of each a parameter, of the finite gradients, the norms of all, and
    which are finite; None if all are."""
    rows = [gradient.reshape(len(gradient), -1) for gradient in gradients]
    places = [0] * len(rows) if groups is None else groups
    squares: list[list[Tensor]] = [[] for _ in range(max(places) + 1)]
    for own, place in zip(squared_norms_of(rows), places, strict=True):
        squares[place].append(own)
    parts = [torch.stack(of_group).sum(0).sqrt() for of_group in squares]
    norms = parts[0] if groups is None else torch.stack(parts, dim=1)
    coefficients = rounded_down(clip.coefficients(norms), rows[0].dtype)
    finite = torch.isfinite(overall(norms))
    whole = bool(finite.all())
    if not whole:  # 0 * nan is nan: a zero coefficient alone would not keep it out of the sum
        rows = [row[finite] for row in rows]
        coefficients = coefficients[finite]
    factors = [coefficients] if groups is None else coefficients.t().contiguous().unbind()
    return rows, [factors[place] for place in places], norms, None if whole else finite
