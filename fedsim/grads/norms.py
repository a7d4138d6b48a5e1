"""Squared norms of rows, exact to a part in a million whatever is in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALL = 1e-30
_AT_ONCE = 1 << 20  # entries in float64
BLOCK = 64  # squares added in float32 before going on in float64


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norms (n,) in float64 of `rows` (n, ...), of any floating dtype.

    Squares are added in blocks of at most `BLOCK` in the rows' own dtype (at least float32) and the blocks in
    float64. One float32 reduction of 4,096 equal entries comes out 7e-6 too small, one of 512 with some large
    ones 3e-6, and of 64 none was seen beyond 7e-7: a norm is off by less than 4e-7.
    """
    return squared_norms_of([rows])[0]


def squared_norms_of(parts: Sequence[Tensor]) -> Tensor:
    """As `squared_norms` of each of several `parts` (n, ...), as (parts, n): a GPU is asked once for all."""
    squares = torch.stack([_in_blocks(rows.reshape(len(rows), -1)) for rows in parts])
    # Squares of entries below 1e-19 vanish in float32, and those above 2e19 overflow.
    least, most = torch.aminmax(squares) if squares.numel() else (_SMALL, 0.0)
    if not (least >= _SMALL and most < math.inf):
        odd = ~((squares >= _SMALL) & torch.isfinite(squares))
        for found, part, strange in zip(squares, parts, odd, strict=True):
            flat, rows = part.reshape(len(part), -1), strange.nonzero()[:, 0]
            # Some at a time: they may be all, as where a model is sure of every example, and long.
            for some in rows.split(max(1, _AT_ONCE // max(1, flat.shape[1]))):
                found[some] = flat[some].double().square().sum(1)
    return squares


def upper_squared_norms(rows: Tensor) -> Tensor:
    """As `squared_norms`, or more; nothing is asked of the device, so that a GPU is not waited for.

    Squares too small for float32 count as its smallest number, and are infinite where they are too large.
    """
    flat = rows.reshape(len(rows), -1)
    return _in_blocks(flat) + flat.shape[1] * torch.finfo(torch.float32).tiny


def _in_blocks(flat: Tensor) -> Tensor:
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    width = flat.shape[1]
    if width <= BLOCK:
        return torch.linalg.vector_norm(flat, dim=1).double().square()
    fewest = -(-width // BLOCK)
    count = next((count for count in range(fewest, 8 * fewest) if width % count == 0), 0)
    size = width // count if count else BLOCK
    whole = width - width % size
    blocks = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, size)), dim=2)
    squares = blocks.double().square().sum(1)
    if whole < width:
        squares += torch.linalg.vector_norm(flat[:, whole:], dim=1).double().square()
    return squares
