"""The Poisson draw is Poisson: rates, pairs, sizes and steps, and what is not Poisson is rejected.

False alarms: every check has probability at most 1e-6 to fail on a correct draw, by normal limits that are
accurate here (tens of thousands of ids, hundreds of steps). Keys are fixed, so results never change; the
rate says how much a pass is worth. Wrong samplers that many systems use must be rejected.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedsim import seeds
from fedsim.samplers.keyed import HolderAvailability, PoissonSampler

ALARM = 1e-6
RATE, IDS, STEPS = 0.04, 20_000, 400
SAMPLER = PoissonSampler(RATE, IDS)
Mask = NDArray[np.bool_]


def poisson() -> Mask:
    ids = np.arange(IDS, dtype=np.int64)
    return np.stack([SAMPLER.included(ids, seeds.derive(5, "draw", step)) for step in range(STEPS)])


DRAWS = poisson()


def _two_sided(statistic: float, freedom: int) -> bool:
    return min(stats.chi2.cdf(statistic, freedom), stats.chi2.sf(statistic, freedom)) > ALARM / 2


def _standard(draws: Mask) -> NDArray[np.float64]:
    return (draws - RATE) / np.sqrt(RATE * (1 - RATE))


def rate_is_right(draws: Mask) -> bool:
    """Binomial test of the total number of inclusions."""
    return bool(stats.binomtest(int(draws.sum()), draws.size, RATE).pvalue > ALARM)


def every_id_is_equally_likely(draws: Mask) -> bool:
    """Chi-square of the inclusions per id: Binomial(steps, q) each, neither more nor less spread."""
    totals = draws.sum(axis=0)
    statistic = np.sum((totals - STEPS * RATE) ** 2) / (STEPS * RATE * (1 - RATE))
    return _two_sided(float(statistic), draws.shape[1])


def batch_sizes_are_binomial(draws: Mask) -> bool:
    """Chi-square of the batch sizes over steps: their variance is the sum over all pairs of ids."""
    sizes = draws.sum(axis=1)
    statistic = np.sum((sizes - IDS * RATE) ** 2) / (IDS * RATE * (1 - RATE))
    return _two_sided(float(statistic), draws.shape[0])


def pairs_are_independent(draws: Mask) -> bool:
    """Pairs of ids occur together q**2 of the time: neighbours at several lags, and random pairs."""
    unit = _standard(draws)
    lags = (1, 2, 3, 8, 100, 8192, 10_000)
    limit = stats.norm.isf(ALARM / (4 * len(lags)))
    for lag in lags:
        products = unit[:, :-lag] * unit[:, lag:]
        if abs(products.sum()) / np.sqrt(products.size) > limit:
            return False
    order = np.random.default_rng(0).permutation(IDS)
    joint = (draws[:, order[: IDS // 2]] & draws[:, order[IDS // 2 :]]).sum()
    pairs = draws.shape[0] * (IDS // 2)
    return bool(stats.binomtest(int(joint), pairs, RATE**2).pvalue > ALARM / 2)


def steps_are_independent(draws: Mask) -> bool:
    """Correlations of the draws of all pairs of steps: the largest, and their sum of squares."""
    unit = _standard(draws).astype(np.float32)
    scores = (unit @ unit.T)[np.triu_indices(len(draws), 1)] / np.sqrt(draws.shape[1])
    # The sum of squares has a little more than chi-square spread; 8 of its deviations are beyond 1e-6.
    excess = (np.sum(scores.astype(np.float64) ** 2) - scores.size) / np.sqrt(2 * scores.size)
    # Skewed products have a heavier upper tail than a normal: the limit is that of 1e-9.
    return bool(np.abs(scores).max() < stats.norm.isf(1e-9 / scores.size) and abs(excess) < 8)


CHECKS: tuple[Callable[[Mask], bool], ...] = (
    rate_is_right,
    every_id_is_equally_likely,
    batch_sizes_are_binomial,
    pairs_are_independent,
    steps_are_independent,
)


@pytest.mark.parametrize("check", CHECKS)
def test_the_poisson_draw_passes(check: Callable[[Mask], bool]) -> None:
    assert check(DRAWS)


@pytest.mark.parametrize("check", CHECKS)
def test_an_ordinary_generator_passes(check: Callable[[Mask], bool]) -> None:
    """The checks do not reject a Poisson draw made another way."""
    assert check(np.random.default_rng(3).random((STEPS, IDS)) < RATE)


def test_availability_passes_as_a_poisson_draw_of_holders() -> None:
    holders = np.arange(IDS, dtype=np.int64)
    away = HolderAvailability(RATE)
    masks = np.stack(
        [away.available(holders, seeds.derive(5, "availability", step)) for step in range(STEPS)]
    )
    assert all(check(masks) for check in CHECKS)
    # ... and is independent of the draw of examples with the same ids and steps.
    agreement = float(np.sum(_standard(masks) * _standard(DRAWS))) / np.sqrt(DRAWS.size)
    assert abs(agreement) < stats.norm.isf(ALARM / 2)


def fixed_size() -> Mask:
    rng = np.random.default_rng(1)
    draws = np.zeros((STEPS, IDS), dtype=bool)
    for row in draws:
        row[rng.choice(IDS, int(RATE * IDS), replace=False)] = True
    return draws


def shuffled() -> Mask:
    rng = np.random.default_rng(1)
    draws = np.zeros((STEPS, IDS), dtype=bool)
    per_epoch = round(1 / RATE)
    for epoch in range(STEPS // per_epoch):
        for batch, chosen in enumerate(np.split(rng.permutation(IDS), per_epoch)):
            draws[epoch * per_epoch + batch, chosen] = True
    return draws


def reused_key() -> Mask:
    draws = DRAWS.copy()
    draws[300] = draws[17]
    return draws


def whole_groups() -> Mask:
    """Groups of 8 neighbours enter together, as when whole shards are drawn."""
    return np.repeat(np.random.default_rng(1).random((STEPS, IDS // 8)) < RATE, 8, axis=1)


def unequal() -> Mask:
    chance = np.where(np.arange(IDS) % 2, 1.15 * RATE, 0.85 * RATE)
    return np.asarray(np.random.default_rng(1).random((STEPS, IDS)) < chance)


def too_often() -> Mask:
    return np.random.default_rng(1).random((STEPS, IDS)) < RATE * 1.02


def per_holder_batches() -> Mask:
    """Every holder of 100 examples draws exactly its share: negative dependence within a holder."""
    keys = np.random.default_rng(1).random((STEPS, IDS // 100, 100))
    chosen = np.argsort(keys, axis=2) < int(RATE * 100)
    return chosen.reshape(STEPS, IDS)


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (fixed_size, batch_sizes_are_binomial),
        (shuffled, batch_sizes_are_binomial),
        (shuffled, every_id_is_equally_likely),
        (shuffled, steps_are_independent),
        (reused_key, steps_are_independent),
        (whole_groups, pairs_are_independent),
        (whole_groups, batch_sizes_are_binomial),
        (per_holder_batches, pairs_are_independent),
        (per_holder_batches, batch_sizes_are_binomial),
        (unequal, every_id_is_equally_likely),
        (too_often, rate_is_right),
    ],
    ids=lambda part: part.__name__,
)
def test_a_wrong_draw_is_rejected(wrong: Callable[[], Mask], check: Callable[[Mask], bool]) -> None:
    assert not check(wrong())


def test_every_rate_is_met() -> None:
    ids = np.arange(300_000, dtype=np.int64)
    for rate in (1e-4, 0.01, 0.3, 0.5, 0.99):
        count = int(PoissonSampler(rate, ids.size).included(ids, seeds.derive(6, "draw", 0)).sum())
        assert stats.binomtest(count, ids.size, rate).pvalue > ALARM


def test_grouping_does_not_change_the_draw() -> None:
    rng = np.random.default_rng(2)
    for step in (0, 1, 399):
        key = seeds.derive(5, "draw", step)
        order = rng.permutation(IDS)
        joined = np.zeros(IDS, dtype=bool)
        for part in np.array_split(order, 37):
            joined[part] = SAMPLER.included(part.astype(np.int64), key)
        assert np.array_equal(joined, DRAWS[step])
        subset = np.sort(rng.choice(IDS, 500, replace=False)).astype(np.int64)
        assert np.array_equal(SAMPLER.included(subset, key), DRAWS[step][subset])
