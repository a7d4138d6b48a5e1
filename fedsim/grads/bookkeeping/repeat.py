"""Operations without a rule: the weight is repeated for every example.

The operation gets a copy of the weight that carries examples (without memory of its own), so that vmap does
with it what it does with the inputs, and autograd leaves the gradient of every example's copy. Right for any
operation that vmap can do. It takes one gradient an example in memory.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedsim.grads.bookkeeping.mode import Watch
from fedsim.grads.bookkeeping.tape import Rows

_log = logging.getLogger(__name__)
_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()

# Broadcasting and joining, where a copy is what any rule would take: nothing to tell.
_NAMES = (
    "add sub mul div true_divide subtract multiply divide pow maximum minimum where lerp addcmul addcdiv "
    "radd rsub rmul rtruediv rpow iadd isub imul itruediv truediv eq ne lt le gt ge cat concat concatenate "
    "stack setitem"
)
_PLAIN = set(_NAMES.split())


def tell_once(model: nn.Module, line: str) -> None:
    """Log a line, once a model."""
    told = _told.setdefault(model, set())
    if line not in told:
        told.add(line)
        _log.warning("%s", line)


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, use: Rows, examples: int) -> Tensor:
        ctx.use = use
        return use.weight.detach().expand(examples, *use.weight.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.use.fill(gradient)
        return None, None, None


def repeated(watch: Watch, weight: Tensor) -> Tensor:
    """Return `weight` as a tensor of its shape that carries examples, and record that use."""
    tape = watch.tape
    use = tape.use(Rows(tape, weight))
    with watch.level:
        copies = _Repeat.apply(tape.anchor, use, tape.examples)
    return watch.level.lift(copies)


def generic(watch: Watch, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Rule of every operation that has no other."""
    flat, layout = pytree.tree_flatten((args, kwargs))
    weights = [index for index, value in enumerate(flat) if watch.is_weight(value)]
    name = getattr(func, "__name__", str(func))
    if name.strip("_") not in _PLAIN:
        names = sorted({watch.tape.names[id(p)] for i in weights for p in watch.tape.parameters_of(flat[i])})
        owner = watch.tape.owners[id(watch.tape.parameters_of(flat[weights[0]])[0])]
        tell_once(
            watch.tape.model,
            f"per-example gradients of {', '.join(names)} come from vmap: operation {name} of "
            f"{type(owner).__name__} has no rule of its own.",
        )
    for index in weights:
        flat[index] = repeated(watch, flat[index])
    positional, named = pytree.tree_unflatten(flat, layout)
    return func(*positional, **named)
