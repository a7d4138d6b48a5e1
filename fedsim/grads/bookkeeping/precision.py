"""Products: in float32 (or float64) whatever the precision of their factors, and large ones by oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.grads import gpu, norms

_LARGE = 2**25  # multiplications from which a product goes to oneDNN
_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
_HALF = (torch.float16, torch.bfloat16)


def widen(tensor: Tensor) -> Tensor:
    """Return `tensor` in at least float32."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def multiplied(tensor: Tensor) -> torch.dtype:
    """The dtype in which an autocast that is on multiplies `tensor`; its own where there is none."""
    kind = tensor.device.type
    if tensor.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def under_autocast(tensor: Tensor) -> Tensor:
    """Return `tensor` as it is multiplied: what is kept is then what was."""
    return tensor.to(multiplied(tensor))


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norms (n,) in float64 of `rows` (n, ...); on a GPU rounded up, so as not to wait for it."""
    return norms.upper_squared_norms(rows) if gpu.on(rows) else norms.squared_norms(rows)


def batch_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Batch matrix product (n, a, b) x (n, b, c) in at least float32, accumulated in at least float32.

    Args:
        out: where it goes, (n, a, c) in at least float32.
    """
    if left.dtype == right.dtype and left.dtype in _HALF and gpu.on(left):
        return of_halves(torch.bmm, left, right, out)
    left, right = _common(left, right)
    return torch.bmm(left, right, out=out)


def add_batch_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add `batch_product(left, right)` to `total` (n, a, c), in at least float32, and return it."""
    if left.dtype == right.dtype and left.dtype in _HALF and gpu.on(left):
        return add_of_halves(total, left, right)
    return total.baddbmm_(*_common(left, right))


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix product (a, b) x (b, c), as `batch_product`; in `out`, where it can be.

    On a GPU, float32 times bfloat16 is three products of bfloat16, a sixth of the time of one of float32.
    """
    if {left.dtype, right.dtype} == {torch.float32, torch.bfloat16} and gpu.on(left):
        if left.dtype == torch.float32:
            return added(of_halves(torch.mm, part, right) for part in thirds(left))
        return added(of_halves(torch.mm, left, part) for part in thirds(right))
    if left.dtype == right.dtype and left.dtype in _HALF and gpu.on(left):
        return of_halves(torch.mm, left, right)
    left, right = _common(left, right)
    return torch.mm(left, right, out=out if out is not None and out.dtype == left.dtype else None)


def thirds(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors of bfloat16 that add up to `tensor` of float32: its 24 bits are three times eight.

    Exactly so above 1e-31; below, the last bits are lost.
    """
    first = tensor.bfloat16()
    rest = tensor - first
    second = rest.bfloat16()
    return first, second, (rest - second).bfloat16()


def parts_for(wide: Tensor, other: torch.dtype) -> tuple[Tensor, ...]:
    """What to multiply in place of `wide` of float32, where the other factor is of dtype `other`."""
    return thirds(wide) if other == torch.bfloat16 and gpu.on(wide) else (wide,)


def added(products: Iterable[Tensor]) -> Tensor:
    """Sum of the products of `parts_for`, the small ones first."""
    first, *rest = products
    return first + (rest[0] + rest[1]) if rest else first


def of_halves(
    operation: Callable[..., Tensor], left: Tensor, right: Tensor, out: Tensor | None = None
) -> Tensor:
    """`torch.mm` or `torch.bmm` of factors of 16 bits, whose products float32 has, added in float32."""
    if left.is_cuda:
        return operation(left, right, out_dtype=torch.float32, out=out)
    return operation(left.float(), right.float(), out=out)


def add_of_halves(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add `of_halves` of `torch.bmm` to `total` of float32, and return it."""
    if left.is_cuda:
        return torch.baddbmm(total, left, right, out_dtype=torch.float32, out=total)
    return total.baddbmm_(left.float(), right.float())


def _common(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    if left.dtype == right.dtype and left.dtype not in _HALF:
        return left, right
    dtype = torch.promote_types(widen(left).dtype, widen(right).dtype)
    return left.to(dtype), right.to(dtype)


def unit(dtype: torch.dtype) -> float:
    """Relative error of one rounding in `dtype`."""
    return torch.finfo(dtype).eps / 2.0


def of_product(length: int, dtype: torch.dtype) -> float:
    """Error of an inner product of `length` in `dtype`, relative to that of the absolute values.

    Worst-case analysis gives one unit an entry, in any order of additions (Higham 2002, section 3.1), and
    kernels that add one after the other come near to it: three quarters where entries are rounded away
    beside a large one, a quarter where all are equal (tests/equivalence/test_rounding.py).
    """
    return unit(dtype) * (4.0 + length)


SUMMED = 16
"""What `of_product` is to be told of sums of up to a million by `Tensor.sum`, which adds in blocks."""


def of_entries(dtype: torch.dtype) -> float:
    """Error of the inner product of vectors of mixed signs in `dtype`, relative to their lengths."""
    return 2.0 * unit(dtype)


def of_sum(dtype: torch.dtype) -> float:
    """Error of what one example's terms add to a sum in `dtype`, relative to the sum of their lengths."""
    return unit(dtype)


def affine(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of rows (n, in), by oneDNN where `for_onednn` says so."""
    if _onednn is None or not for_onednn(rows, weight):
        return F.linear(rows, weight, bias)
    result: Tensor = _onednn(rows, weight, bias, "none", [], "")
    return result


def for_onednn(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes the product of rows (n, in) with weight (out, in): large ones on a CPU.

    torch leaves float32 products to its BLAS, which is up to a sixth slower on processors its makers did not
    tune it for, and half as fast for a few outputs. Small ones do not earn back a call of oneDNN.
    """
    large = rows.shape[0] * weight.numel() >= _LARGE
    single = rows.dtype == weight.dtype == torch.float32 and rows.is_cpu and rows.is_contiguous()
    return _onednn is not None and large and single
