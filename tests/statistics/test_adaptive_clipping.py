"""dp_fedavg with a moving clip norm: its noise has the scale of the bound of its own step, and the bound
moves by a count that is noised as stated.

Trained end to end: what nodes are told to clip to, what they count and what reaches the optimizer are seen.
False alarms: every check rejects correct noise with probability at most 1e-6; keys are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedsim.engine.experiment import prepare
from fedsim.learners.optimizer import ServerOptimizer
from fedsim.mechanism import Mechanism
from tests.conftest import small, train
from tests.statistics.test_noise_of_updates import ALARM, every_step_has_the_scale, steps_are_independent

Array = NDArray[np.float64]
STEPS, HOLDERS, QUANTILE, COUNT_NOISE, CLIP_NORM = 120, 10, 0.5, 0.8, 1.27
SIGMA = 1.0
SUM_SIGMA = (SIGMA**-2 - (2 * COUNT_NOISE) ** -2) ** -0.5  # the count pays for the rest of SIGMA


@dataclass
class Seen:
    """What a run showed, by step: the bound sent to nodes, the updates drawn and those of them below it, and
    the noise of the sum (steps, P)."""

    bounds: Array
    below: Array
    drawn: Array
    noise: Array


def run(speed: float, out: Path, monkeypatch: pytest.MonkeyPatch, clip_norm: float = CLIP_NORM) -> Seen:
    """Train with everybody in every step, from the same parameters: the server's steps are tiny."""
    options = {"target_quantile": QUANTILE, "quantile_learning_rate": speed, "count_noise": COUNT_NOISE}
    config = small(
        "preset=dp_fedavg",
        f"query.options={{{', '.join(f'{k}: {v}' for k, v in options.items())}}}",
        "model.name=linear",
        "model.dtype=float64",
        "data.train_examples=50",
        "federation.partition=iid",
        f"federation.holders={HOLDERS}",
        "train.expected_batch_size=50",
        f"train.steps={STEPS}",
        "train.eval_every=1000",
        "train.checkpoint_every=1000",
        f"privacy.clip_norm={clip_norm}",
        f"privacy.noise_multiplier={SIGMA}",
        "optimizer.name=sgd",
        "optimizer.learning_rate=1e-9",
    )
    bounds, below, drawn, sums, gradients = [], [], [], [], []
    collect, step = Mechanism.collect, ServerOptimizer.step

    def spy_collect(self: Any, release: Any, state: Any, ask: Any) -> Any:
        def asking(stage: str, arrays: Any) -> Any:
            bounds.append(float(arrays["clip_norm"][0]))
            return ask(stage, arrays)

        got = collect(self, release, state, asking)
        below.append(sum(float(reply.arrays["below"][0]) + reply.count / 2 for reply in got.replies))
        drawn.append(sum(reply.count for reply in got.replies))
        sums.append(got.sums["sum"].copy())
        return got

    def spy_step(self: Any, parameters: Any, gradient: Any, number: int) -> Any:
        gradients.append(gradient.numpy().copy())
        return step(self, parameters, gradient, number)

    monkeypatch.setattr(Mechanism, "collect", spy_collect)
    monkeypatch.setattr(ServerOptimizer, "step", spy_step)
    train(config, out)
    noise = np.stack(gradients) * prepare(config).mechanism.divisor - np.stack(sums)
    return Seen(np.array(bounds), np.array(below), np.array(drawn), noise)


def count_noise_is(values: Array, std: float) -> bool:
    """Chi-square, mean, normality and correlation with the step before, a quarter of ALARM each."""
    unit, count = values / std, len(values)
    square = float(unit @ unit)
    return bool(
        min(stats.chi2.cdf(square, count), stats.chi2.sf(square, count)) > ALARM / 8
        and abs(unit.sum()) / np.sqrt(count) < stats.norm.isf(ALARM / 8)
        and stats.kstest(unit, stats.norm.cdf).pvalue > ALARM / 4
        and abs(float(unit[1:] @ unit[:-1])) / np.sqrt(count - 1) < stats.norm.isf(ALARM / 8)
    )


def test_the_bound_moves_by_a_noised_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So slowly that the exact count stays, and the noise is what the logarithm of the bound shows of it."""
    speed = 1e-6
    seen = run(speed, tmp_path, monkeypatch)
    assert (seen.drawn == HOLDERS).all()
    assert 0 < seen.below[0] < HOLDERS, "the count matters"
    share = QUANTILE - np.diff(np.log(seen.bounds)) / speed
    assert (share > 0).all()
    assert (share < 1).all()
    exact = 0.5 + (seen.below - seen.drawn / 2) / HOLDERS
    noise = (share - exact[:-1]) * HOLDERS
    assert count_noise_is(noise, COUNT_NOISE)
    assert not count_noise_is(np.zeros_like(noise), COUNT_NOISE), "an exact count"
    assert not count_noise_is(noise / 2, COUNT_NOISE), "as if the count were centred twice"
    assert not count_noise_is(np.full_like(noise, COUNT_NOISE), COUNT_NOISE), "the same in every step"
    first = seen.noise[:-1, 0] / seen.noise[:, 0].std()
    assert abs(float(noise @ first)) / COUNT_NOISE / np.sqrt(STEPS) < 5, "apart from the sum's noise"


def test_the_noise_follows_the_bound_nodes_clip_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run(0.3, tmp_path, monkeypatch, clip_norm=20 * CLIP_NORM)
    assert seen.bounds[0] == 20 * CLIP_NORM
    assert seen.bounds[-1] < 3 * CLIP_NORM, "the bound has moved a long way"
    unit = seen.noise / seen.bounds[:, None]
    assert every_step_has_the_scale(unit, SUM_SIGMA)
    assert steps_are_independent(unit, SUM_SIGMA)
    assert not every_step_has_the_scale(unit[1:] * (seen.bounds[1:] / seen.bounds[:-1])[:, None], SUM_SIGMA)
    assert not every_step_has_the_scale(seen.noise / seen.bounds[0], SUM_SIGMA), "the configured bound"
