"""The accountants: against exact formulas, against each other, and where they must not answer."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import optimize, stats

from fedsim.privacy import accountant, events, loss_distribution
from fedsim.privacy.accountant import epsilon, holder_epsilon
from fedsim.privacy.family import EventFamily
from fedsim.privacy.loss_distribution import Part, mixture_weights
from fedsim.privacy.search import max_steps, noise_multiplier_for
from fedsim.validate import InputError

pytestmark = pytest.mark.exact

DELTA = 1e-5


def sampled(noise_multiplier: float, rate: float, steps: int) -> object:
    return events.composed(events.gaussian_step(noise_multiplier, rate), steps)


def exact_gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian with sensitivity / standard deviation mu (Balle, Wang 2018)."""

    def gap(value: float) -> float:
        lower = math.exp(value + stats.norm.logcdf(-value / mu - mu / 2))
        return float(stats.norm.cdf(-value / mu + mu / 2)) - lower - delta

    return float(optimize.brentq(gap, 0.0, 400.0, xtol=1e-12))


def exact_gaussian_epsilon_in_logs(mu: float, delta: float) -> float:
    """The same for epsilons whose exponential overflows."""

    def gap(value: float) -> float:
        upper = stats.norm.logcdf(-value / mu + mu / 2)
        return float(upper + np.log1p(-np.exp(value + stats.norm.logcdf(-value / mu - mu / 2) - upper)))

    return float(optimize.brentq(lambda value: gap(value) - math.log(delta), 1.0, 5000.0, xtol=1e-9))


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (20.0, 100), (0.3, 2), (831.31, 3)])
def test_full_batch_is_exact(sigma: float, steps: int) -> None:
    expected = exact_gaussian_epsilon(math.sqrt(steps) / sigma, DELTA)
    assert epsilon(sampled(sigma, 1.0, steps), DELTA).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(2.0, 0.01, 10**5), (100.0, 1e-3, 10**6)])
def test_many_small_losses_approach_their_gaussian_limit(sigma: float, rate: float, steps: int) -> None:
    limit = exact_gaussian_epsilon(rate * math.sqrt(steps * math.expm1(sigma**-2)), DELTA)
    assert epsilon(sampled(sigma, rate, steps), DELTA).value == pytest.approx(limit, rel=5e-3)


def test_one_sampled_release_is_exact() -> None:
    """At one release the hockey-stick divergence of the mixture is a formula (both directions checked)."""
    sigma, rate = 0.8, 0.3
    found = epsilon(sampled(sigma, rate, 1), DELTA).value
    x = sigma**2 * math.log((math.exp(found) - 1 + rate) / rate) + 0.5  # where the loss equals epsilon
    upper = rate * stats.norm.sf((x - 1) / sigma) + (1 - rate) * stats.norm.sf(x / sigma)
    delta = upper - math.exp(found) * stats.norm.sf(x / sigma)
    assert delta <= DELTA
    assert delta == pytest.approx(DELTA, rel=5e-3)


def test_epsilon_falls_with_noise_and_delta_and_grows_with_rate_and_steps() -> None:
    base = epsilon(sampled(1.0, 0.02, 500), DELTA).value
    assert epsilon(sampled(1.1, 0.02, 500), DELTA).value < base
    assert epsilon(sampled(1.0, 0.02, 500), 1e-4).value < base
    assert epsilon(sampled(1.0, 0.03, 500), DELTA).value > base
    assert epsilon(sampled(1.0, 0.02, 600), DELTA).value > base


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 0.02, 500), (0.5, 0.001, 5000), (5.0, 0.5, 100)])
def test_rdp_is_looser_than_pld_and_objax_looser_than_both(sigma: float, rate: float, steps: int) -> None:
    event = sampled(sigma, rate, steps)
    pld, rdp, objax = (epsilon(event, DELTA, name).value for name in ("pld", "rdp", "rdp_objax"))
    assert pld < rdp < objax


def test_a_mixed_history_lies_between_its_parts() -> None:
    low, high = events.gaussian_step(1.2, 0.02), events.gaussian_step(0.9, 0.05)
    mixed = events.sequence([low] * 50 + [high] * 50 + [events.gaussian_step(3.0, 1.0)])
    for name in ("pld", "rdp"):
        value = epsilon(mixed, DELTA, name).value
        assert epsilon(events.composed(low, 100), DELTA, name).value < value
        assert value < epsilon(events.composed(high, 150), DELTA, name).value


def test_the_order_of_steps_does_not_matter() -> None:
    low, high = events.gaussian_step(1.2, 0.02), events.gaussian_step(0.9, 0.05)
    one = epsilon(events.sequence([low, high] * 10), DELTA)
    assert one == epsilon(events.sequence([high] * 10 + [low] * 10), DELTA)


