"""Rules of `F.conv1d` and `F.conv2d`; one dimension is treated as an image of height one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.grads import gpu
from fedsim.grads.bookkeeping.conv import ConvUse
from fedsim.grads.bookkeeping.geometry import Geometry
from fedsim.grads.bookkeeping.mode import Rule, Watch
from fedsim.grads.bookkeeping.precision import multiplied, under_autocast
from fedsim.grads.bookkeeping.tape import Rows

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
        images = inputs.flatten(0, 1)
        ctx.save_for_backward(images, weight)
        ctx.geometry, ctx.uses, ctx.shape = geometry, uses, inputs.shape
        result = F.conv2d(
            images, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        # A plain view would forbid the model to work on the result in place.
        result = torch.ops.aten._unsafe_view(result, (*inputs.shape[:2], *result.shape[1:]))
        if uses[0] is not None:
            # Of what the model gets: its version tells of changes in place.
            uses[0].remember(result.flatten(0, 1), bias)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        geometry = ctx.geometry
        weight_use, bias_use = ctx.uses
        layout = torch.contiguous_format
        if not inputs.is_contiguous() and inputs.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        gradient = gradient.flatten(0, 1).contiguous(memory_format=layout)
        before = None
        if ctx.needs_input_grad[0]:
            typed = inputs.to(gradient.dtype), weight.to(gradient.dtype)
            before = geometry.backward(gradient, *typed, (True, False, False))[0].view(ctx.shape)
        if weight_use is not None:
            weight_use.fill(inputs, gradient)
        if bias_use is not None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            flat = gradient.flatten(2) if gradient.is_contiguous() else gradient
            sums = flat.sum(tuple(range(2, flat.dim())), dtype=wide)
            bias_use.fill(sums.unflatten(0, ctx.shape[:2]))
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
    """Rule of `F.conv2d`, on (rows, channels, height, width) or one image without rows."""
    if input.dim() != 4 or not _natural(watch, input, weight, bias):
        return watch.fallback(func, input, weight, bias, stride, padding, dilation, groups)
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
    """Rule of `F.conv1d`, on (rows, channels, length)."""
    if input.dim() != 3 or not _natural(watch, input, weight, bias):
        return watch.fallback(func, input, weight, bias, stride, padding, dilation, groups)
    sizes = _line(stride), _line(dilation)
    lifted = input.unsqueeze(2)
    return _apply(watch, lifted, weight, bias, sizes[0], _padding(padding, 1), sizes[1], groups).squeeze(2)


def _natural(watch: Watch, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether examples meet a kernel that is the same for all of them."""
    return watch.is_rows(inputs) and not watch.is_rows(weight) and not watch.is_rows(bias)


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
    tape, level = watch.tape, watch.level
    if isinstance(padding, str):
        inputs, padding = _pad_to_same(inputs, weight, dilation)
    geometry = Geometry(stride, padding, dilation, groups)
    weight_use = bias_use = None
    with level:
        rows = _laid_out(level.lower(inputs))
        kernel = under_autocast(weight.detach())
        kernel = kernel.unsqueeze(2) if kernel.dim() == 3 else kernel
        if watch.is_weight(weight):
            weight_use = tape.use(ConvUse(tape, weight, geometry, rows, watch.origin(weight)))
        if bias is not None and watch.is_weight(bias):
            bias_use = tape.use(Rows(tape, bias))
        offset = None if bias is None else bias.detach()
        result = _Conv.apply(rows, tape.anchor, kernel, offset, geometry, (weight_use, bias_use))
    return level.lift(result)


def _laid_out(rows: Tensor) -> Tensor:
    """Rows (B, K, channels, height, width) as they are multiplied: half precision with channels innermost."""
    dtype = multiplied(rows)
    if dtype == rows.dtype or not gpu.on(rows):
        return rows.to(dtype)
    images = rows.flatten(0, 1).to(dtype, memory_format=torch.channels_last)
    return images.unflatten(0, rows.shape[:2])


def _pad_to_same(inputs: Tensor, kernel: Tensor, dilation: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Pad as padding='same' does: the odd pixel at the end."""
    sizes = (1, *kernel.shape[2:])[-2:]
    rows, columns = (gap * (size - 1) for gap, size in zip(dilation, sizes, strict=True))
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
