"""Operations without a rule: per-example gradients by `torch.func.vmap` over that operation alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils import _pytree as pytree

from fedsim.grads.bookkeeping.mode import Watch
from fedsim.grads.bookkeeping.tape import Rows, Unsupported

_log = logging.getLogger(__name__)
_told: set[tuple[str, ...]] = set()


def tell_once(*parts: str) -> None:
    """Log a line of `parts`, once a process."""
    if parts not in _told:
        _told.add(parts)
        _log.warning("%s", " ".join(parts))


class _Generic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        call: Callable[..., Tensor],
        weights: tuple[Tensor, ...],
        uses: tuple[Rows, ...],
        examples: int,
        *rows: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*rows)
        ctx.call, ctx.weights, ctx.uses, ctx.examples = call, weights, uses, examples
        return call(weights, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights = ctx.saved_tensors, ctx.weights
        call = ctx.call
        moving = [index for index, tensor in enumerate(rows) if tensor.is_floating_point()]

        def pull(own: tuple[Tensor, ...], own_gradient: Tensor) -> tuple[Any, Any]:
            def function(values: tuple[Tensor, ...], floats: tuple[Tensor, ...]) -> Tensor:
                filled = list(own)
                for index, value in zip(moving, floats, strict=True):
                    filled[index] = value
                return call(values, tuple(filled))

            pulled: Any = vjp(function, weights, tuple(own[index] for index in moving))
            return pulled[1](own_gradient)

        def by_example(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (ctx.examples, -1))

        for_weights, for_rows = vmap(pull, randomness="error")(
            tuple(map(by_example, rows)), by_example(gradient)
        )
        for use, rows_of in zip(ctx.uses, for_weights, strict=True):
            use.fill(rows_of)
        before: list[Tensor | None] = [None] * len(rows)
        for index, tensor in zip(moving, for_rows, strict=True):
            before[index] = tensor.flatten(0, 1)
        return None, None, None, None, None, *before


def generic(watch: Watch, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Rule of every operation that has no other: one tensor out, examples on the first axis throughout."""
    tape = watch.tape
    flat, layout = pytree.tree_flatten((args, kwargs))
    weight_at = [i for i, value in enumerate(flat) if watch.is_weight(value)]
    rows_at = [i for i, value in enumerate(flat) if isinstance(value, Tensor) and watch.is_rows(value)]
    name = getattr(func, "__name__", str(func))
    if (name.endswith("_") and not name.endswith("__")) or "out" in kwargs:
        raise Unsupported(f"operation {name} writes into its argument")
    if any(flat[i].dim() < 1 or flat[i].shape[0] % tape.batch for i in rows_at):
        raise Unsupported(f"operation {name} gets a tensor without examples on the first axis")

    def call(weights: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> Tensor:
        filled = list(flat)
        for places, values in ((weight_at, weights), (rows_at, rows)):
            for place, value in zip(places, values, strict=True):
                filled[place] = value
        positional, named = pytree.tree_unflatten(filled, layout)
        return func(*positional, **named)

    weights = tuple(flat[i].detach() for i in weight_at)
    with torch.no_grad():
        probe = call(weights, tuple(flat[i].detach() for i in rows_at))
    if not isinstance(probe, Tensor) or not probe.is_floating_point():
        return probe
    if probe.dim() < 1 or probe.shape[0] % tape.batch:
        raise Unsupported(f"operation {name} returns a tensor without examples on the first axis")
    uses = tuple(tape.use(Rows(tape, flat[i])) for i in weight_at)
    names = sorted({tape.names[id(p)] for use in uses for p in use.leaves})
    tell_once(
        f"per-example gradients of {', '.join(names)} come from vmap:",
        f"operation {name} of {type(tape.owners[id(uses[0].leaves[0])]).__name__}",
        "has no rule of its own.",
    )
    return _Generic.apply(tape.anchor, call, weights, uses, tape.examples, *(flat[i] for i in rows_at))
