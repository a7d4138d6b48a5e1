"""The noise that really reaches the update, for every method whose noise is independent over steps.

Each strategy is trained end to end, and what reached the optimizer minus the exact sum is tested: scale,
shape, independence over coordinates and over steps. False alarms: every check rejects correct noise with
probability at most 1e-6; keys are fixed. Each check is also run on noise that is wrong in the way it looks
for, and on a strategy that was broken on purpose, and must reject it. Noise that is correlated over steps
(dp_ftrl, dp_mf) is held against its covariance matrix in test_correlated_noise.py; noise at a clip norm that
moves in test_adaptive_clipping.py.

There are more steps than anything in a run repeats after, and every step is held against its own scale: noise
that is missing once in a while is missing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedsim import mechanism
from fedsim.engine.asked import Asked
from fedsim.engine.experiment import prepare
from fedsim.learners.optimizer import ServerOptimizer
from fedsim.mechanism import Mechanism
from fedsim.method import Method
from fedsim.noise import gaussian
from fedsim.noise.shares import NoiseShares
from fedsim.strategies.local import Local
from fedsim.validate import RunError
from tests.conftest import small, train
from tests.strategies.methods import PRIVATE

Array = NDArray[np.float64]
ALARM = 1e-6
STEPS = 120
STEPS_OF_SHARES = 30  # a step of four stages and seven secret sharings takes its time
FEW = 8  # for noise that is wrong in every step
HOLDERS = 7
CORRELATED = {"dp_ftrl", "dp_mf"}
ADAPTIVE = "query.options={target_quantile: 0.5, quantile_learning_rate: 1e-12, count_noise: 2}"
ADAPTIVE_STD = 0.5 / math.sqrt(1 - 1 / 16)  # sigma 1; part of the budget pays for the count (s = 2)
CASES: dict[str, tuple[tuple[str, ...], float]] = {
    # overrides, and the standard deviation in the sum with sigma 1, clip norm 0.5 and seven holders
    "central_dpsgd": (("preset=central_dpsgd",), 0.5),
    "dp_fedavg": (("preset=dp_fedavg",), 0.5),
    "dp_fedavg, adaptive": (("preset=dp_fedavg", ADAPTIVE), ADAPTIVE_STD),
    "local_dpsgd": (("preset=local_dpsgd",), 0.5 * math.sqrt(HOLDERS)),
    "local_dpsgd, three local steps": (
        ("preset=local_dpsgd", "strategy.options={local_steps: 3, local_learning_rate: 0.25}"),
        0.25 * 0.5 * math.sqrt(3 * HOLDERS),
    ),
    "shares_dpsgd": (("preset=shares_dpsgd",), 0.5),
    "shares_dpsgd, discrete Gaussian": (
        ("preset=shares_dpsgd", "strategy.options={noise: discrete_gaussian}"),
        0.5,
    ),
    "shares_dpsgd, five of seven needed": (
        ("preset=shares_dpsgd", "strategy.options={min_survivors: 5}"),
        0.5 * math.sqrt(HOLDERS / 5),
    ),
}


def steps_of(name: str) -> int:
    return STEPS_OF_SHARES if name.startswith("shares") else STEPS


def reached(overrides: tuple[str, ...], out: Path, monkeypatch: pytest.MonkeyPatch) -> Array:
    """Train without a drawn example and return what reached the optimizer, in units of the sum, (steps, P).

    Strategies whose server adds the noise are also checked with examples, below; where holders add it, the
    exact sum never exists, so an empty draw shows the noise alone.
    """
    return _trained(("train.expected_batch_size=1e-6", *overrides), out, monkeypatch)[0]


def _trained(overrides: tuple[str, ...], out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Array, Array]:
    config = small(
        "model.name=linear",
        "model.dtype=float64",
        f"train.steps={FEW}",
        "train.eval_every=1000",
        "train.checkpoint_every=50",
        f"federation.holders={HOLDERS}",
        *overrides,
    )
    gradients, sums = [], []
    step, collect = ServerOptimizer.step, Mechanism.collect

    def spy_step(self: Any, parameters: Any, gradient: Any, number: int) -> Any:
        gradients.append(gradient.numpy().copy())
        return step(self, parameters, gradient, number)

    def spy_collect(self: Any, release: Any, state: Any, ask: Any) -> Any:
        got = collect(self, release, state, ask)
        sums.append(got.sums["sum"].copy())
        return got

    with monkeypatch.context() as patch:
        patch.setattr(ServerOptimizer, "step", spy_step)
        patch.setattr(Mechanism, "collect", spy_collect)
        train(config, out)
    return np.stack(gradients) * prepare(config).mechanism.divisor, np.stack(sums)


def scale_is(rows: Array, std: float) -> bool:
    """Two-sided chi-square test of the sum of squares."""
    statistic = float(np.sum((rows / std) ** 2))
    return bool(min(stats.chi2.cdf(statistic, rows.size), stats.chi2.sf(statistic, rows.size)) > ALARM / 2)


def every_step_has_the_scale(rows: Array, std: float) -> bool:
    """The same test of each step by itself, Bonferroni over the steps."""
    squares = np.sum((rows / std) ** 2, axis=1)
    tails = np.minimum(stats.chi2.cdf(squares, rows.shape[1]), stats.chi2.sf(squares, rows.shape[1]))
    return bool(tails.min() > ALARM / (2 * len(rows)))


def shape_is_normal(rows: Array, std: float) -> bool:
    """Kolmogorov-Smirnov; integer noise at the scales chosen here differs from it by far less."""
    return bool(stats.kstest(rows.ravel(), stats.norm(scale=std).cdf).pvalue > ALARM)


def coordinates_are_independent(rows: Array, std: float) -> bool:
    """Correlations at distances of a pixel, a class, the bias and the generators' blocks."""
    unit = rows / std
    lags = (1, 2, 10, 784, 785, 3925, 4096)
    limit = stats.norm.isf(ALARM / (4 * len(lags)))
    for series in (unit, (unit**2 - 1) / math.sqrt(2)):
        for lag in lags:
            products = series[:, :-lag] * series[:, lag:]
            if abs(float(products.sum())) / math.sqrt(products.size) > limit:
                return False
    return True


