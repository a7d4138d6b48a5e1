"""The Gaussian noise is Gaussian, of the right scale, independent, and never used twice.

False alarms: every check has probability at most 1e-6 to fail on correct noise. The keys are fixed, so a
check that passes once always passes; the rate says how much a pass is worth. Every check is also run on
noise that is wrong in the way it looks for, and must reject it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedsim import seeds
from fedsim.noise.gaussian import standard_normal, step_noise

ALARM = 1e-6
STD = 0.3
COUNT = 1_000_003
BLOCK = 16_384  # the generator works in blocks of this size: halves share their radii
Array = NDArray[np.float64]


def draw(step: int, root: seeds.Root = 11) -> Array:
    return step_noise(root, step, COUNT, STD)


VALUES = draw(0)
STEPS = np.stack([step_noise(11, step, 50_000, STD) for step in range(60)])


def scale_is_right(values: Array) -> bool:
    """Chi-square test of the sum of squares, two-sided."""
    statistic = float(np.sum((values / STD) ** 2))
    tail = min(stats.chi2.cdf(statistic, values.size), stats.chi2.sf(statistic, values.size))
    return bool(tail > ALARM / 2)


def shape_is_normal(values: Array) -> bool:
    """Kolmogorov-Smirnov test against N(0, STD**2)."""
    return bool(stats.kstest(values, stats.norm(scale=STD).cdf).pvalue > ALARM)


def tails_are_normal(values: Array) -> bool:
    """Binomial tests of the numbers beyond 1, 2, 3, 4 and 5 standard deviations, on each side."""
    for distance in (1, 2, 3, 4, 5):
        probability = float(stats.norm.sf(distance))
        for side in (values, -values):
            beyond = int(np.sum(side > distance * STD))
            if stats.binomtest(beyond, values.size, probability).pvalue <= ALARM / 10:
                return False
    return True


def coordinates_are_independent(values: Array) -> bool:
    """Correlations of values, and of squares, at lags that include those of the generator's layout."""
    unit = values / STD
    squares = (unit**2 - 1.0) / np.sqrt(2.0)
    lags = (1, 2, 3, 4, 8, 64, 1000, BLOCK // 2 - 1, BLOCK // 2, BLOCK // 2 + 1, BLOCK, 2 * BLOCK, 100_000)
    limit = stats.norm.isf(ALARM / (4 * len(lags)))
    for series in (unit, squares):
        for lag in lags:
            products = series[:-lag] * series[lag:]
            if abs(products.sum()) / np.sqrt(products.size) > limit:
                return False
    return True


def steps_are_independent(rows: Array) -> bool:
    """Correlations of all pairs of steps: the largest, and their sum of squares."""
    unit = rows / STD
    scores = (unit @ unit.T)[np.triu_indices(len(rows), 1)] / np.sqrt(rows.shape[1])
    total = float(np.sum(scores**2))
    return bool(
        np.abs(scores).max() < stats.norm.isf(ALARM / (4 * scores.size))
        and stats.chi2.sf(total, scores.size) > ALARM / 4
        and stats.chi2.cdf(total, scores.size) > ALARM / 4
    )


def nothing_is_used_twice(rows: Array) -> bool:
    """No value occurs twice. Made from 53-bit uniforms, 3 million normals hold one repeat with probability
    below 1e-3 and ten with far less than 1e-6; a reuse repeats thousands."""
    return bool(np.unique(rows).size > rows.size - 10)


def test_correct_noise_passes_every_check() -> None:
    assert scale_is_right(VALUES)
    assert shape_is_normal(VALUES)
    assert tails_are_normal(VALUES)
    assert coordinates_are_independent(VALUES)
    assert steps_are_independent(STEPS)
    assert nothing_is_used_twice(STEPS)


def test_secret_roots_pass_too() -> None:
    values = step_noise(bytes(range(32)), 3, COUNT, STD)
    assert scale_is_right(values)
    assert shape_is_normal(values)
    assert coordinates_are_independent(values)
    assert abs(float(values @ VALUES)) / STD**2 / np.sqrt(COUNT) < stats.norm.isf(ALARM / 2)


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2, 1.01, 0.99])
def test_a_wrong_scale_is_rejected(factor: float) -> None:
    assert not scale_is_right(VALUES * factor)


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_a_wrong_scale_is_rejected_by_shape_and_tails(factor: float) -> None:
    assert not shape_is_normal(VALUES * factor)
    assert not tails_are_normal(VALUES * factor)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rng: rng.uniform(-np.sqrt(3), np.sqrt(3), COUNT) * STD,
        lambda rng: rng.laplace(0, STD / np.sqrt(2), COUNT),
        lambda rng: (rng.integers(0, 2, (COUNT, 12)).sum(axis=1) - 6) / np.sqrt(3) * STD,
    ],
    ids=["uniform", "laplace", "sum of coins"],
)
def test_another_shape_of_the_same_variance_is_rejected(
    wrong: Callable[[np.random.Generator], Array],
) -> None:
    values = wrong(np.random.default_rng(0))
    assert abs(values.std() / STD - 1) < 0.01
    assert not shape_is_normal(values)


