"""Noise in shares: rounding without bias, the right variance for any survivors, one law with central noise.

False alarms: every check rejects correct noise with probability at most 1e-6; keys are fixed. Each is also
run on a version that is wrong in the way it looks for, and must reject it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedsim import seeds
from fedsim.engine.experiment import prepare
from fedsim.noise.gaussian import step_noise
from fedsim.noise.shares import NoiseShares, Quantiser, hadamard
from fedsim.privacy import ledger
from fedsim.validate import InputError, RunError
from tests.conftest import final, small, train

ALARM = 1e-6
LENGTH = 1500
Array = NDArray[np.float64]
SIGNS = seeds.derive(2, "signs")


def key(*ids: int) -> bytes:
    return seeds.derive(2, "test", *ids)


def test_the_transform_is_an_isometry_and_its_own_inverse() -> None:
    x = seeds.stream(1, "x").normal(size=1024)
    assert np.allclose(hadamard(hadamard(x)), x, atol=1e-12)
    assert np.linalg.norm(hadamard(x)) == pytest.approx(np.linalg.norm(x))
    table = np.stack([hadamard(row) for row in np.eye(8)]) * math.sqrt(8)
    assert np.array_equal(np.abs(table), np.ones((8, 8)))
    assert np.allclose(table @ table.T, 8 * np.eye(8))
    with pytest.raises(InputError, match="power of two"):
        hadamard(np.zeros(12))


@pytest.mark.parametrize("rotate", [True, False])
def test_decoding_undoes_encoding_up_to_the_rounding(rotate: bool) -> None:
    x = seeds.stream(1, "x").normal(size=LENGTH)
    quantiser = Quantiser(LENGTH, 1e6, rotate)
    whole = quantiser.encode(x, SIGNS, key(0))
    assert whole.shape == (quantiser.dimension,) == ((2048,) if rotate else (LENGTH,))
    assert np.abs(quantiser.decode(whole, SIGNS) - x).max() < (5e-6 if rotate else 1e-6)
    with pytest.raises(InputError, match="must have 1500 entries"):
        quantiser.encode(x[:-1], SIGNS, key(0))


def unbiased(rounded: NDArray[np.int64], wanted: Array) -> bool:
    """The mean over repetitions (n, D) is `wanted`: chi-square of all coordinates together."""
    up = wanted - np.floor(wanted)
    keep = (up > 0.01) & (up < 0.99)
    z = (rounded.mean(axis=0) - wanted)[keep] / np.sqrt((up * (1 - up))[keep] / len(rounded))
    return bool(stats.chi2.sf(float(z @ z), z.size) > ALARM)


def test_rounding_is_unbiased_and_independent_over_coordinates() -> None:
    x = seeds.stream(1, "x").normal(size=LENGTH)
    quantiser = Quantiser(LENGTH, 3.3, rotate=False)
    rounded = np.stack([quantiser.encode(x, SIGNS, key(i)) for i in range(2000)])
    assert unbiased(rounded, x * 3.3)
    assert not unbiased(rounded + (np.arange(2000) % 20 == 0)[:, None], x * 3.3), (
        "one in twenty a unit higher"
    )
    nearest = np.broadcast_to(np.rint(x * 3.3).astype(np.int64), rounded.shape)
    assert not unbiased(nearest, x * 3.3), "rounding to the nearest is biased"
    errors = rounded - x * 3.3
    neighbours = (errors[:, 1:] * errors[:, :-1]).mean()
    assert abs(neighbours) < 5 * 0.25 / math.sqrt(errors.size)


def test_one_more_example_moves_the_sum_by_its_own_unbiased_rounding() -> None:
    """What the privacy proof needs: with one dither the rounded sums differ by floor or ceiling of g, and in
    mean by g, whatever the rest of the sum is."""
    rest, gradient = seeds.stream(1, "rest").normal(size=(2, LENGTH)) * np.array([[40.0], [1.0]])
    quantiser = Quantiser(LENGTH, 2.7, rotate=False)
    moved = np.stack(
        [
            quantiser.encode(rest + gradient, SIGNS, key(i)) - quantiser.encode(rest, SIGNS, key(i))
            for i in range(2000)
        ]
    )
    g = gradient * 2.7
    assert np.all((moved == np.floor(g)) | (moved == np.ceil(g)))
    assert unbiased(moved, g)
    fresh = np.stack(
        [
            quantiser.encode(rest + gradient, SIGNS, key(1, i)) - quantiser.encode(rest, SIGNS, key(i))
            for i in range(50)
        ]
    )
    assert not np.all((fresh == np.floor(g)) | (fresh == np.ceil(g))), "two dithers move it further"


def test_bounds_hold_with_room_and_rotation_makes_them_small() -> None:
    for rotate, spike in ((True, True), (True, False), (False, True)):
        x = np.zeros(LENGTH)
        x[3] = 7.0
        if not spike:
            x = seeds.stream(1, "x").normal(size=LENGTH)
            x *= 7.0 / np.linalg.norm(x)
        quantiser = Quantiser(LENGTH, 1000.0, rotate)
        bound = quantiser.bound(7.0, vectors=10)
        assert np.abs(quantiser.encode(x, SIGNS, key(0))).max() <= bound
        assert bound < (2000 if rotate else 7010)
    shares = NoiseShares(1e6, 10, 10)
    drawn = np.stack([shares.sample(key(i), 100_000) for i in range(10)])
    assert np.abs(drawn).max() < shares.bound(100_000) < 20 * math.sqrt(shares.share)
    for variance in (1e-3, 1.0, 1e6):
        few = NoiseShares(variance, 10, 10)
        for count in (100, 8192):
            sums = [sum(few.sample(key(i, j), count) for j in range(10)) for i in range(20)]
            longest = max(np.linalg.norm(values) for values in sums)
            assert longest < few.norm_bound(count, 10)
    assert NoiseShares(1e6, 10, 10).norm_bound(8192, 10) < 1.3 * math.sqrt(8192 * 1e6)


def variance_is(values: NDArray[np.int64], variance: float) -> bool:
    """Two-sided test of the second moment; Skellam of this size is close to normal."""
    statistic = float(np.sum(values.astype(np.float64) ** 2)) / variance
    tail = min(stats.chi2.cdf(statistic, values.size), stats.chi2.sf(statistic, values.size))
    return bool(tail > ALARM / 2)


@pytest.mark.parametrize("kind", ["skellam", "discrete_gaussian"])
def test_any_sufficient_survivors_have_the_variance_that_is_stated(kind: str) -> None:
    shares = NoiseShares(variance=4000.0, holders=20, min_survivors=12, kind=kind)
    drawn = [shares.sample(key(i), 100_000) for i in range(20)]
    assert shares.realised(12) == pytest.approx(4000.0)
    for survivors in (12, 16, 20):
        total = np.sum(drawn[20 - survivors :], axis=0)
        assert variance_is(total, shares.realised(survivors))
        assert shares.missing(survivors) == 0.0
    assert not variance_is(np.sum(drawn[:11], axis=0), 4000.0), "one survivor too few is rejected"
    assert not variance_is(np.sum(drawn[:1] * 12, axis=0), 4000.0), "one key for all holders is rejected"
    missing = shares.missing(9)
    topped = np.sum(drawn[:9], axis=0) + NoiseShares(missing, 1, 1, kind).sample(key(99), 100_000)
    assert variance_is(topped, 4000.0)
    with pytest.raises(RunError, match="11 holders are left, 12 are needed"):
        shares.refuse_shortfall(11)
    shares.refuse_shortfall(12)


def same_law(values: Array, noise_std: float) -> bool:
    """Scale and shape of central noise: chi-square of the sum of squares and Kolmogorov-Smirnov."""
    z = values / noise_std
    tail = min(stats.chi2.cdf(float(z @ z), z.size), stats.chi2.sf(float(z @ z), z.size))
    return bool(tail > ALARM / 2 and stats.kstest(z, "norm").pvalue > ALARM)


def released(out: Path, *overrides: str) -> Array:
    """The noise on the sum of one step without examples: the update at learning rate B."""
    config = small(
        *("train.steps=1", "train.expected_batch_size=1e-6", "optimizer.name=sgd"),
        *("optimizer.learning_rate=1e-6", "model.dtype=float64", *overrides),
    )
    start = prepare(config).model.state_dict()
    origin = np.concatenate([start[name].flatten().numpy() for name in sorted(start)])
    train(config, out)
    return final(out).numpy() - origin


@pytest.mark.parametrize("kind", ["skellam", "discrete_gaussian"])
def test_a_whole_step_without_dropout_has_the_law_of_central_noise(kind: str, tmp_path: Path) -> None:
    """End to end, through rounding, masks and messages: the shares of 10 holders against N(0, 0.5^2)."""
    options = f"noise: {kind}"
    values = released(tmp_path / "a", "preset=shares_dpsgd", f"strategy.options={{{options}}}")
    assert same_law(values, 0.5)
    assert same_law(step_noise(1, 0, values.size, 0.5), 0.5)
    assert not same_law(values * 1.05, 0.5)
    extra = released(
        tmp_path / "b", "preset=shares_dpsgd", f"strategy.options={{{options}, min_survivors: 5}}"
    )
    assert not same_law(extra, 0.5), "twice the variance when all survive and half would do"
    assert same_law(extra, 0.5 * math.sqrt(2))
    assert abs(np.corrcoef(values, extra)[0, 1]) > 0.5, "same keys, larger share: the same stream"


def test_local_noise_is_the_holders_times_the_variance(tmp_path: Path) -> None:
    values = released(tmp_path, "preset=local_dpsgd")
    assert same_law(values, 0.5 * math.sqrt(10))
    assert not same_law(values, 0.5)


def test_dropouts_leave_the_noise_that_the_ledger_states(tmp_path: Path) -> None:
    options = "strategy.options={min_survivors: 4, dropout_rate: 0.35}"
    values = released(tmp_path, "preset=shares_dpsgd", options)
    (record,) = ledger.read(tmp_path / "ledger.jsonl").records
    assert 4 <= record.facts["survivors"] < 10
    assert record.facts["noise_std_of_server"] == 0.0
    stated = record.facts["noise_std_of_holders"]
    assert stated == pytest.approx(0.5 * math.sqrt(record.facts["survivors"] / 4))
    assert same_law(values, stated)
    assert not same_law(values, 0.5 * math.sqrt(10 / 4)), "as if nobody had dropped out"


def test_a_shortfall_is_topped_up_to_the_variance_that_is_accounted(tmp_path: Path) -> None:
    options = "strategy.options={on_shortfall: top_up, dropout_rate: 0.35}"
    values = released(tmp_path, "preset=shares_dpsgd", options)
    (record,) = ledger.read(tmp_path / "ledger.jsonl").records
    survivors = record.facts["survivors"]
    assert survivors < 10
    assert record.facts["noise_std_of_holders"] == pytest.approx(0.5 * math.sqrt(survivors / 10))
    assert record.facts["noise_std_of_server"] == pytest.approx(0.5 * math.sqrt(1 - survivors / 10))
    assert same_law(values, 0.5)
    assert not same_law(values, record.facts["noise_std_of_holders"]), "without the server's part"
