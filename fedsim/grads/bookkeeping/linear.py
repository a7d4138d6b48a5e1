"""Linear layers and products with a weight matrix: keep, Gram matrix, or closed form.

The gradient of one example is sum_t g_t x_t' over its positions t (places and views). Its squared norm is
|x|^2 |g|^2 for one position; <X X', G G'> over positions by positions matrices, without the gradient itself
(Li et al. 2022, "ghost clipping"); or that of the product G' X.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.grads.bookkeeping import choose, gram
from fedsim.grads.bookkeeping.mode import Rule, Watch
from fedsim.grads.bookkeeping.precision import (
    affine,
    batch_product,
    product,
    squared_norms,
    under_autocast,
    widen,
)
from fedsim.grads.bookkeeping.tape import Rows, Tape, Use


class LinearUse(Use):
    """Use of a weight (out, in), or (in, out) if `transposed`, on rows (n, ..., in)."""

    def __init__(self, tape: Tape, weight: Tensor, positions: int, transposed: bool) -> None:
        super().__init__(tape, weight)
        self._transposed = transposed
        width_in, width_out = weight.shape if transposed else weight.shape[::-1]
        self.positions = positions
        self.plan = choose.linear(tape, positions, width_in, width_out, weight.element_size())
        # Matrices of at most a third of the inputs are formed in the forward pass, with those at hand.
        entries = tape.examples * positions**2
        self._early = self.plan == "gram" and 3 * positions <= width_in and 8 * entries <= tape.scratch
        self._early = self._early and tape.reserve(entries * weight.element_size(), 0)
        self._lengths: Tensor | None = None
        self._kept: Tensor | None = None
        self._gram: list[Tensor] | None = None

    def see(self, rows: Tensor) -> None:
        """Take what the norms need of the input rows (B * positions, in), where that is little."""
        if self.plan == "closed":
            self._lengths = squared_norms(rows)
        elif self._early:
            self._gram = gram.strips(rows.unflatten(0, (-1, self.positions)))

    def fill(self, inputs: Tensor, gradient: Tensor) -> None:
        """Take the operation's input (n, ..., in) and output gradient (n, ..., out)."""
        self._left = self.tape.positions(inputs if self._transposed else gradient)
        self._right = self.tape.positions(gradient if self._transposed else inputs)
        self.tape.arrived(self)

    def squares(self) -> Tensor:
        """See `Use.squares`."""
        inputs, gradient = self._right, self._left
        if self._transposed:
            inputs, gradient = gradient, inputs
        if self.plan == "closed":
            lengths = squared_norms(inputs[:, 0]) if self._lengths is None else self._lengths
            return lengths * squared_norms(gradient[:, 0])
        if self.plan == "keep":
            self._kept = self.rows(0, self.tape.examples)
            del self._left, self._right
            return squared_norms(self._kept)
        if self.plan == "drop":
            return torch.cat([squared_norms(rows) for _, rows in self._formed()])
        widths = gram.length(inputs.shape[2]), gram.length(gradient.shape[2])
        if self._gram is not None:
            pairs = zip(self._gram, gram.strips(gradient), strict=True)
            found, self.doubt = gram.inner(pairs, widths)
            return found
        step = max(1, self.tape.scratch // (self.positions**2 * 8))
        parts = [
            gram.inner(zip(gram.strips(ours), gram.strips(theirs), strict=True), widths)
            for ours, theirs in zip(inputs.split(step), gradient.split(step), strict=True)
        ]
        found, self.doubt = (torch.cat(part) for part in zip(*parts, strict=True))
        return found

    def _formed(self) -> Iterator[tuple[slice, Tensor]]:
        """Gradients of all examples, some at a time, the same in every bit whenever they are formed."""
        step, count = max(1, self.tape.scratch // (self.weight.numel() * 4)), self.tape.examples
        for low in range(0, count, step):
            own = slice(low, min(low + step, count))
            yield own, self.rows(own.start, own.stop)

    def terms(self) -> Tensor:
        """See `Use.terms`."""
        left, right = (torch.linalg.vector_norm(widen(t), dim=2) for t in (self._left, self._right))
        return (left * right).double().sum(1)

    def rows(self, low: int, high: int) -> Tensor:
        """See `Use.rows`."""
        if self._kept is not None:
            return self._kept[low:high]
        return batch_product(self._left[low:high].transpose(1, 2), self._right[low:high])

    def weighted(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Use.weighted`."""
        if self._kept is not None:
            row = None if out is None else out.view(1, -1)
            total = product(coefficients.to(self._kept.dtype)[None], self._kept.flatten(1), row)
            return total.view(self.weight.shape)
        if self.plan == "drop":  # another product would round in another way
            total = coefficients.new_zeros(self.weight.numel(), dtype=widen(self._left[:0]).dtype)
            for own, rows in self._formed():
                total.addmv_(rows.flatten(1).t(), coefficients[own].to(rows.dtype))
            return total.view(self.weight.shape)
        left, right = self._left, self._right
        factors = coefficients.view(-1, 1, 1)
        if left.shape[2] <= right.shape[2]:
            left = widen(left)
            left = left * factors.to(left.dtype)
        else:
            right = widen(right)
            right = right * factors.to(right.dtype)
        return product(left.flatten(0, 1).t(), right.flatten(0, 1), out)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_use: LinearUse | None,
        bias_use: Rows | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs if weight_use is not None else None, weight)
        ctx.uses = weight_use, bias_use
        rows = inputs.flatten(0, -2)
        if weight_use is not None and not weight_use.tape.reduced:  # else norms would lose digits here
            weight_use.see(rows)
        flat = affine(rows, weight, bias)
        # A plain view would forbid the model to work on the result in place.
        shape = [*inputs.shape[:-1], flat.shape[1]]
        return flat if inputs.dim() == 2 else torch.ops.aten._unsafe_view(flat, shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        weight_use, bias_use = ctx.uses
        before = None
        if ctx.needs_input_grad[0]:
            before = affine(gradient.flatten(0, -2), weight.to(gradient.dtype).t())
            before = before.view(*gradient.shape[:-1], -1)
        if weight_use is not None:
            weight_use.fill(inputs, gradient)
        if bias_use is not None:
            bias_use.fill(gradient)
        return before, None, None, None, None, None


def linear(watch: Watch, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rule of `F.linear`."""
    if not watch.is_rows(input) or any(watch.is_rows(t) for t in (weight, bias)) or weight.dim() != 2:
        return watch.fallback(func, input, weight, bias)
    return _apply(watch, input, weight, bias, transposed=False)


def matmul(watch: Watch, func: Any, input: Tensor, other: Tensor) -> Tensor:
    """Rule of `rows @ weight` for a weight matrix; other products go to the fallback."""
    if not watch.is_rows(input) or not watch.is_weight(other) or other.dim() != 2:
        return watch.fallback(func, input, other)
    return _apply(watch, input, other, None, transposed=True)


def addmm(watch: Watch, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: float) -> Tensor:
    """Rule of `bias + rows @ weight`."""
    fits = watch.is_rows(mat1) and watch.is_weight(mat2) and not watch.is_rows(input)
    if scales or not fits or input.dim() != 1:
        return watch.fallback(func, input, mat1, mat2, **scales)
    return _apply(watch, mat1, mat2, input, transposed=True)


def _apply(watch: Watch, inputs: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    tape, level = watch.tape, watch.level
    weight_use = bias_use = None
    with level:
        rows = under_autocast(level.lower(inputs))
        if watch.is_weight(weight):
            positions = math.prod(rows.shape[1:-1])
            weight_use = tape.use(LinearUse(tape, weight, positions, transposed))
        if bias is not None and watch.is_weight(bias):
            bias_use = tape.use(Rows(tape, bias))
        matrix = under_autocast(weight.detach())
        matrix = matrix.t() if transposed else matrix
        offset = None if bias is None else bias.detach()
        result = _Linear.apply(rows, tape.anchor, matrix, offset, weight_use, bias_use)
    return level.lift(result)


RULES: dict[Any, Rule] = {
    F.linear: linear,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    torch.mm: matmul,
    Tensor.mm: matmul,
    torch.addmm: addmm,
}
