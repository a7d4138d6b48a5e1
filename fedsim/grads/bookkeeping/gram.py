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
from fedsim.grads.bookkeeping.precision import batch_product, of_entries, of_product, of_sum

_STRIP = 32  # rows of Gram matrices that are formed at a time
_WIDTH = 256  # entries of rows that are multiplied at a time: the error of longer products is not tolerable


def strips(rows: Tensor) -> list[Tensor]:
    """Inner products of the rows (n, positions, width) of each example with each other.

    The matrices are symmetric: on a CPU they are formed in strips of rows, each from its diagonal on. Rows
    that are long are multiplied piece by piece.
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
        parts = [
            batch_product(ours, theirs.transpose(1, 2))
            for ours, theirs in zip(strip.split(_WIDTH, 2), rest.split(_WIDTH, 2), strict=True)
        ]
        found.append(sum(parts[1:], start=parts[0]))
    return found


def inner(pairs: Iterable[tuple[Tensor, Tensor]], widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Inner products (n,) in float64 of two Gram matrices, and the doubt (n,) of them (`Use.doubt`).

    Args:
        pairs: (n, rows, columns) of both, strip by strip as of `strips`; overwritten.
        widths: lengths of the inner products that made the entries of both.
    """
    found = []
    for own, theirs in pairs:
        diagonals = [t.diagonal(dim1=1, dim2=2).clamp(min=0.0) for t in (own, theirs)]
        lengths = (diagonals[0] * diagonals[1]).sqrt().sum(1)
        if own.shape[2] > own.shape[1]:
            own[:, :, own.shape[1] :].mul_(2.0)  # also what lies below the diagonal
        sizes = [torch.linalg.vector_norm(t, dim=(1, 2)) for t in (own, theirs)]
        product = theirs.mul_(own)
        sums = product.sum((1, 2)), torch.linalg.vector_norm(product, 1, dim=(1, 2))
        found.append(torch.stack([*sums, lengths, *(d.sum(1) for d in diagonals), *sizes]))
    parts = torch.stack(found).double()
    products, absolute, lengths, own_trace, other_trace = parts[:, :5].sum(0)
    own_size, other_size = parts[:, 5:].square().sum(0).sqrt()
    dtype = found[0].dtype
    products = products.clamp(min=0.0)
    longest = [min(width, _WIDTH) + 8 * (width // _WIDTH) for width in widths]
    doubt = (of_product(longest[0], dtype) + of_product(longest[1], dtype)) * absolute
    # Of the second matrix each entry beside the diagonal was counted once.
    doubt += of_entries(dtype) * (own_trace * other_size * math.sqrt(2.0) + other_trace * own_size)
    # What vanishes below the smallest number of the dtype.
    doubt += torch.finfo(dtype).tiny * (found[0].shape[1] + own_size + other_size)
    return products, doubt + 2.0 * of_sum(dtype) * products.sqrt() * lengths