def steps_are_independent(rows: Array, std: float) -> bool:
    """Correlations of all pairs of steps, each and together."""
    unit = rows / std
    scores = (unit @ unit.T)[np.triu_indices(len(rows), 1)] / math.sqrt(rows.shape[1])
    return bool(
        np.abs(scores).max() < stats.norm.isf(ALARM / (4 * scores.size))
        and stats.chi2.sf(float(scores @ scores), scores.size) > ALARM / 2
    )


CHECKS = (
    scale_is,
    every_step_has_the_scale,
    shape_is_normal,
    coordinates_are_independent,
    steps_are_independent,
)


def test_every_private_method_is_covered() -> None:
    assert {name.split(",")[0] for name in CASES} | CORRELATED == set(PRIVATE)


@pytest.mark.parametrize("name", CASES)
def test_noise_reaches_the_update_as_stated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, std = CASES[name]
    steps = steps_of(name)
    rows = reached((*overrides, f"train.steps={steps}"), tmp_path, monkeypatch)
    assert rows.shape == (steps, 7850)
    for check in CHECKS:
        assert check(rows, std), check.__name__
    assert not scale_is(rows * 1.03, std)
    assert not scale_is(rows / 1.03, std)
    assert not scale_is(rows * math.sqrt(HOLDERS), std), "in full at every holder, where once is stated"
    assert not shape_is_normal(np.sign(rows) * np.sqrt(np.abs(rows) * std), std)
    classes = np.tile(rows[:, :785], 10)
    assert not coordinates_are_independent(classes, std), "one draw for all classes"
    repeated = rows.copy()
    repeated[5] = rows[2]
    assert not steps_are_independent(repeated, std), "one step's noise twice"
    common = gaussian.step_noise(1, 0, rows.shape[1], std)
    assert not steps_are_independent((rows + 0.3 * common) / math.sqrt(1.09), std), "a common part"
    once = rows.copy()
    once[-1] *= 1.2
    assert not every_step_has_the_scale(once, std), "a fifth too much in one step of all"
    once[-1] = 0
    assert not every_step_has_the_scale(once, std), "left out once"


