"""Arithmetic of CUDA devices, emulated on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_aten = torch.ops.aten
_MATMUL = {_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default, _aten.mm.out}
_MATMUL |= {
    torch.ops.mkldnn._linear_pointwise.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
_MATMUL |= {_aten._scaled_dot_product_flash_attention_for_cpu_backward.default, _aten.linear.default}
_CONV = {_aten.convolution.default, _aten.convolution_backward.default, _aten.mkldnn_convolution.default}
_SWITCH: Any = torch.backends


def to_tf32(tensor: Tensor) -> Tensor:
    """Round float32 to TF32's 10 bits after the first, to nearest, ties to even."""
    bits = tensor.contiguous().view(torch.int32)
    rounded = bits + 0x0FFF + ((bits >> 13) & 1)
    kept = torch.where(torch.isfinite(tensor), rounded & ~0x1FFF, bits)
    return kept.view(torch.float32).view_as(tensor)


class Tf32(TorchDispatchMode):
    """Rounds what products multiply to TF32 wherever the switch of its kind says so.

    Attributes:
        rounded: products whose factors were rounded.
        whole: products that were not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounded = self.whole = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        switch = _SWITCH.cuda.matmul if func in _MATMUL else _SWITCH.cudnn.conv if func in _CONV else None
        if switch is None:
            return func(*args, **(kwargs or {}))
        if switch.fp32_precision != "tf32":
            self.whole += 1
            return func(*args, **(kwargs or {}))
        self.rounded += 1
        return func(*tree_map(_rounded, args), **(kwargs or {}))


def _rounded(value: Any) -> Any:
    return to_tf32(value) if isinstance(value, Tensor) and value.dtype == torch.float32 else value