def test_the_grid_is_fine_enough_for_its_stated_error() -> None:
    for part in (Part(1.0, 0.02, 500), Part(0.5, 0.001, 5000), Part(3.0, 0.08, 2500)):
        usual, _ = loss_distribution.epsilon((part,), DELTA)
        fine, _ = loss_distribution.epsilon((part,), DELTA, tolerance=2e-5)
        assert 0.0 <= usual / fine - 1.0 < 3.5e-4


def test_results_carry_all_that_belongs_to_them() -> None:
    result = epsilon(sampled(1.0, 0.02, 500), DELTA)
    assert (result.delta, result.relation, result.accountant, result.unit) == (
        DELTA,
        "add/remove one",
        "pld",
        "example",
    )
    assert result.amplification == "Poisson sampling with rate 0.02"
    line = result.describe()
    for word in ("epsilon", "1e-05", "example", "add/remove one", "pld", "Poisson"):
        assert word in line
    assert "full batch" in epsilon(sampled(1.0, 1.0, 5), DELTA).amplification


def test_nothing_and_no_protection() -> None:
    nothing = epsilon(events.sequence([]), DELTA)
    assert nothing.value == 0.0
    bare = epsilon(events.sequence([events.gaussian_step(1.0, 0.1), events.non_private_step()]), DELTA)
    assert bare.value == math.inf
    assert not bare.finite
    assert "no claimable epsilon" in bare.describe()


@pytest.mark.parametrize(
    ("event", "delta", "reason"),
    [
        (sampled(1e-5, 0.01, 100), DELTA, "grid points"),
        (sampled(1.0, 0.01, 100), 1e-12, "needs delta"),
        (sampled(1.0, 0.01, 10**8), 1e-7, "needs delta"),
        (sampled(1e3, 1e-4, 10**6), DELTA, "below what double precision"),
    ],
    ids=["tiny noise", "tiny delta", "many releases", "tiny losses"],
)
def test_where_pld_cannot_answer_it_says_so_at_once(event: object, delta: float, reason: str) -> None:
    start = time.perf_counter()
    result = epsilon(event, delta)
    assert result.value is None
    assert reason in result.note
    assert not result.finite
    assert "not computed" in result.describe()
    assert time.perf_counter() - start < 5.0


def test_where_rdp_cannot_answer_it_says_so() -> None:
    result = epsilon(sampled(1e-170, 0.01, 100), DELTA, "rdp")
    assert result.value is None
    assert "overflows" in result.note


@pytest.mark.parametrize("name", ["pld", "rdp"])
@pytest.mark.parametrize(("rate", "steps", "target"), [(0.08, 1000, 3.0), (0.01, 500, 1.0), (1.0, 30, 8.0)])
def test_calibration_meets_the_target_from_below(name: str, rate: float, steps: int, target: float) -> None:
    found = noise_multiplier_for(target, DELTA, EventFamily.gaussian(rate), steps, name)
    assert found.achieved.value <= target
    assert found.achieved.value >= target * (1 - 3e-4)
    assert found.achieved == epsilon(sampled(found.noise_multiplier, rate, steps), DELTA, name)
    assert found.verified.accountant == ("rdp" if name == "pld" else "pld")
    assert (found.verified.value > target) is (name == "pld")  # PLD is the tighter of the two


def test_calibration_is_quick() -> None:
    accountant.epsilon_of_parts.cache_clear()
    start = time.perf_counter()
    noise_multiplier_for(3.0, DELTA, EventFamily.gaussian(0.08), 1000)
    assert time.perf_counter() - start < 5.0


def test_an_unreachable_budget_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"nearest is epsilon .* at noise_multiplier"):
        noise_multiplier_for(1e12, DELTA, EventFamily.gaussian(0.01), 100)
    with pytest.raises(InputError, match="needs delta"):
        noise_multiplier_for(1.0, 1e-14, EventFamily.gaussian(0.01), 100)
    with pytest.raises(InputError, match="target_epsilon"):
        noise_multiplier_for(0.0, DELTA, EventFamily.gaussian(0.01), 100)
    with pytest.raises(InputError, match="sampling rate"):
        noise_multiplier_for(1.0, DELTA, EventFamily.gaussian(1.01), 100)
    with pytest.raises(InputError, match="steps"):
        noise_multiplier_for(1.0, DELTA, EventFamily.gaussian(0.5), 0)


@pytest.mark.parametrize("name", ["pld", "rdp"])
@pytest.mark.parametrize(("sigma", "rate", "target"), [(1.0, 0.02, 2.0), (20.0, 1.0, 3.0), (0.4, 0.01, 50.0)])
def test_max_steps_is_the_last_within_the_target(name: str, sigma: float, rate: float, target: float) -> None:
    steps = max_steps(target, DELTA, EventFamily.gaussian(rate), sigma, name)
    assert epsilon(sampled(sigma, rate, steps), DELTA, name).value <= target
    assert epsilon(sampled(sigma, rate, steps + 1), DELTA, name).value > target


