"""No example adds more than C: hostile trials over every rule and way, and a judge that notices what does.

`python -m benchmarks.bound` runs the same trials by the thousand.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.bound.judge import CLIPS, SUMS, WAYS, Sum, by_engine, trial
from benchmarks.bound.rules import RULES
from fedsim.grads import ClipRule, FlatClip

TRIALS = 4  # a rule; with about 4.5 examples each, over 400 cases in all
NAMES = list(RULES)


@pytest.mark.parametrize("rule", NAMES)
def test_no_contribution_is_longer_than_its_bound(rule: str) -> None:
    for turn in range(TRIALS):
        found = trial(NAMES.index(rule) + turn * len(NAMES))
        assert found.rule == rule
        assert not found.wrong, found


def test_trials_reach_every_way_and_clip_rule() -> None:
    found = [trial(number, dict.fromkeys(SUMS, _nothing)) for number in range(TRIALS * len(NAMES))]
    assert sum(t.cases for t in found) >= 400
    assert {t.way for t in found} == set(WAYS) == set(SUMS)
    assert {t.clip for t in found} == set(CLIPS)


def _nothing(model: nn.Module, inputs: Tensor, targets: Tensor, clip: ClipRule) -> Tensor:
    return torch.zeros(1, sum(p.numel() for p in model.parameters()))


def _gram(model: nn.Module, inputs: Tensor, targets: Tensor, clip: ClipRule) -> Tensor:
    """The textbook formula for linear layers, plainly in float32: norms from Gram matrices over positions."""
    if not len(inputs):
        return _nothing(model, inputs, targets, clip)
    assert isinstance(model, nn.Linear)
    x = inputs.flatten(1, -2)
    g = targets[:, None].expand(*inputs.shape[:2], *targets.shape[1:]).flatten(1, -2) / inputs.shape[1]
    squares = ((x @ x.mT) * (g @ g.mT)).sum((1, 2))
    if model.bias is not None:
        squares = squares + g.sum(1).square().sum(1)
    factors = clip.coefficients(squares.clamp(min=0).double().sqrt()).float()
    weight = torch.einsum("n,nto,nti->oi", factors, g, x)
    bias = [torch.einsum("n,nto->o", factors, g)] if model.bias is not None else []
    return torch.cat([weight.flatten(), *bias])[None]


def _stretched(factor: float) -> Sum:
    right = by_engine("vmap")
    return lambda model, inputs, targets, clip: right(model, inputs, targets, clip) * factor


def _as_a_whole(model: nn.Module, inputs: Tensor, targets: Tensor, clip: ClipRule) -> Tensor:
    return by_engine("vmap")(model, inputs, targets, FlatClip(clip.sensitivity))


def _without_clipping(model: nn.Module, inputs: Tensor, targets: Tensor, clip: ClipRule) -> Tensor:
    return by_engine("vmap")(model, inputs, targets, FlatClip(1e30))


def _wrong(sums: Sum, rule: str, trials: int, clip: str | None = None) -> int:
    """Count the trials of a rule that are judged wrong, and none of them for another reason."""
    start = NAMES.index(rule)
    found = [trial(start + turn * len(NAMES), dict.fromkeys(SUMS, sums)) for turn in range(trials)]
    chosen = (
        [t for t in found if t.clip == clip]
        if clip
        else [t for t in found if t.clip in ("flat", "normalised")]
    )
    assert not any(t.problem for t in chosen), chosen
    return sum(t.wrong for t in chosen)


def test_the_judge_notices_norms_that_cancel() -> None:
    assert _wrong(_gram, "linear_at_positions", 120) >= 3
    assert _wrong(_gram, "linear_at_many_positions", 60) >= 3


def test_the_judge_notices_a_hundred_thousandth_too_much() -> None:
    assert _wrong(_stretched(1.00001), "linear", 30) >= 5
    assert _wrong(_stretched(1.0), "linear", 30) == 0


def test_the_judge_notices_parts_clipped_as_a_whole() -> None:
    assert _wrong(_as_a_whole, "several", 30, clip="per_layer") >= 2


def test_the_judge_notices_no_clipping() -> None:
    assert _wrong(_without_clipping, "conv2d", 30) >= 10


def test_an_engine_that_fails_is_wrong() -> None:
    def failing(*_: object) -> Tensor:
        raise RuntimeError("no")

    found = trial(0, dict.fromkeys(SUMS, failing))
    assert found.wrong
    assert math.isinf(found.excess)
