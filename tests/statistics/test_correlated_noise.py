"""Correlated noise has the covariance its matrix says, over steps and coordinates, where it reaches updates.

False alarms: each check fails on correct noise with probability at most 1e-6; keys are fixed, so a pass is
repeatable. Every check is also run on noise that is wrong in the way it looks for, and must reject it.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedsim import seeds
from fedsim.engine.experiment import prepare
from fedsim.learners.optimizer import ServerOptimizer
from fedsim.mechanism import Mechanism
from fedsim.noise.banded import BandedToeplitz, optimal_coefficients
from fedsim.noise.stream import Factorisation, Stream
from fedsim.noise.tree import TreeAggregation
from fedsim.samplers.keyed import in_bin
from tests.conftest import small, train

Array = NDArray[np.float64]
ALARM = 1e-6
STEPS, COUNT = 21, 40_000
BANDED = BandedToeplitz(optimal_coefficients(4, STEPS))
TREE = TreeAggregation(8)  # two whole passes and a part of a third
RUN = 62  # steps of a run: more than anything in it repeats after


def draw(mechanism: Factorisation, steps: int = STEPS, root: int = 3) -> Array:
    stream = Stream()
    return np.stack([stream.sample(mechanism, root, t, COUNT) for t in range(steps)])


def covariance(mechanism: Factorisation, steps: int = STEPS) -> Array:
    _, decoder = mechanism.factors(steps)
    return decoder @ decoder.T


def covariance_matches(rows: Array, expected: Array) -> bool:
    """After whitening with the expected covariance every pair of steps is tested, and all of them together.

    Variances are chi-square with P degrees of freedom; covariances of independent steps are sums of P
    products, normal to the accuracy needed. Bonferroni over the entries, half of ALARM; the other half for
    the sum of squared scores, chi-square with one degree for each pair.
    """
    white = np.linalg.solve(np.linalg.cholesky(expected), rows)
    count = rows.shape[1]
    gram = white @ white.T
    pairs = gram[np.triu_indices(len(rows), 1)] / np.sqrt(count)
    tails = np.minimum(stats.chi2.cdf(np.diag(gram), count), stats.chi2.sf(np.diag(gram), count))
    entries = len(pairs) + len(rows)
    together = stats.chi2.sf(float(np.sum(pairs**2)), len(pairs))
    return bool(
        np.abs(pairs).max() < stats.norm.isf(ALARM / (4 * entries))
        and tails.min() > ALARM / (4 * entries)
        and together > ALARM / 2
    )


def coordinates_are_independent(rows: Array, expected: Array) -> bool:
    """Correlation between coordinates at several distances, over all whitened steps."""
    white = np.linalg.solve(np.linalg.cholesky(expected), rows)
    lags = (1, 2, 10, 785, 8191, 8192)  # classes, layers, halves of the generator's blocks
    limit = stats.norm.isf(ALARM / (2 * len(lags)))
    sums = [float(np.sum(white[:, :-lag] * white[:, lag:])) / np.sqrt(white[:, lag:].size) for lag in lags]
    return bool(max(map(abs, sums)) < limit)


@pytest.mark.parametrize("mechanism", [TREE, BANDED], ids=["tree", "banded"])
def test_covariance_over_steps_is_the_matrix(mechanism: Factorisation) -> None:
    rows = draw(mechanism)
    assert covariance_matches(rows, covariance(mechanism))
    assert coordinates_are_independent(rows, covariance(mechanism))
    assert coordinates_are_independent(rows[:, :16_382], covariance(mechanism))


def plain_tree_covariance() -> Array:
    """The tree without combining estimates: a prefix adds the noise of single nodes."""
    prefixes = np.zeros((STEPS, STEPS))
    for t in range(STEPS):
        place = t
        while True:
            prefixes[t, place] = 1.0  # the interval that ends here, one for each step
            local = place % 8 + 1
            if local == local & -local:
                break
            place -= local & -local
    increments = prefixes.copy()
    for t in range(STEPS):
        if t % 8:
            increments[t] -= prefixes[t - 1]
    return increments @ increments.T


WRONG = {
    "independent noise of the same scales": np.diag(np.diag(covariance(BANDED))),
    "a tree": covariance(TREE),
    "a tree that restarts elsewhere": covariance(TreeAggregation(7)),
    "a tree that never restarts": covariance(TreeAggregation(STEPS)),
    "a tree without combined estimates": plain_tree_covariance(),
    "one band fewer": covariance(BandedToeplitz(BANDED.coefficients[:-1])),
    "coefficients off by two per cent": covariance(
        BandedToeplitz((1.0, *(0.98 * c for c in BANDED.coefficients[1:])))
    ),
    "scale off by two per cent": 1.04 * covariance(BANDED),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_covariances_are_rejected(name: str) -> None:
    """Noise is drawn with the wrong covariance and held against the right one of each mechanism."""
    generator = seeds.stream(8, "wrong")
    rows = np.linalg.cholesky(WRONG[name]) @ generator.standard_normal((STEPS, COUNT))
    assert covariance_matches(rows, WRONG[name]), "the drawn noise is what its name says"
    rejected = [not covariance_matches(rows, covariance(m)) for m in (TREE, BANDED)]
    assert rejected == [name != "a tree", True]


def test_noise_made_wrongly_is_rejected() -> None:
    forgotten = np.stack([Stream().sample(BANDED, 3, 0, COUNT) for _ in range(STEPS)])
    assert not covariance_matches(forgotten, covariance(BANDED)), "one step's noise again and again"
    no_memory = np.stack(
        [BANDED.advance([], 3, t, COUNT)[0] for t in range(STEPS)]  # what losing the state would give
    )
    assert not covariance_matches(no_memory, covariance(BANDED))
    block = draw(BANDED)[:, :8191]
    shared = np.concatenate([block, block], axis=1)
    assert not coordinates_are_independent(shared, covariance(BANDED)), "coordinates that share noise"


def released_noise(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Array, Mechanism]:
    """Train, and return for every step what reached the optimizer minus the exact sum, (steps, P)."""
    config = small(
        f"preset={name}",
        "model.name=linear",
        "model.dtype=float64",
        "train.expected_batch_size=100",
        f"train.steps={RUN}",
        "train.eval_every=1000",
        "train.checkpoint_every=1000",
        "federation.holders=7",
    )
    sums, gradients = [], []
    collect, step = Mechanism.collect, ServerOptimizer.step

    def spy_collect(self, release, state, ask):  # type: ignore[no-untyped-def]
        got = collect(self, release, state, ask)
        sums.append(got.sums["sum"].copy())
        return got

    def spy_step(self, parameters, gradient, number):  # type: ignore[no-untyped-def]
        gradients.append(gradient.numpy().copy())
        return step(self, parameters, gradient, number)

    monkeypatch.setattr(Mechanism, "collect", spy_collect)
    monkeypatch.setattr(ServerOptimizer, "step", spy_step)
    train(config, out)
    experiment = prepare(config)
    noise = np.stack(gradients) * experiment.mechanism.divisor - np.stack(sums)
    return noise, experiment.mechanism


@pytest.mark.parametrize("name", ["dp_ftrl", "dp_mf"])
def test_the_noise_that_reaches_the_update(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sigma 1, clip 0.5: 4 steps a pass (3 levels), or 4 bands."""
    noise, plan = released_noise(name, tmp_path, monkeypatch)
    mechanism: Factorisation = TreeAggregation(4)
    if name == "dp_mf":
        mechanism = BandedToeplitz(optimal_coefficients(4, RUN))
    encoder, _ = mechanism.factors(RUN)
    std = 1.0 * 0.5 * float(np.linalg.norm(encoder, axis=0).max())
    expected = std**2 * covariance(mechanism, RUN)
    assert covariance_matches(noise, expected)
    assert not covariance_matches(noise, 0.5**2 * covariance(mechanism, RUN)), "sensitivity forgotten"
    assert not covariance_matches(noise, np.diag(np.diag(expected))), "independent over steps"
    once = noise.copy()
    once[-2] = 0
    assert not covariance_matches(once, expected), "left out once"
    stated = plan.release().noise_stds["sum"]
    assert expected[0, 0] == pytest.approx(stated**2), "what the mechanism says of the first step"