def test_max_steps_at_its_ends() -> None:
    assert max_steps(0.01, DELTA, EventFamily.gaussian(0.5), 0.5) == 0
    assert max_steps(3.0, DELTA, EventFamily.gaussian(0.001), 50.0, "rdp", limit=77) == 77


def test_a_holder_of_one_example_is_an_example() -> None:
    one = holder_epsilon(1.0, 0.02, 500, DELTA, 1)
    assert one.value == epsilon(sampled(1.0, 0.02, 500), DELTA).value
    assert one.unit == "holder"


def test_a_holder_without_sampling_is_a_gaussian_of_that_sensitivity() -> None:
    found = holder_epsilon(40.0, 1.0, 25, DELTA, 8)
    assert found.value == pytest.approx(exact_gaussian_epsilon(8 * 5 / 40, DELTA), rel=1e-9)
    assert holder_epsilon(40.0, 1.0, 25, DELTA, 8, "rdp").value > found.value


def test_one_release_of_a_holder_is_exact() -> None:
    """One release, two examples: the divergence of the three-part mixture by numerical integration."""
    sigma, rate = 1.3, 0.2
    found = holder_epsilon(sigma, rate, 1, DELTA, 2).value
    x = np.linspace(-15, 20, 2_000_001)
    weights = stats.binom.pmf(np.arange(3), 2, rate)
    with_holder = sum(w * stats.norm.pdf(x, k, sigma) for k, w in enumerate(weights))
    without = stats.norm.pdf(x, 0, sigma)
    deltas = [
        np.trapezoid(np.maximum(p - math.exp(found) * q, 0.0), x)
        for p, q in ((with_holder, without), (without, with_holder))
    ]
    assert max(deltas) <= DELTA * (1 + 1e-6)
    assert max(deltas) == pytest.approx(DELTA, rel=5e-3)


def test_holder_epsilon_grows_with_the_holder_and_says_when_it_means_nothing() -> None:
    values = [holder_epsilon(3.632, 0.08, 1000, DELTA, m) for m in (1, 3, 10, 100)]
    numbers = [result.value for result in values]
    assert numbers == sorted(numbers)
    assert "no meaningful protection" not in values[2].note
    assert "no meaningful protection" in values[3].note
    assert "10 examples of the holder" in values[2].amplification
    too_large = holder_epsilon(3.632, 0.08, 1000, DELTA, 10**6)
    assert too_large.value is None
    assert "too large to compute" in too_large.note
    assert holder_epsilon(3.632, 0.08, 1000, DELTA, 10, "rdp").value is None


@pytest.mark.parametrize("mu", [34.0, 34.35, 34.7])
def test_where_exp_of_epsilon_leaves_the_doubles_the_grid_still_answers(mu: float) -> None:
    """Epsilon near 709 to 745: exp(-epsilon) is subnormal or zero."""
    exact = exact_gaussian_epsilon_in_logs(mu, DELTA)
    assert 690 < exact < 770
    part = Part(1.0 / mu, 1.0, 1)
    value = loss_distribution._on_grid((part,), 0.02, DELTA, 0.0)
    assert value == pytest.approx(exact, rel=1e-4)
    assert value >= exact * (1 - 1e-9)


def test_a_holder_at_the_end_of_a_run_is_quick() -> None:
    accountant.epsilon_of_parts.cache_clear()
    loss_distribution._single.cache_clear()
    start = time.perf_counter()
    holder_epsilon(1.1504, 0.02, 1000, DELTA, 100)
    assert time.perf_counter() - start < 10.0


@pytest.mark.parametrize(("examples", "rate"), [(5, 0.3), (100, 0.02), (1000, 0.08), (20_000, 0.5)])
def test_mixture_weights_are_a_distribution_above_the_binomial(examples: int, rate: float) -> None:
    tail = 1e-13
    values, weights = mixture_weights(examples, rate, tail)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert values.size <= 128
    assert values.max() <= examples
    assert (np.diff(values) > 0).all()
    thresholds = np.arange(examples + 1)
    above = np.array([weights[values >= t].sum() for t in thresholds])
    assert (above >= stats.binom.sf(thresholds - 1, examples, rate) - 2 * tail - 1e-12).all()


def test_bad_input_is_refused() -> None:
    event = sampled(1.0, 0.1, 3)
    with pytest.raises(InputError, match="Did you mean 'pld'"):
        epsilon(event, DELTA, "pdl")
    with pytest.raises(InputError, match="unit"):
        epsilon(event, DELTA, "pld", "client")
    for delta in (0.0, 1.0, -1e-5):
        with pytest.raises(InputError, match="delta"):
            epsilon(event, delta)
    with pytest.raises(InputError, match="examples_of_holder"):
        holder_epsilon(1.0, 0.1, 3, DELTA, 0)
