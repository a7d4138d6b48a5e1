"""Integer noise and its accounting: exact mass functions, samplers, Renyi bounds against numerical values.

False alarms of the statistical checks: at most 1e-6 each, with fixed keys; wrong versions are rejected.
"""

from __future__ import annotations

import math

import dp_accounting as dp
import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from fedsim import seeds
from fedsim.noise import discrete
from fedsim.privacy import accountant, events
from fedsim.privacy.discrete import MAX_ORDER, IntegerMechanism, sampled, skellam_divergence
from fedsim.validate import InputError

ALARM = 1e-6
DELTA = 1e-5
KEY = seeds.derive(3, "integer noise")
Array = NDArray[np.float64]


def fits(values: NDArray[np.int64], kind: str, variance: float) -> bool:
    """Chi-square test against the exact mass, cells of expected count 10 or more, tails together."""
    reach = math.ceil(12 * math.sqrt(variance)) + 40
    support = np.arange(-reach, reach + 1)
    expected = values.size * np.exp(discrete.log_mass(kind, variance, support))
    counts = np.bincount(np.clip(values, -reach, reach) + reach, minlength=support.size).astype(float)
    keep = expected >= 10
    observed = np.append(counts[keep], counts[~keep].sum())
    wanted = np.append(expected[keep], values.size - expected[keep].sum())
    if wanted[-1] < 1:
        observed[-2] += observed[-1]
        wanted[-2] += wanted[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    return bool(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > ALARM)


@pytest.mark.parametrize("kind", discrete.KINDS)
@pytest.mark.parametrize("variance", [0.2, 1.0, 30.0, 5000.0])
def test_samples_have_the_exact_distribution(kind: str, variance: float) -> None:
    values = discrete.sample(kind, variance, KEY, 400_000)
    assert fits(values, kind, variance)
    assert not fits(values, kind, variance * 1.05), "five percent more variance is rejected"
    rounded = np.rint(seeds.stream(1, "x").normal(0, math.sqrt(variance), 400_000)).astype(np.int64)
    if variance <= 1.0:
        assert not fits(rounded, kind, variance), "a rounded Gaussian is rejected"


def test_large_variances_have_the_right_moments() -> None:
    variance = 3e8
    z = discrete.sample("skellam", variance, KEY, 400_000) / math.sqrt(variance)
    assert stats.kstest(z, "norm").pvalue > ALARM
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / z.size)
    assert stats.kstest(1.02 * z, "norm").pvalue < ALARM


def test_skellam_is_closed_under_sums() -> None:
    parts = [discrete.sample("skellam", 0.3, seeds.derive(4, "part", i), 200_000) for i in range(10)]
    assert fits(np.sum(parts, axis=0), "skellam", 3.0)
    assert not fits(np.sum(parts[:9], axis=0), "skellam", 3.0), "a missing share is rejected"
    small = [
        discrete.sample("discrete_gaussian", 0.1, seeds.derive(4, "part", i), 200_000) for i in range(10)
    ]
    assert not fits(np.sum(small, axis=0), "discrete_gaussian", 1.0), "the discrete Gaussian is not"


