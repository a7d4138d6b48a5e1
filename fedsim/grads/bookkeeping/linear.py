"""Linear layers and products with a weight matrix: keep, Gram matrix, or closed form.

The gradient of one example is sum_t g_t x_t' over its positions t (places and views). Its squared norm is
|x|^2 |g|^2 for one position; <X X', G G'> over positions by positions matrices, without the gradient itself
(Li et al. 2022, "ghost clipping"); or that of the product G' X.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.grads.bookkeeping import choose
from fedsim.grads.bookkeeping.mode import Rule, Watch
from fedsim.grads.bookkeeping.precision import batch_product, product
from fedsim.grads.bookkeeping.tape import Rows, Tape, Unsupported, Use, squared_norms

_CACHE = 2**21  # bytes of inputs to multiply and measure at a time on a CPU
_NARROW = range(8, 16)  # outputs that fill no vector register: heads of 10 classes


class LinearUse(Use):
    """Use of a weight (out, in), or (in, out) if `transposed`, on rows (n, ..., in)."""

    def __init__(self, tape: Tape, weight: Tensor, positions: int, transposed: bool) -> None:
        super().__init__(tape, weight)
        self._transposed = transposed
        width_in, width_out = weight.shape if transposed else weight.shape[::-1]
        self.lengths: Tensor | None = None
        self.plan = choose.linear(tape, positions, width_in, width_out, weight.element_size())

    def fill(self, inputs: Tensor, gradient: Tensor) -> None:
        """Take the operation's input (n, ..., in) and output gradient (n, ..., out)."""
        self._left = self.tape.positions(inputs if self._transposed else gradient)
        self._right = self.tape.positions(gradient if self._transposed else inputs)
        self._kept: Tensor | None = None
        self.tape.arrived(self)

    def squares(self) -> Tensor:
        """See `Use.squares`."""
        if self.plan == "closed":
            inputs, gradient = self._right, self._left
            if self._transposed:
                inputs, gradient = gradient, inputs
            lengths = squared_norms(inputs[:, 0]) if self.lengths is None else self.lengths
            return lengths * squared_norms(gradient[:, 0])
        if self.plan == "keep":
            self._kept = self.rows(0, self.tape.examples)
            del self._left, self._right
            return squared_norms(self._kept)
        count, positions = self._left.shape[:2]
        per_example = positions**2 * 8 if self.plan == "gram" else self.weight.numel() * 4
        step = max(1, self.tape.scratch // per_example)
        parts = []
        for low in range(0, count, step):
            part = slice(low, low + step)
            if self.plan == "gram":
                left, right = self._left[part], self._right[part]
                first = batch_product(left, left.transpose(1, 2))
                second = batch_product(right, right.transpose(1, 2))
                parts.append(first.mul_(second).sum(2).double().sum(1))
            else:
                parts.append(squared_norms(self.rows(low, min(low + step, count))))
        return torch.cat(parts).clamp(min=0.0)

    def rows(self, low: int, high: int) -> Tensor:
        """See `Use.rows`."""
        return batch_product(self._left[low:high].transpose(1, 2), self._right[low:high])

    def weighted(self, coefficients: Tensor) -> Tensor:
        """See `Use.weighted`."""
        if self._kept is not None:
            return (coefficients.to(self._kept.dtype) @ self._kept.flatten(1)).view(self.weight.shape)
        left, right = self._left, self._right
        factors = coefficients.view(-1, 1, 1)
        if left.shape[2] <= right.shape[2]:
            left = left * factors.to(left.dtype)
        else:
            right = right * factors.to(right.dtype)
        return product(left.flatten(0, 1).t(), right.flatten(0, 1))


def _forward(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Put F.linear of rows (n, in) into `out`, the other way round where that is a third faster on a CPU."""
    if len(weight) in _NARROW:
        out.copy_((weight @ rows.t() if bias is None else torch.addmm(bias[:, None], weight, rows.t())).t())
    elif bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


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
        if inputs.dim() == 2 and not inputs.is_cuda:
            result = inputs.new_empty((len(inputs), len(weight)))
            if weight_use is None or weight_use.plan != "closed":
                _forward(inputs, weight, bias, result)
                return result
            rows = max(1, _CACHE // max(1, inputs.shape[1] * inputs.element_size()))
            lengths = []
            for block, out in zip(inputs.split(rows), result.split(rows), strict=True):
                _forward(block, weight, bias, out)
                lengths.append(squared_norms(block))  # while the block is in the cache
            weight_use.lengths = torch.cat(lengths)
            return result
        flat = F.linear(inputs.flatten(0, -2), weight, bias)
        # A plain view would forbid the model to work on the result in place.
        return torch.ops.aten._unsafe_view(flat, [*inputs.shape[:-1], flat.shape[1]])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        weight_use, bias_use = ctx.uses
        before = gradient @ weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        if weight_use is not None:
            weight_use.fill(inputs, gradient)
        if bias_use is not None:
            bias_use.fill(gradient)
        return before, None, None, None, None, None


def linear(watch: Watch, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rule of `F.linear`."""
    return _apply(watch, input, weight, bias, transposed=False)


def matmul(watch: Watch, func: Any, input: Tensor, other: Tensor) -> Tensor:
    """Rule of `rows @ weight` for a weight matrix; other products go to the fallback."""
    if not watch.is_rows(input) or not watch.is_weight(other) or other.dim() != 2:
        return watch.fallback(func, input, other)
    return _apply(watch, input, other, None, transposed=True)


def addmm(watch: Watch, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: float) -> Tensor:
    """Rule of `bias + rows @ weight`."""
    if scales or not watch.is_rows(mat1) or not watch.is_weight(mat2) or input.dim() != 1:
        return watch.fallback(func, input, mat1, mat2, **scales)
    return _apply(watch, mat1, mat2, input, transposed=True)


def _apply(watch: Watch, inputs: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    tape = watch.tape
    if watch.is_rows(weight) or watch.is_rows(bias) or not watch.is_rows(inputs):
        raise Unsupported("a linear layer takes a weight computed from examples")
    if inputs.dim() < 2 or inputs.shape[0] % tape.batch:
        raise Unsupported(
            f"a linear layer gets shape {tuple(inputs.shape)}, without examples on the first axis"
        )
    weight_use = bias_use = None
    if watch.is_weight(weight):
        positions = inputs[..., 0].numel() // tape.examples
        weight_use = tape.use(LinearUse(tape, weight, positions, transposed))
    if bias is not None and watch.is_weight(bias):
        bias_use = tape.use(Rows(tape, bias))
    matrix = weight.detach().t() if transposed else weight.detach()
    offset = None if bias is None else bias.detach()
    return _Linear.apply(inputs, tape.anchor, matrix, offset, weight_use, bias_use)


RULES: dict[Any, Rule] = {
    F.linear: linear,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    torch.mm: matmul,
    Tensor.mm: matmul,
    torch.addmm: addmm,
}
