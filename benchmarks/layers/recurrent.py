"""Recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.layers.case import (
    Call,
    Case,
    classified,
    numbers,
)


def recurrent() -> Iterator[Case]:
    """Recurrent layers and cells."""
    group = "recurrent"
    variants: dict[str, dict[str, object]] = {
        "": {},
        ", two layers": {"num_layers": 2},
        ", both directions": {"bidirectional": True},
        ", two layers, both directions, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
    }
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        for name, given in variants.items():
            yield classified(
                group,
                f"{kind.__name__}{name}",
                lambda kind=kind, given=given: kind(4, 5, batch_first=True, **given),
                numbers(6, 4),
            )
        yield classified(
            group,
            f"{kind.__name__}, time first",
            lambda kind=kind: Call(
                lambda m, x: m.layer(x.transpose(0, 1))[0].transpose(0, 1), layer=kind(4, 5)
            ),
            numbers(6, 4),
        )
    yield classified(
        group, "RNN, ReLU", lambda: nn.RNN(4, 5, nonlinearity="relu", batch_first=True), numbers(6, 4)
    )
    yield classified(
        group, "LSTM, projection", lambda: nn.LSTM(4, 5, proj_size=3, batch_first=True), numbers(6, 4)
    )
    yield classified(
        group,
        "LSTM, projection, two layers, both directions",
        lambda: nn.LSTM(4, 5, 2, proj_size=3, bidirectional=True, batch_first=True),
        numbers(6, 4),
    )

    def started(m: nn.Module, x: Tensor) -> Tensor:
        start = m.start.expand(1, len(x), 5).contiguous()
        return m.layer(x, (start, torch.zeros_like(start)))[0]

    yield classified(
        group,
        "LSTM, learned start state",
        lambda: Call(
            started, layer=nn.LSTM(4, 5, batch_first=True), start=nn.Parameter(torch.randn(1, 1, 5))
        ),
        numbers(6, 4),
    )

    def packed(m: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return m.layer(sequence)[1][-1]

    yield classified(
        group,
        "GRU on packed sequences",
        lambda: Call(packed, layer=nn.GRU(4, 5, batch_first=True)),
        lambda examples, views: {
            "x": numbers(6, 4)(examples, views),
            "lengths": torch.randint(2, 7, (examples, views)),
        },
    )

    def stepped(m: nn.Module, x: Tensor) -> Tensor:
        state = None
        for moment in x.unbind(1):
            state = m.cell(moment, state)
        return state if isinstance(state, Tensor) else state[0]

    for name, cell in (
        ("RNNCell", lambda: nn.RNNCell(4, 5)),
        ("RNNCell, ReLU, no bias", lambda: nn.RNNCell(4, 5, bias=False, nonlinearity="relu")),
        ("LSTMCell", lambda: nn.LSTMCell(4, 5)),
        ("GRUCell", lambda: nn.GRUCell(4, 5)),
    ):
        yield classified(group, name, lambda cell=cell: Call(stepped, cell=cell()), numbers(6, 4))
