"""Recurrent layers and cells: linear layers, of which the one on the state is used at every step.

The steps of a layer share one use of the state's weight: an example's gradient is the sum over steps of
output gradient times state, as over the positions of any linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.grads.bookkeeping.linear import LinearUse, linear
from fedsim.grads.bookkeeping.mode import Rule, Watch
from fedsim.grads.bookkeeping.precision import affine
from fedsim.grads.bookkeeping.tape import Rows, Unsupported

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]
"""(input part (rows, gates), state part, state) -> new state, the first of which is the output."""


def _lstm(ahead: Tensor, back: Tensor, state: State) -> State:
    entry, forget, candidate, leave = (ahead + back).chunk(4, dim=-1)
    memory = forget.sigmoid() * state[1] + entry.sigmoid() * candidate.tanh()
    return leave.sigmoid() * memory.tanh(), memory


def _gru(ahead: Tensor, back: Tensor, state: State) -> State:
    reset, update, candidate = ahead.chunk(3, dim=-1)
    own_reset, own_update, own_candidate = back.chunk(3, dim=-1)
    mixed = (candidate + (reset + own_reset).sigmoid() * own_candidate).tanh()
    return (mixed + (update + own_update).sigmoid() * (state[0] - mixed),)


def _tanh(ahead: Tensor, back: Tensor, state: State) -> State:
    return ((ahead + back).tanh(),)


def _relu(ahead: Tensor, back: Tensor, state: State) -> State:
    return ((ahead + back).relu(),)


class _Steps:
    """The uses of one weight and bias by `count` steps, filled together after the backward pass."""

    def __init__(self, watch: Watch, weight: Tensor, bias: Tensor | None, rows: int, count: int) -> None:
        tape = watch.tape
        self.watch = watch
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self._weight_use = self._bias_use = None
        if watch.is_weight(weight):
            self._weight_use = tape.use(LinearUse(tape, weight, rows * count, transposed=False))
        if bias is not None and watch.is_weight(bias):
            self._bias_use = tape.use(Rows(tape, bias))
        self._arrived: list[tuple[Tensor, Tensor]] = []
        self._count = count
        tape.after_backward.append(self.fill)

    def __call__(self, state: Tensor) -> Tensor:
        """The linear layer on the state (rows, width) of one step."""
        level = self.watch.level
        with level:
            rows = level.lower(state)
            if not level.carries(state):
                rows = rows.expand(self.watch.tape.examples, *rows.shape)
            result = _Step.apply(rows, self.watch.tape.anchor, self)
        return level.lift(result)

    def arrive(self, state: Tensor, gradient: Tensor) -> None:
        """Take a step's input and output gradient, (B, rows, ...)."""
        self._arrived.append((state, gradient))

    def fill(self) -> None:
        """Fill the uses with all steps; those that no output depends on have a gradient of zero."""
        if not self._arrived:
            return
        state, gradient = self._arrived[0]
        blank = [(torch.zeros_like(state), torch.zeros_like(gradient))] * (self._count - len(self._arrived))
        states, gradients = (torch.stack(list(t), dim=1) for t in zip(*self._arrived, *blank, strict=True))
        self._arrived.clear()
        if self._weight_use is not None:
            self._weight_use.fill(states, gradients)
        if self._bias_use is not None:
            self._bias_use.fill(gradients)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, anchor: Tensor, steps: _Steps) -> Tensor:
        ctx.save_for_backward(state)
        ctx.steps = steps
        flat = affine(state.flatten(0, -2), steps.weight, steps.bias)
        return torch.ops.aten._unsafe_view(flat, (*state.shape[:-1], flat.shape[1]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (state,) = ctx.saved_tensors
        ctx.steps.arrive(state, gradient)
        before = gradient @ ctx.steps.weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return before, None, None


def _layer(cell: Cell) -> Rule:
    def rule(
        watch: Watch,
        func: Any,
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Any,
        has_biases: Any,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool = False,
    ) -> tuple[Tensor, ...]:
        if isinstance(params, bool) or not isinstance(has_biases, bool) or (dropout and train):
            raise Unsupported("a recurrent layer on a packed sequence, or with dropout")
        start = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        steps = input.transpose(0, 1) if batch_first else input
        directions = 2 if bidirectional else 1
        each = len(params) // (num_layers * directions)
        last: list[State] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                place = layer * directions + direction
                own = params[place * each : (place + 1) * each]
                state = tuple(part[place] for part in start)
                output, final = _run(watch, cell, steps, state, own, has_biases, reverse=direction == 1)
                outputs.append(output)
                last.append(final)
            steps = torch.cat(outputs, dim=-1) if bidirectional else outputs[0]
        finals = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return (steps.transpose(0, 1) if batch_first else steps), *finals

    return rule


def _run(
    watch: Watch,
    cell: Cell,
    inputs: Tensor,
    state: State,
    weights: Sequence[Tensor],
    biases: bool,
    reverse: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction over inputs (steps, rows, in)."""
    first, second, *rest = weights
    ahead_bias, back_bias = (rest[0], rest[1]) if biases else (None, None)
    projection = rest[-1] if len(rest) % 2 else None
    count, rows = inputs.shape[:2]
    ahead = _affine(watch, inputs, first, ahead_bias)
    back = _Steps(watch, second, back_bias, rows, count)
    projected = None if projection is None else _Steps(watch, projection, None, rows, count)
    outputs = []
    for place in reversed(range(count)) if reverse else range(count):
        state = cell(ahead[place], back(state[0]), state)
        if projected is not None:
            state = (projected(state[0]), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _affine(watch: Watch, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if watch.is_rows(rows) and (watch.is_weight(weight) or watch.is_weight(bias)):
        return linear(watch, F.linear, rows, weight, bias)
    return F.linear(rows, weight, bias)


def _cell(cell: Cell) -> Rule:
    def rule(
        watch: Watch,
        func: Any,
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | State:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        with watch:
            found = cell(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return found[0] if isinstance(hx, Tensor) else found

    return rule


_CELLS = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}
RULES: dict[Any, Rule] = {
    **{getattr(torch._VF, name): _layer(cell) for name, cell in _CELLS.items()},
    **{getattr(torch._VF, f"{name}_cell"): _cell(cell) for name, cell in _CELLS.items()},
}
