"""Normalisation layers with a gain and a bias: group, instance, layer and root-mean-square norms.

Their parameters are small, so per-example gradients are kept. Group norm gets them from torch's own kernel:
seen as one image of B * channels channels, its gain and bias gradients are already per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.grads.bookkeeping.mode import Rule, Watch
from fedsim.grads.bookkeeping.precision import widen
from fedsim.grads.bookkeeping.repeat import repeated
from fedsim.grads.bookkeeping.tape import Rows

_backward = torch.ops.aten.native_group_norm_backward
_BLOCKS = 65_535  # of a CUDA kernel, along the axis on which torch puts one for each row and group


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        anchor: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        uses: tuple[Rows | None, Rows | None],
    ) -> Tensor:
        rows, channels = math.prod(inputs.shape[:2]), inputs.shape[2]
        size = math.prod(inputs.shape[3:])
        images = inputs.flatten(0, 1)
        result, mean, rstd = torch.native_group_norm(images, weight, bias, rows, channels, size, groups, eps)
        ctx.save_for_backward(inputs, mean, rstd, weight)
        ctx.groups, ctx.uses = groups, uses
        return torch.ops.aten._unsafe_view(result, inputs.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, mean, rstd, weight = ctx.saved_tensors
        rows, channels = math.prod(inputs.shape[:2]), inputs.shape[2]
        size = math.prod(inputs.shape[3:])
        if weight is None:
            weight = mean.new_ones(channels)
        wanted = ctx.needs_input_grad[0]
        tensors = (gradient.contiguous(), inputs, mean, rstd)
        pieces = [
            _backward(
                *(tensor.reshape(1, len(own) * channels, size) for tensor in (given, own)),
                *(tensor.reshape(1, -1) for tensor in moments),
                weight.repeat(len(own)),
                1,
                len(own) * channels,
                size,
                len(own) * ctx.groups,
                (wanted, True, True),
            )
            for given, own, *moments in zip(
                *(t.reshape(rows, -1).split(max(1, _BLOCKS // ctx.groups)) for t in tensors), strict=True
            )
        ]
        before, *of_parameters = (_joined(parts) for parts in zip(*pieces, strict=True))
        for use, rows_of in zip(ctx.uses, of_parameters, strict=True):
            if use is not None:
                use.fill(widen(rows_of).view(*inputs.shape[:2], channels))
        return before.view(inputs.shape) if wanted else None, None, None, None, None, None, None


def _joined(parts: Sequence[Any]) -> Any:
    """One tensor of several, flat; None of None."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    return torch.cat([part.flatten() for part in parts])


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        anchor: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: list[int],
        eps: float,
        uses: tuple[Rows | None, Rows | None],
    ) -> Tensor:
        result, mean, rstd = torch.native_layer_norm(inputs, shape, weight, bias, eps)
        ctx.save_for_backward(inputs, mean, rstd, weight, bias)
        ctx.shape, ctx.uses = shape, uses
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, mean, rstd, weight, bias = ctx.saved_tensors
        examples = len(inputs)
        weight_use, bias_use = ctx.uses
        gradient = gradient.contiguous()
        before = None
        if ctx.needs_input_grad[0]:
            before = torch.ops.aten.native_layer_norm_backward(
                gradient, inputs, ctx.shape, mean, rstd, weight, bias, (True, False, False)
            )[0]
        if weight_use is not None:
            centred = (inputs - mean).mul_(gradient).reshape(examples, mean.numel() // examples, -1)
            factors = rstd.to(centred.dtype).reshape(examples, 1, -1)
            weight_use.fill(widen(torch.bmm(factors, centred)))
        if bias_use is not None:
            width = bias_use.weight.numel()
            bias_use.fill(gradient.reshape(examples, -1, width))
        return before, None, None, None, None, None, None


def group_norm(
    watch: Watch,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Rule of `F.group_norm` on (rows, channels, ...)."""
    if not _natural(watch, input, weight, bias) or input.dim() < 2:
        return watch.fallback(func, input, num_groups, weight, bias, eps)
    tape, level = watch.tape, watch.level
    with level:
        uses = _uses(watch, weight, bias)
        # torch's channels-last kernel for the CPU is not used: it loses three digits of float32 (mean of
        # squares minus square of mean).
        rows = level.lower(input)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32), memory_format=torch.contiguous_format)
        result = _GroupNorm.apply(rows, tape.anchor, _plain(weight), _plain(bias), num_groups, eps, uses)
    return level.lift(result)


def instance_norm(
    watch: Watch,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Rule of `F.instance_norm`: group norm with one channel a group."""
    if not use_input_stats or running_mean is not None or input.dim() < 3:
        return watch.fallback(
            func, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    return group_norm(watch, F.group_norm, input, input.shape[1], weight, bias, eps)


def layer_norm(
    watch: Watch,
    func: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Rule of `F.layer_norm`."""
    if not _natural(watch, input, weight, bias):
        return watch.fallback(func, input, normalized_shape, weight, bias, eps)
    tape, level = watch.tape, watch.level
    with level:
        uses = _uses(watch, weight, bias)
        rows, shape = level.lower(input).contiguous(), list(normalized_shape)
        if torch.is_autocast_enabled(rows.device.type):  # which has layer norms in float32
            rows = widen(rows)
        result = _LayerNorm.apply(rows, tape.anchor, _plain(weight), _plain(bias), shape, eps, uses)
    return level.lift(result)


def rms_norm(
    watch: Watch,
    func: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Rule of `F.rms_norm`: the norm, then a gain for every example."""
    if weight is None or not _natural(watch, input, weight, None):
        return watch.fallback(func, input, normalized_shape, weight, eps)
    return F.rms_norm(input, list(normalized_shape), None, eps) * repeated(watch, weight)


def _natural(watch: Watch, inputs: Tensor, *weights: Tensor | None) -> bool:
    """Whether examples meet gains and offsets that are the same for all of them."""
    return watch.is_rows(inputs) and not any(watch.is_rows(weight) for weight in weights)


def _uses(watch: Watch, weight: Tensor | None, bias: Tensor | None) -> tuple[Rows | None, Rows | None]:
    tape = watch.tape
    first = tape.use(Rows(tape, weight)) if watch.is_weight(weight) else None  # type: ignore[arg-type]
    second = tape.use(Rows(tape, bias)) if watch.is_weight(bias) else None  # type: ignore[arg-type]
    return first, second


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


RULES: dict[Any, Rule] = {
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
}
