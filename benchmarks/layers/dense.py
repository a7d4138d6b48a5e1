"""Linear layers and the like."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers.case import (
    Call,
    Case,
    classified,
    labels,
    numbers,
)


def dense() -> Iterator[Case]:
    """Linear layers and the like."""
    group = "dense"
    yield Case(group, "Linear, zero", lambda: nn.Linear(5, 4), numbers(5), zero=("weight", "bias"))
    for name, body, shape in (
        ("Linear", lambda: nn.Linear(5, 7), (5,)),
        ("Linear, no bias", lambda: nn.Linear(5, 7, bias=False), (5,)),
        ("Linear at 6 positions", lambda: nn.Linear(5, 7), (6, 5)),
        ("Linear at 2 positions, wide", lambda: nn.Linear(64, 48), (2, 64)),
        ("Linear at 3 x 2 positions", lambda: nn.Linear(5, 7), (3, 2, 5)),
        ("LazyLinear, materialised", lambda: nn.LazyLinear(7), (5,)),
        ("PReLU, one slope", lambda: nn.Sequential(nn.Linear(5, 7), nn.PReLU()), (5,)),
        ("PReLU, a slope a channel", lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.PReLU(3)), (2, 8)),
    ):
        yield classified(group, name, body, numbers(*shape))
    for name, bias, shape in (("Bilinear", True, (8,)), ("Bilinear at positions, no bias", False, (3, 8))):
        yield classified(
            group,
            name,
            lambda bias=bias: Call(
                lambda m, x: m.layer(x[..., :5], x[..., 5:]), layer=nn.Bilinear(5, 3, 6, bias=bias)
            ),
            numbers(*shape),
        )


def adaptive_softmax() -> Iterator[Case]:
    """AdaptiveLogSoftmaxWithLoss, which sees the targets in the model."""
    layer = nn.AdaptiveLogSoftmaxWithLoss

    def log_probabilities(m: nn.Module, x: Tensor) -> Tensor:
        return m.head.log_prob(torch.tanh(m.inner(x)))

    yield Case(
        "dense",
        "AdaptiveLogSoftmaxWithLoss, log probabilities",
        lambda: Call(log_probabilities, inner=nn.Linear(5, 6), head=layer(6, 8, [2, 5], div_value=2.0)),
        numbers(5),
        lambda examples: torch.randint(0, 8, (examples,)),
        lambda outputs, targets: F.nll_loss(outputs, targets, reduction="none"),
        zero=("head.head.*",),
    )
    yield Case(
        "dense",
        "AdaptiveLogSoftmaxWithLoss, targets as inputs",
        lambda: Call(
            lambda m, x, y: m.head(torch.tanh(m.inner(x)), y).output,
            inner=nn.Linear(5, 6),
            head=layer(6, 8, [2, 5], div_value=2.0, head_bias=True),
        ),
        lambda examples, views: {
            "x": numbers(5)(examples, views),
            "y": torch.randint(0, 8, (examples, views)),
        },
        labels,
        lambda outputs, targets: -outputs,
        zero=("head.head.*",),
    )