def test_samples_are_keyed_with_random_access() -> None:
    whole = discrete.sample("skellam", 100.0, KEY, 200_000)
    assert np.array_equal(whole[70_000:70_100], discrete.sample("skellam", 100.0, KEY, 100, start=70_000))
    other = discrete.sample("skellam", 100.0, seeds.derive(4, "other"), 200_000)
    for a, b in ((whole, other), (whole[1:], whole[:-1]), (whole[1:] ** 2, whole[:-1] ** 2)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(len(a))


@pytest.mark.parametrize("variance", [0.05, 3.0, 400.0, 20_000.0])
def test_skellam_mass_against_high_precision(variance: float) -> None:
    mpmath.mp.dps = 50
    root = math.sqrt(variance)
    k = np.unique([0, 1, 2, int(root), int(3 * root), int(8 * root) + 2])
    exact = [float(mpmath.log(mpmath.besseli(int(i), variance, maxterms=10**6)) - variance) for i in k]
    assert np.allclose(discrete.log_mass("skellam", variance, k), exact, rtol=0, atol=1e-12)


def test_the_expansion_meets_the_bessel_function_and_sums_to_one() -> None:
    k = np.arange(0, 3200, 7)
    exact = np.log(special.ive(k.astype(float), 99_999.0))
    assert np.abs(discrete._log_bessel(k.astype(float), 99_999.0) - exact).max() < 1e-12
    for variance in (1e5, 1e7, 1e9):
        k = np.arange(0, int(10 * math.sqrt(variance)))
        mass = np.exp(discrete.log_mass("skellam", variance, k))
        assert abs(mass[0] + 2 * mass[1:].sum() - 1) < 1e-12
        assert abs(2 * (mass * k.astype(float) ** 2).sum() / variance - 1) < 1e-11


def test_discrete_gaussian_variance_is_below_its_parameter() -> None:
    assert discrete.discrete_gaussian_variance(0.1) < 0.1
    assert discrete.discrete_gaussian_variance(9.0) == pytest.approx(9.0, rel=1e-12)


def test_wrong_noise_is_refused() -> None:
    with pytest.raises(InputError, match="kind of integer noise"):
        discrete.sample("gaussian", 1.0, KEY, 1)
    with pytest.raises(InputError, match="variance"):
        discrete.sample("skellam", 0.0, KEY, 1)
    with pytest.raises(InputError, match="coarser scale"):
        discrete.sample("skellam", 1e13, KEY, 1)
    with pytest.raises(InputError, match="negative"):
        discrete.sample("skellam", 1.0, KEY, -1)


def numerical(order: float, shift: int, variance: float) -> float:
    """Renyi divergence of Skellam noise shifted by a whole number, in high precision."""
    mpmath.mp.dps = 40
    reach = int(12 * math.sqrt(variance)) + 40 + int(order * shift)
    bessel = {i: mpmath.besseli(i, variance) for i in range(reach + shift + 1)}
    terms = (
        bessel[abs(k - shift)] ** int(order) / bessel[abs(k)] ** int(order - 1)
        for k in range(-reach, reach + 1)
    )
    return float(mpmath.log(mpmath.fsum(terms) * mpmath.exp(-variance)) / (order - 1))


@pytest.mark.parametrize(("variance", "shift"), [(1.0, 1), (4.0, 1), (4.0, 3), (25.0, 2), (100.0, 5)])
def test_skellam_bound_against_numerical_divergence(variance: float, shift: int) -> None:
    for order in (2, 3, 6, 12):
        exact = numerical(order, shift, variance)
        bound = skellam_divergence(np.array([float(order)]), shift**2, shift, variance)[0]
        assert exact <= bound * (1 + 1e-12)
        if variance >= 25.0 and order <= 3:
            assert bound < 1.1 * exact, "tight where the noise is a few units"
        assert order * shift**2 / (2 * variance) > exact * 0.99, "close to the Gaussian's, from below"


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_sampled_bound_against_numerical_divergence_in_both_directions(rate: float) -> None:
    variance, shift = 100.0, 4
    k = np.arange(-260, 261)
    base = discrete.log_mass("skellam", variance, k)
    moved = discrete.log_mass("skellam", variance, k - shift)
    mixed = np.logaddexp(math.log(1 - rate) + base, math.log(rate) + moved)
    orders = np.arange(2, 13, dtype=float)
    bound = sampled(skellam_divergence(orders, shift**2, shift, variance), rate)
    gaussian = dp.rdp.RdpAccountant(list(orders)).compose(
        events.gaussian_step(math.sqrt(variance) / shift, rate)
    )
    for order, allowed, other in zip(orders, bound, gaussian.rdp, strict=True):
        forward = special.logsumexp(order * mixed + (1 - order) * base) / (order - 1)
        reverse = special.logsumexp(order * base + (1 - order) * mixed) / (order - 1)
        assert reverse <= forward <= allowed
        assert allowed < 1.3 * forward
        assert allowed >= other * 0.98


def test_sampling_reproduces_the_library_for_a_gaussian() -> None:
    orders = np.arange(2, 65, dtype=float)
    for sigma, rate in ((1.0, 0.01), (0.6, 0.2), (5.0, 1.0)):
        own = sampled(orders / (2 * sigma**2), rate)
        library = dp.rdp.RdpAccountant(list(orders)).compose(events.gaussian_step(sigma, rate)).rdp
        assert np.allclose(own, library, rtol=1e-9, atol=1e-14)


def moment_of_rounding(gradient: Array, weight: float) -> float:
    """log E exp(weight |Z|^2) for the independent unbiased rounding Z of `gradient`, exactly."""
    low = np.floor(gradient)
    up = gradient - low
    parts = np.logaddexp(np.log1p(-up) + weight * low**2, np.log(up) + weight * (low + 1) ** 2)
    return float(parts.sum())


def test_the_rounding_bound_holds_for_every_kind_of_gradient() -> None:
    dimension, units = 400, 60.0
    rng = seeds.stream(5, "gradients")
    one = np.zeros(dimension)
    one[0] = 1.0
    shapes = [rng.normal(size=dimension), one, np.ones(dimension), rng.laplace(size=dimension) ** 3]
    mechanism = IntegerMechanism(1.0, units, dimension)
    k = np.arange(2.0, 41.0)
    for shape in shapes:
        for length in (units, units * 0.37):
            gradient = shape * length / np.linalg.norm(shape) + 1e-13
            for order in k:
                weight = (order - 1) * order / (2 * mechanism.variance)
                bound = (order - 1) * mechanism._moment(np.array([order]), np.array([weight / (order - 1)]))[
                    0
                ]
                assert moment_of_rounding(gradient, weight) <= bound
    half = np.full(dimension, 2.5)
    assert moment_of_rounding(half, 1e-4) > 1e-4 * float(half @ half), (
        "the Gaussian's bound alone would be too small"
    )


def gaussian_epsilon(sigma: float, rate: float, steps: int) -> float:
    value = accountant.epsilon(
        events.composed(events.gaussian_step(sigma, rate), steps), DELTA, "rdp_integer"
    ).value
    assert value is not None
    return value


@pytest.mark.exact
@pytest.mark.parametrize("kind", discrete.KINDS)
@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 0.02, 1000), (0.7, 0.1, 50), (6.0, 1.0, 10)])
def test_fine_scales_reach_the_gaussian_limit(kind: str, sigma: float, rate: float, steps: int) -> None:
    wanted = gaussian_epsilon(sigma, rate, steps)
    before = math.inf
    for units in (2.0**8, 2.0**10, 2.0**12, 2.0**16):
        mechanism = IntegerMechanism(sigma, units, 8192, kind, 20, 20)
        own = mechanism.epsilon(rate, steps, DELTA)
        recorded = gaussian_epsilon(mechanism.effective_noise_multiplier(), rate, steps)
        assert wanted <= own * (1 + 1e-9)
        assert own <= recorded * (1 + 1e-9), "the event that is recorded is never below the mechanism"
        assert own < before
        before = own
        if units >= 2.0**12:
            assert recorded < 1.02 * wanted
    assert recorded < 1.001 * wanted


