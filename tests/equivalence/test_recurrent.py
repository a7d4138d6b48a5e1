"""Recurrent layers and cells of torch.nn against one example at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.grads import FlatClip
from fedsim.grads.bookkeeping import clipped_sum


class Layer(nn.Module):
    """All outputs but the last step's, and the last states."""

    def __init__(self, kind: Any, first: bool = True, **options: Any) -> None:
        super().__init__()
        self.layer, self.first = kind(5, 4, batch_first=first, **options), first

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, last = self.layer(inputs if self.first else inputs.transpose(0, 1))
        outputs = outputs if self.first else outputs.transpose(0, 1)
        states = (last,) if isinstance(last, Tensor) else last
        ends = [state.transpose(0, 1).flatten(1) for state in states]
        return torch.cat([outputs[:, :-1].flatten(1), *ends], dim=1)


class FirstStepOnly(nn.Module):
    """Most steps get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(5, 4, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)[0][:, 1]


class Cell(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.cell = kind(5, 4, **options)

    def forward(self, inputs: Tensor) -> Tensor:
        state = None
        for step in inputs.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return state[0] + state[1] if isinstance(state, tuple) else state


CASES = {
    "lstm": lambda: Layer(nn.LSTM),
    "lstm, two layers, both directions, places first": lambda: Layer(
        nn.LSTM, False, num_layers=2, bidirectional=True
    ),
    "lstm with projections": lambda: Layer(nn.LSTM, proj_size=3, num_layers=2),
    "lstm with projections, without biases": lambda: Layer(nn.LSTM, proj_size=2, bias=False),
    "gru": lambda: Layer(nn.GRU),
    "gru, two layers, both directions, without biases": lambda: Layer(
        nn.GRU, num_layers=2, bidirectional=True, bias=False
    ),
    "rnn": lambda: Layer(nn.RNN),
    "rnn with relu": lambda: Layer(nn.RNN, nonlinearity="relu", num_layers=2),
    "first steps only": FirstStepOnly,
    "lstm cell": lambda: Cell(nn.LSTMCell),
    "gru cell": lambda: Cell(nn.GRUCell),
    "rnn cell": lambda: Cell(nn.RNNCell, nonlinearity="relu"),
}


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets[:, None]).square().sum(1)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_example_at_a_time(case: str, dtype: torch.dtype, views: int) -> None:
    torch.manual_seed(4)
    model = CASES[case]().to(dtype)
    inputs, targets = torch.randn(4, views, 6, 5, dtype=dtype), torch.randn(4, dtype=dtype)
    parameters = list(model.parameters())
    rows = []
    for own, target in zip(inputs, targets, strict=True):
        found = torch.autograd.grad(loss(model(own), target.expand(views)).mean(), parameters)
        rows.append(torch.cat([part.flatten() for part in found]))
    gradients = torch.stack(rows)
    lengths = gradients.double().norm(dim=1)
    clip = FlatClip(float(lengths.median()))
    total, norms, _ = clipped_sum(model, inputs, targets, loss, clip)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(norms, lengths, rtol=tolerance, atol=0.0)
    expected = clip.coefficients(lengths).to(dtype) @ gradients
    assert (total - expected).norm() <= tolerance * expected.norm()
