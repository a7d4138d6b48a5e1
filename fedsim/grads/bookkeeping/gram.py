"""Norms by Gram matrices, with a bound on their rounding.

|G|^2 = <P, Q> of P = X X' and Q = D D' for G = D' X with inputs X and output gradients D (positions, width):
no gradient is formed, but what cancels in G cancels after the matrices were rounded. An entry of P is off by
at most `of_product` of its absolute value and `of_entries` of the lengths of its two rows, so <P, Q> is off
by at most the first times <|P|, |Q|> and the second times trace(P) |Q| (Cauchy and Schwarz); the same of Q.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fedsim.grads import gpu
from fedsim.grads.bookkeeping.precision import (
    SUMMED,
    add_batch_product,
    batch_product,
    of_entries,
    of_product,
    of_sum,
    unit,
)

MOST = 128  # rows: of more, what a sum may lose of an example is not tolerable
_STRIP = 32  # rows of Gram matrices that are formed at a time
_WIDTH = 32  # entries of rows that are multiplied at a time: the error of longer products is not tolerable
_LONG = 8 * _WIDTH  # entries of rows whose pieces are added one after the other


def products(left: Tensor, right: Tensor) -> Tensor:
    """Batch matrix product (n, a, width) x (n, width, b), long ones piece by piece, for `length` of it."""
    total: Tensor | None = None
    for longer in zip(left.split(_LONG, 2), right.split(_LONG, 1), strict=True):
        part: Tensor | None = None
        for ours, theirs in zip(longer[0].split(_WIDTH, 2), longer[1].split(_WIDTH, 1), strict=True):
            part = batch_product(ours, theirs) if part is None else add_batch_product(part, ours, theirs)
        assert part is not None
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def length(width: int) -> int:
    """What `of_product` is to be told of `products`: their additions, as many as come one after the other."""
    return min(width, _WIDTH) + min(width, _LONG) // _WIDTH + width // _LONG


def passes(width: int) -> int:
    """How often `products` writes a matrix, or reads what it has of it."""
    return 2 * -(-width // _WIDTH) - 1


def strips(rows: Tensor) -> list[Tensor]:
    """Inner products of the rows (n, positions, width) of each example with each other.

    The matrices are symmetric: on a CPU they are formed in strips of rows, each from its diagonal on.
    """
    positions = rows.shape[1]
    starts = [0]
    if positions >= 2 * _STRIP and not gpu.on(rows):
        # The first takes the odd rows: widths that are no multiple of vector registers are slow.
        starts += range(_STRIP + positions % _STRIP, positions, _STRIP)
    found = []
    for low, high in zip(starts, (*starts[1:], positions), strict=True):
        strip = rows[:, low:high]
        rest = strip if high == positions else rows[:, low:]
        found.append(products(strip, rest.transpose(1, 2)))
    return found


def inner(pairs: Iterable[tuple[Tensor, Tensor]], lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Inner products (n,) in float64 of two Gram matrices, and the doubt (n,) of them (`Use.doubt`).

    Args:
        pairs: (n, rows, columns) of both, strip by strip as of `strips`; overwritten.
        lengths: of the inner products that made the entries of both, as of `length`.
    """
    found, rows_of_each = [], 0
    for own, theirs in pairs:
        rows_of_each += own.shape[1]
        dtype = own.dtype
        diagonals = [t.diagonal(dim1=1, dim2=2).clamp(min=0.0) for t in (own, theirs)]
        rows, traces = (diagonals[0] * diagonals[1]).sqrt().sum(1), (d.sum(1) for d in diagonals)
        if own.shape[2] > own.shape[1]:
            own[:, :, own.shape[1] :].mul_(2.0)  # also what lies below the diagonal
        sizes = [torch.linalg.vector_norm(t, dim=(1, 2)) for t in (own, theirs)]
        product = theirs.mul_(own)
        sums = product.sum(2), torch.linalg.vector_norm(product, 1, dim=2)
        wide = (t.sum(1, dtype=torch.float64) for t in sums)  # there may be too many for float32
        found.append(torch.stack([*wide, rows, *traces, *sizes]))
    parts = torch.stack(found)
    whole, absolute, terms, own_trace, other_trace = parts[:, :5].sum(0)
    own_size, other_size = parts[:, 5:].square().sum(0).sqrt()
    whole = whole.clamp(min=0.0)
    doubt = sum(of_product(longest, dtype) for longest in (*lengths, SUMMED)) * absolute
    # The sum is another product: its terms, one a row, may all be rounded to one side, a quarter unit each.
    doubt += unit(dtype) * rows_of_each * whole
    # Of the second matrix each entry beside the diagonal was counted once.
    doubt += of_entries(dtype) * (own_trace * other_size * math.sqrt(2.0) + other_trace * own_size)
    # What vanishes below the smallest number of the dtype.
    doubt += torch.finfo(dtype).tiny * (found[0].shape[1] + own_size + other_size)
    return whole, doubt + 2.0 * of_sum(dtype) * whole.sqrt() * terms
