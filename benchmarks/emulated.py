"""Arithmetic of CUDA devices, emulated on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.spies import WAITS

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


class Graph:
    """`torch.cuda.CUDAGraph` on the CPU: what a recording asked is asked again, of the same memory.

    Between recording and replay, whatever the recording made is overwritten: on a GPU it was never computed.

    Attributes:
        replays: how many there were.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self.replays = 0

    def add(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record one operation."""
        given = {id(t.untyped_storage()._cdata): t for t in _tensors((args, kwargs))}
        known = {t.untyped_storage()._cdata for t in given.values()}
        new = [None if t.untyped_storage()._cdata in known else t.detach() for t in _tensors(result)]
        own = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, (args, kwargs))
        self._calls.append((func, *own, new))  # detached, for graphs of autograd lead to the model

    def forget(self) -> None:
        """Overwrite everything that was made."""
        for *_, new in self._calls:
            for tensor in new:
                if tensor is not None:
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    def replay(self) -> None:
        """Ask everything again."""
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, new in self._calls:
                for place, tensor in zip(new, _tensors(func(*args, **kwargs)), strict=True):
                    if place is not None:
                        place.copy_(tensor)


class Recorder(TorchDispatchMode):
    """`torch.cuda.graph` on the CPU, for `Graph`: refuses to wait for values, as on a GPU."""

    REFUSED = WAITS | {"lift_fresh"}  # a tensor made of the host's numbers, to be copied to the device

    def __init__(self, graph: Graph, stream: object = None, capture_error_mode: str = "global") -> None:
        super().__init__()
        assert capture_error_mode == "thread_local"
        self._graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in _tensors(args[1:]))
        if name in self.REFUSED or by_mask:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self._graph.add(func, args, kwargs or {}, result)
        return result

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._graph.forget()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
