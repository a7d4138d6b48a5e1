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

_BLOCK = 512  # rows to multiply and measure at a time on a CPU, while they are in its cache
_NARROW = 512  # outputs from which one product of all rows is faster
_LANES = 16  # float32 numbers of a vector register


class LinearUse(Use):
    """Use of a weight (out, in), or (in, out) if `transposed`, on rows (n, ..., in)."""

    def __init__(self, tape: Tape, weight: Tensor, positions: int, transposed: bool) -> None:
        super().__init__(tape, weight)
        self._transposed = transposed
        width_in, width_out = weight.shape if transposed else weight.shape[::-1]
        self.positions = positions
        self.plan = choose.linear(tape, positions, width_in, width_out, weight.element_size())
        self._early = self.plan == "closed" or (self.plan == "gram" and 8 * positions <= width_in)
        self._seen: list[Tensor] = []

    def see(self, rows: Tensor) -> None:
        """Take what the norms need of the next examples' input rows (n * positions, in), if that is little."""
        if self.plan == "closed":
            self._seen.append(squared_norms(rows))
        elif self._early:
            inputs = rows.unflatten(0, (-1, self.positions))
            self._seen.append(_gram(inputs))

    def fill(self, inputs: Tensor, gradient: Tensor) -> None:
        """Take the operation's input (n, ..., in) and output gradient (n, ..., out)."""
        self._left = self.tape.positions(inputs if self._transposed else gradient)
        self._right = self.tape.positions(gradient if self._transposed else inputs)
        self._kept: Tensor | None = None
        self.tape.arrived(self)

    def squares(self) -> Tensor:
        """See `Use.squares`."""
        inputs, gradient = self._right, self._left
        if self._transposed:
            inputs, gradient = gradient, inputs
        if self.plan == "closed":
            return torch.cat(self._seen) * squared_norms(gradient[:, 0])
        if self.plan == "keep":
            self._kept = self.rows(0, self.tape.examples)
            del self._left, self._right
            return squared_norms(self._kept)
        count, positions = self._left.shape[:2]
        per_example = positions**2 * 8 if self.plan == "gram" else self.weight.numel() * 4
        step = max(1, self.tape.scratch // per_example)
        seen = torch.cat(self._seen) if self._seen else None
        parts = []
        for low in range(0, count, step):
            part = slice(low, low + step)
            if self.plan == "gram":
                if seen is None:
                    parts.append(_inner_of_grams(inputs[part], gradient[part]))
                else:
                    parts.append(_inner(_gram(gradient[part]), seen[part]))
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


def _gram(rows: Tensor) -> Tensor:
    """Inner products (n, positions, positions) of rows (n, positions, width)."""
    return batch_product(rows, rows.transpose(1, 2))


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Inner products (n,) in float64 of matrices (n, a, b), the first of which is overwritten."""
    return first.mul_(second).sum(2).double().sum(1)


def _inner_of_grams(inputs: Tensor, gradient: Tensor) -> Tensor:
    """Inner products (n,) in float64 of the Gram matrices of rows (n, positions, in) and (n, positions, out).

    They are symmetric: on a CPU what lies below the diagonal is not computed, in blocks of widths that make
    fast products.
    """
    count, positions = inputs.shape[:2]
    half = positions // 32 * 16
    if inputs.is_cuda or half < 32:
        return _inner(_gram(inputs), _gram(gradient))
    pair = inputs, gradient

    def blocks(rows: list[Tensor], columns: list[Tensor]) -> Tensor:
        return _inner(*(batch_product(a, b.transpose(1, 2)) for a, b in zip(rows, columns, strict=True)))

    low, high = [rows[:, :half] for rows in pair], [rows[:, half : 2 * half] for rows in pair]
    beside = 2 * blocks(low, high)
    if positions == 2 * half:
        both = [rows.reshape(2 * count, half, -1) for rows in pair]
        return beside + blocks(both, both).view(count, 2).sum(1)
    before, rest = [rows[:, : 2 * half] for rows in pair], [rows[:, 2 * half :] for rows in pair]
    return beside + blocks(low, low) + blocks(high, high) + 2 * blocks(rest, before) + blocks(rest, rest)


def _forward(rows: Tensor, weight: Tensor, bias: Tensor | None, use: LinearUse | None) -> Tensor:
    """F.linear of rows (n, in), which `use` sees too.

    On a CPU, products with few outputs are a tenth to a third faster in blocks, and turned round where the
    outputs do not fill the vector registers.
    """
    if rows.is_cuda or len(weight) >= _NARROW:
        if use is not None:
            use.see(rows)
        return F.linear(rows, weight, bias)
    result = rows.new_empty((len(rows), len(weight)))
    positions = 1 if use is None else use.positions
    size = max(positions, _BLOCK - _BLOCK % positions)
    for block, out in zip(rows.split(size), result.split(size), strict=True):
        if len(weight) % _LANES:
            turned = weight @ block.t() if bias is None else torch.addmm(bias[:, None], weight, block.t())
            out.copy_(turned.t())
        elif bias is None:
            torch.mm(block, weight.t(), out=out)
        else:
            torch.addmm(bias, block, weight.t(), out=out)
        if use is not None:
            use.see(block)
    return result


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
        flat = _forward(inputs.flatten(0, -2), weight, bias, weight_use)
        # A plain view would forbid the model to work on the result in place.
        return flat if inputs.dim() == 2 else torch.ops.aten._unsafe_view(flat, [*inputs.shape[:-1], -1])

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
