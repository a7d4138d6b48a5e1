"""Weights that enter by broadcasting: learned positions and tokens, gains, biases added by hand.

The weight is replaced by a view of it with one copy a row (stride 0, no memory); the ordinary backward
pass of the operation then leaves each row's own gradient in that view's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim.grads.bookkeeping.mode import Rule, Watch, tensors_in
from fedsim.grads.bookkeeping.tape import Rows, Tape, Unsupported, Use


class BlockUse(Use):
    """Use of a weight (B * K, ...) that has a part of its own for every row."""

    def fill(self, gradients: Tensor) -> None:
        """Take the gradient, of the weight's shape."""
        self._gradients = gradients
        self.tape.arrived(self)

    def squares(self) -> Tensor:
        """Not used: such a weight is always computed from parameters."""
        raise Unsupported("a weight with a part for every row")

    def rows(self, low: int, high: int) -> Tensor:
        """See `Use.rows`."""
        views = self.tape.views
        result = self._gradients.new_zeros((high - low, *self.weight.shape))
        for example in range(low, high):
            own = slice(example * views, (example + 1) * views)
            result[example - low, own] = self._gradients[own]
        return result

    def weighted(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Use.weighted`."""
        factors = coefficients.repeat_interleave(self.tape.views).to(self._gradients.dtype)
        return self._gradients * factors.view(-1, *[1] * (self._gradients.dim() - 1))


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, use: Rows | BlockUse, shape: tuple[int, ...], count: int) -> Tensor:
        ctx.use = use
        return use.weight.detach().reshape(shape).expand(count, *shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.use.fill(gradient)
        return None, None, None, None


def as_rows(watch: Watch, weight: Tensor, count: int, dims: int) -> Tensor:
    """Return `weight` with one copy for each of `count` rows, ready to meet rows of `dims` axes.

    Raises:
        Unsupported: the weight does not broadcast along the first axis.
    """
    tape: Tape = watch.tape
    if dims < 1 or count % tape.batch or weight.dim() > dims:
        raise Unsupported(f"a weight {tuple(weight.shape)} meets a tensor without examples on the first axis")
    base = watch.base(weight)
    if weight.dim() == dims and weight.shape[0] != 1:
        if weight.shape[0] != count:
            raise Unsupported(f"a weight {tuple(weight.shape)} lies along the axis of {count} rows")
        if base is None or not watch.is_weight(base):
            if count != tape.batch:
                raise Unsupported("a weight with a part for every row meets several rows a view")
            return _Repeat.apply(tape.anchor, tape.use(BlockUse(tape, weight)), tuple(weight.shape), count)
        weight = base
    own = tuple(weight.shape[1:]) if weight.dim() == dims else tuple(weight.shape)
    shape = (1,) * (dims - len(own)) + own
    return _Repeat.apply(tape.anchor, tape.use(Rows(tape, weight)), shape, count)


def elementwise(watch: Watch, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Rule of operations that broadcast their arguments against each other."""
    rows = [value for value in tensors_in((*args, *kwargs.values())) if watch.is_rows(value)]
    widest = max(rows, key=lambda value: value.dim())

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            if watch.is_weight(value) and widest.dim() > 0:
                return as_rows(watch, value, widest.shape[0], widest.dim())
            return value
        if isinstance(value, list | tuple):
            return [convert(part) for part in value]
        return value

    if widest.dim() == 0:
        raise Unsupported("a weight meets a number computed from all examples")
    return func(*map(convert, args), **{name: convert(value) for name, value in kwargs.items()})


def concatenate(watch: Watch, func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    """Rule of `torch.cat` and `torch.stack`, along any axis but that of the examples."""
    dims = tensors[0].dim()
    if dim % (dims + (func is torch.stack)) == 0:
        raise Unsupported("a weight is joined to rows along the axis of the examples")
    return elementwise(watch, func, tensors, dim=dim, **kwargs)


_NAMES = [
    "add",
    "sub",
    "mul",
    "div",
    "true_divide",
    "rsub",
    "pow",
    "maximum",
    "minimum",
    "where",
    "lerp",
    "addcmul",
    "addcdiv",
    "subtract",
    "multiply",
    "divide",
    "add_",
    "sub_",
    "mul_",
    "div_",
    "lerp_",
    "addcmul_",
    "addcdiv_",
    "__add__",
    "__radd__",
    "__sub__",
    "__rsub__",
    "__mul__",
    "__rmul__",
    "__truediv__",
    "__rtruediv__",
    "__pow__",
    "__rpow__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
]

RULES: dict[Any, Rule] = {
    getattr(home, name): elementwise for home in (torch, Tensor) for name in _NAMES if hasattr(home, name)
} | {
    torch.cat: concatenate,
    torch.concat: concatenate,
    torch.concatenate: concatenate,
    torch.stack: concatenate,
}