@pytest.mark.parametrize("name", ["central_dpsgd", "dp_fedavg", "dp_fedavg, adaptive"])
def test_with_examples_the_server_adds_the_same_noise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, std = CASES[name]
    more = ("train.expected_batch_size=200", "train.steps=40")
    noisy, exact = _trained((*overrides, *more), tmp_path, monkeypatch)
    signal = np.linalg.norm(exact, axis=1)
    assert np.median(signal) > 0.9 * 0.5, "at least one clipped contribution in most steps"
    for check in CHECKS:
        assert check(noisy - exact, std), check.__name__


@pytest.mark.parametrize("name", ["local_dpsgd", "local_dpsgd, three local steps", "shares_dpsgd"])
def test_with_examples_holders_add_the_same_noise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step from the same parameters with and without noise; later ones start elsewhere."""
    overrides, std = CASES[name]
    more = ("train.expected_batch_size=200", "train.steps=1", *overrides)
    if "three" in name:  # small moves, so that noise does not change the later gradients to speak of
        more = tuple(m.replace("local_learning_rate: 0.25", "local_learning_rate: 1e-9") for m in more)
        std *= 1e-9 / 0.25
    noisy, _ = _trained(more, tmp_path / "a", monkeypatch)
    exact, _ = _trained((*more, "privacy.noise_multiplier=1e-9"), tmp_path / "b", monkeypatch)
    rows = noisy - exact
    assert np.linalg.norm(exact) > std, "there is a signal"
    for check in CHECKS[:4]:
        assert check(rows, std), check.__name__


def _same_step(cls: type[Any]) -> Any:
    own = cls.keys
    return lambda self, at, root, step: {
        **own(self, at, root, step),
        "holders": own(self, at, root, 0)["holders"],
    }


@pytest.mark.parametrize("name", ["central_dpsgd", "dp_fedavg", "local_dpsgd", "shares_dpsgd"])
def test_a_strategy_that_repeats_its_noise_is_rejected(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, std = CASES[name]
    cls = type(Method.of(small(*overrides)).trust)
    if name in ("local_dpsgd", "shares_dpsgd"):
        monkeypatch.setattr(cls, "keys", _same_step(cls))
        with pytest.raises(RunError, match="came again"):  # nodes notice; without them the noise itself tells
            reached(overrides, tmp_path / "noticed", monkeypatch)
        monkeypatch.setattr(Asked, "admit", lambda *_: None)
        if name == "shares_dpsgd":  # the rotation alone would make the repetition look new
            overrides = (*overrides, "strategy.options={rotate: false}")
    else:
        monkeypatch.setattr(
            mechanism, "step_noise", lambda root, _, *more: gaussian.step_noise(root, 0, *more)
        )
    rows = reached(overrides, tmp_path / "rows", monkeypatch)
    assert scale_is(rows[:1], std)
    assert not steps_are_independent(rows, std)


@pytest.mark.parametrize("name", ["local_dpsgd", "local_dpsgd, three local steps", "shares_dpsgd"])
def test_holders_that_share_a_key_are_rejected(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum then has `holders` times the variance: nothing averages out. Where the sum is not masked the
    server notices by its length alone, so that check is taken away first."""
    overrides, std = CASES[name]
    key = b"k" * 32
    if name == "shares_dpsgd":
        share = NoiseShares.sample
        monkeypatch.setattr(NoiseShares, "sample", lambda self, _, count: share(self, key, count))
        with pytest.raises(RunError, match="the secure sum has norm"):
            reached(overrides, tmp_path / "noticed", monkeypatch)
        monkeypatch.setattr(NoiseShares, "norm_bound", lambda self, length, survivors: math.inf)
    else:
        monkeypatch.setattr(
            "fedsim.strategies.local.standard_normal",
            lambda _, count: gaussian.standard_normal(key, count),
        )
        with pytest.raises(RunError, match="it was not clipped"):
            reached(overrides, tmp_path / "noticed", monkeypatch)
        monkeypatch.setattr(Local, "norm_bounds", lambda *_: {})
    rows = reached(overrides, tmp_path / "rows", monkeypatch)
    assert not scale_is(rows, std)
    assert scale_is(rows[:1], std * math.sqrt(HOLDERS if "three" not in name else 3 * HOLDERS))
