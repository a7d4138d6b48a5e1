"""Rules of `F.conv1d` and `F.conv2d`; one dimension is treated as an image of height one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.grads.bookkeeping.conv import ConvUse
from fedsim.grads.bookkeeping.geometry import Geometry
from fedsim.grads.bookkeeping.mode import Rule, Watch
from fedsim.grads.bookkeeping.precision import widen
from fedsim.grads.bookkeeping.tape import Rows, Unsupported

Size = int | Sequence[int]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        uses: tuple[ConvUse | None, Rows | None],
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.geometry, ctx.uses = geometry, uses
        result = F.conv2d(
            inputs, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        if uses[0] is not None:
            uses[0].remember(result, bias)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        geometry = ctx.geometry
        weight_use, bias_use = ctx.uses
        layout = torch.contiguous_format
        if not inputs.is_contiguous() and inputs.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        gradient = gradient.contiguous(memory_format=layout)
        before = None
        if ctx.needs_input_grad[0]:
            typed = inputs.to(gradient.dtype), weight.to(gradient.dtype)
            before = geometry.backward(gradient, *typed, (True, False, False))[0]
        if weight_use is not None:
            weight_use.fill(inputs, gradient)
        if bias_use is not None:
            bias_use.fill(
                widen(gradient).flatten(2).sum(2) if gradient.is_contiguous() else widen(gradient).sum((2, 3))
            )
        return before, None, None, None, None, None


def conv2d(
    watch: Watch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Rule of `F.conv2d`."""
    sizes = _pair(stride), _pair(dilation)
    return _apply(watch, input, weight, bias, sizes[0], _padding(padding, 2), sizes[1], groups)


def conv1d(
    watch: Watch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Rule of `F.conv1d`."""
    if input.dim() != 3:
        raise Unsupported("a convolution without a batch axis")
    lifted = input.unsqueeze(2)
    watch.mark_rows(lifted)
    sizes = _line(stride), _line(dilation)
    return _apply(watch, lifted, weight, bias, sizes[0], _padding(padding, 1), sizes[1], groups).squeeze(2)


def _apply(
    watch: Watch,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    tape = watch.tape
    if watch.is_rows(weight) or watch.is_rows(bias) or not watch.is_rows(inputs):
        raise Unsupported("a convolution takes a kernel computed from examples")
    if inputs.dim() != 4 or inputs.shape[0] != tape.batch:
        raise Unsupported(f"a convolution gets shape {tuple(inputs.shape)}, without one row a view")
    kernel = weight.detach()
    kernel = kernel.unsqueeze(2) if kernel.dim() == 3 else kernel
    if isinstance(padding, str):
        inputs, padding = _pad_to_same(inputs, kernel, dilation)
    geometry = Geometry(stride, padding, dilation, groups)
    weight_use = bias_use = None
    if watch.is_weight(weight):
        outputs = geometry.outputs((inputs.shape[2], inputs.shape[3]), (kernel.shape[2], kernel.shape[3]))
        origin = watch.origin(weight)
        weight_use = tape.use(ConvUse(tape, weight, geometry, inputs, outputs, origin))
    if bias is not None and watch.is_weight(bias):
        bias_use = tape.use(Rows(tape, bias))
    offset = None if bias is None else bias.detach()
    return _Conv.apply(inputs, tape.anchor, kernel, offset, geometry, (weight_use, bias_use))


def _pad_to_same(inputs: Tensor, kernel: Tensor, dilation: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Pad as padding='same' does: the odd pixel at the end."""
    rows, columns = (gap * (size - 1) for gap, size in zip(dilation, kernel.shape[2:], strict=True))
    if rows % 2 == 0 and columns % 2 == 0:
        return inputs, (rows // 2, columns // 2)
    return F.pad(inputs, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)), (0, 0)


def _pair(value: Size) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _line(value: Size) -> tuple[int, int]:
    return 1, value if isinstance(value, int) else value[0]


def _padding(value: Size | str, dims: int) -> tuple[int, int] | str:
    if value == "valid":
        return 0, 0
    if isinstance(value, str):
        return value
    if dims == 2:
        return _pair(value)
    return 0, value if isinstance(value, int) else value[0]


RULES: dict[Any, Rule] = {F.conv1d: conv1d, F.conv2d: conv2d}