def test_short_tails_are_rejected() -> None:
    assert not tails_are_normal(np.clip(VALUES, -3.9 * STD, 3.9 * STD))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda v: np.tile(v[: COUNT // 10], 10),  # one draw for ten classes: repeats at lag 100,000
        lambda v: np.repeat(v[: COUNT // 2], 2),
        lambda v: (v[:-1] + v[1:]) / np.sqrt(2),
        lambda v: v * np.where(np.arange(v.size) // 1000 % 2, 1.1, 0.9),
    ],
    ids=["tiled over classes", "repeated", "moving average", "scale changes along the vector"],
)
def test_dependent_coordinates_are_rejected(wrong: Callable[[Array], Array]) -> None:
    assert not coordinates_are_independent(wrong(VALUES))


def test_a_reused_key_is_rejected() -> None:
    reused = STEPS.copy()
    reused[41] = reused[7]
    assert not steps_are_independent(reused)
    assert not nothing_is_used_twice(reused)


def test_weakly_correlated_steps_are_rejected() -> None:
    common = step_noise(11, 999, STEPS.shape[1], STD)
    assert not steps_are_independent((STEPS + 0.15 * common) / np.sqrt(1 + 0.15**2))


def test_shifted_windows_of_one_stream_are_rejected() -> None:
    key = seeds.derive(11, "noise", 0)
    windows = np.stack([standard_normal(key, 50_000, start=step * 25_000) for step in range(60)]) * STD
    assert not nothing_is_used_twice(windows)


@pytest.mark.parametrize("start", [0, 1, 8191, 8192, 8193, BLOCK - 1, BLOCK, 5 * BLOCK + 77])
@pytest.mark.parametrize("count", [0, 1, 2, 8192, BLOCK, 3 * BLOCK + 5])
def test_any_slice_gives_the_same_values(start: int, count: int) -> None:
    key = seeds.derive(11, "noise", 0)
    whole = standard_normal(key, 10 * BLOCK)
    assert np.array_equal(standard_normal(key, count, start), whole[start : start + count])


def test_a_step_repeats_itself_and_differs_from_all_else() -> None:
    again = draw(0)
    assert np.array_equal(again, VALUES)
    assert again.dtype == np.float64
    for other in (draw(1), draw(0, root=12), draw(0, root=bytes(32))):
        assert not np.isclose(other, VALUES, rtol=1e-9, atol=0).any()


def test_the_scale_scales_the_same_draw_and_another_purpose_is_another_draw() -> None:
    assert np.allclose(step_noise(11, 0, 1000, 2 * STD), 2 * VALUES[:1000], rtol=1e-15)
    assert not np.isclose(step_noise(11, 0, 1000, STD, "another"), VALUES[:1000], rtol=1e-9).any()