def test_effective_noise_dominates_at_every_whole_order() -> None:
    mechanism = IntegerMechanism(0.8, 500.0, 4096, "skellam", 10, 5)
    sigma = mechanism.effective_noise_multiplier()
    k = np.arange(2, MAX_ORDER + 1)
    assert sigma < 0.8
    assert np.all(mechanism.renyi() <= k / (2 * sigma**2) * (1 + 1e-12))
    assert np.any(mechanism.renyi() > k / (2 * (sigma * 1.001) ** 2)), "and no larger sigma does"
    for rate in (0.01, 0.3):
        assert np.all(mechanism.sampled_renyi(rate) <= sampled(k / (2 * sigma**2), rate) * (1 + 1e-9))


def test_discrete_gaussian_shares_pay_for_a_coarse_scale() -> None:
    fine = IntegerMechanism(1.0, 4096.0, 1024, "discrete_gaussian", 100, 100)
    coarse = IntegerMechanism(1.0, 6.0, 1024, "discrete_gaussian", 100, 100)
    assert fine.effective_noise_multiplier() > 0.99
    assert coarse.effective_noise_multiplier() < 0.05
    unproved = IntegerMechanism(1.0, 4.0, 1024, "discrete_gaussian", 100, 100)
    assert unproved.effective_noise_multiplier() == 0.0, (
        "shares of less than half a unit: no theorem, no claim"
    )


@pytest.mark.exact
def test_the_event_is_answered_by_whole_orders_whoever_asks() -> None:
    step = events.renyi_gaussian_step(1.0, 0.1)
    assert events.from_json(events.to_json(step)) == step
    assert step != events.gaussian_step(1.0, 0.1)
    total = events.sequence([step] * 40 + [events.gaussian_step(1.0, 0.1)] * 10)
    values = {name: accountant.epsilon(total, DELTA, name) for name in ("pld", "rdp")}
    assert {v.accountant for v in values.values()} == {"rdp_integer"}
    same = accountant.epsilon(events.composed(events.gaussian_step(1.0, 0.1), 50), DELTA, "rdp_integer").value
    assert values["pld"].value == values["rdp"].value == same
    plain = accountant.epsilon(events.composed(events.gaussian_step(1.0, 0.1), 50), DELTA, "rdp").value
    assert same is not None
    assert plain is not None
    assert plain <= same < 1.03 * plain
    holder = accountant.holder_epsilon_of_event(step, DELTA, 5)
    assert holder.value is None
    assert "whole Renyi orders" in holder.note
    assert accountant.holder_epsilon_of_event(step, DELTA, 1).accountant == "rdp_integer"
