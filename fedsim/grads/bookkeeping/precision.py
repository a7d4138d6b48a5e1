"""Products that give float32 (or float64) results whatever the precision of their factors."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def widen(tensor: Tensor) -> Tensor:
    """Return `tensor` in at least float32."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def batch_product(left: Tensor, right: Tensor) -> Tensor:
    """Batch matrix product (n, a, b) x (n, b, c) in at least float32, accumulated in at least float32."""
    if left.dtype == right.dtype and left.dtype in _HALF and left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    left, right = _common(left, right)
    return torch.bmm(left, right)


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix product (a, b) x (b, c), as `batch_product`; in `out`, where it can be."""
    if left.dtype == right.dtype and left.dtype in _HALF and left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    left, right = _common(left, right)
    return torch.mm(left, right, out=out if out is not None and out.dtype == left.dtype else None)


def _common(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    if left.dtype == right.dtype and left.dtype not in _HALF:
        return left, right
    dtype = torch.promote_types(widen(left).dtype, widen(right).dtype)
    return left.to(dtype), right.to(dtype)