def bins_are_even_and_independent(bins_of: NDArray[np.int64], bins: int) -> bool:
    """Chi-square tests of every pass's counts, of pairs of passes and of pairs of ids; (passes, ids)."""
    values = []
    for row in bins_of:
        counts = np.bincount(row, minlength=bins)
        values.append(stats.chisquare(counts).pvalue)
    for a, b in itertools.pairwise(bins_of):
        table = np.bincount(a * bins + b, minlength=bins * bins)
        values.append(stats.chisquare(table).pvalue)
    ids = bins_of[0]
    values.append(stats.chisquare(np.bincount(ids[:-1] * bins + ids[1:], minlength=bins * bins)).pvalue)
    return bool(min(values) > ALARM / len(values))


def test_assignment_to_steps_is_even_and_new_in_every_pass() -> None:
    ids, bins, passes = np.arange(20_000), 6, 5

    def assigned(key_of_pass: int) -> NDArray[np.int64]:
        key = seeds.derive(1, "pass", key_of_pass)
        out = np.zeros(len(ids), dtype=np.int64)
        for j in range(bins):
            out[in_bin(ids, key, j, bins)] = j
        return out

    right = np.stack([assigned(p) for p in range(passes)])
    assert bins_are_even_and_independent(right, bins)
    assert not bins_are_even_and_independent(np.stack([right[0]] * passes), bins), "the same in every pass"
    assert not bins_are_even_and_independent(np.stack([ids % bins] * passes), bins), "by id"
    uneven = np.where(right == 5, np.where(np.arange(len(ids)) % 10 == 0, 0, 5), right)
    assert not bins_are_even_and_independent(uneven, bins)
