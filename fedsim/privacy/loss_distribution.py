"""Epsilon from privacy loss distributions: dp_accounting's PLD on a grid chosen for the problem.

A loss distribution lives on a grid of spacing h ("connect the dots", Doroshenko et al. 2022). Its epsilon
is an upper bound for every h, with an error that falls like h**2, or like h where losses are far above 1.
No single h serves both epsilon 0.005 and epsilon 10**6, so we start from a coarse grid that fits the loss of
one release and refine by 4 until epsilon moves by less than 0.1 %; what is left of the error is then about
a fifteenth of that (at most a third where losses are large). The grid depends on the releases alone, never
on the machine or the time it takes. Releases without sampling alone need no grid: their composition is one
Gaussian, whose epsilon is exact (Balle, Wang 2018, equation 6).

Where double precision ends the answer is None with a reason, not a number:
* the FFT that composes n releases has a round-off floor (measured: 0.02 % too low at delta 1e-11 for
  n = 10**4), hence delta must be at least 1e-14 * max(n, 10**4);
* the mass of one grid cell is a second difference, whose round-off grows like 1 / h and adds mass, so a grid
  is not refined below the h at which that could matter;
* grids above a fixed size are not built.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import dp_accounting as dp
import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from numpy.typing import NDArray
from scipy import special, stats

from fedsim.privacy import single_release

TOLERANCE = 1e-3  # relative change of epsilon at which refining stops
_REFINE = 4.0
_ROUNDS = 10
_MAX_STEP = 500.0  # the library forms exp(h)
_MAX_SINGLE = 400_000  # grid points of one release
_MAX_SINGLE_MIXTURE = 25_000  # mixtures are inverted numerically, about 5 microseconds a point
_MAX_COMPOSED = 6_000_000  # grid points after composition: about 0.5 GB and 3 s
_MAX_ROUND_OFF = 0.1
_MAX_SENSITIVITIES = 128
_TAIL_SHARE = 1e-4  # of delta, spent on the binomial tails of mixtures
_MIXTURE_LOG_MASS = -40.0  # per release; the library counts it as infinite loss
_TAIL_QUANTILE = 10.0  # standard deviations the library keeps (mass e**-50), rounded up


class Part(NamedTuple):
    """Equal releases of one step: what `examples` examples of one holder lose in `times` of them.

    Each of the `examples` is drawn independently with `sampling_rate`; the sum then moves by at most the
    number drawn times the sensitivity of one example. `sample` is that of `events.Release`: such a part has
    no answer here but where everybody is drawn.
    """

    noise_multiplier: float
    sampling_rate: float
    times: int
    examples: int = 1
    sample: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Loss:
    """Width and standard deviation of the loss of one release."""

    width: float
    deviation: float


def epsilon(parts: tuple[Part, ...], delta: float, tolerance: float = TOLERANCE) -> tuple[float | None, str]:
    """Return (upper bound on epsilon, note) for the composition of `parts` under add/remove one.

    `tolerance` is the relative change at which refining stops; searches start with a wider one.

    The value is None, with the reason in the note, where it cannot be computed soundly.
    """
    parts = _merge_gaussians(parts)
    if len(parts) == 1 and parts[0].sampling_rate == 1.0:
        return gaussian(parts[0].noise_multiplier, delta)
    releases = sum(part.times for part in parts)
    floor = 1e-14 * max(releases, 10_000)
    if delta < floor:
        return None, (
            f"not computable: PLD in double precision needs delta >= {floor:.0e} for {releases} releases; "
            "use the rdp accountant"
        )
    mixture = any(part.examples > 1 for part in parts)
    spent = _TAIL_SHARE * delta if mixture else 0.0
    tail = spent / releases
    losses = [_loss_of(part, tail) for part in parts]
    step = min(_first_step(part, loss) for part, loss in zip(parts, losses, strict=True))
    best: float | None = None
    change = math.inf
    obstacle = ""
    for _ in range(_ROUNDS):
        obstacle = _obstacle(parts, losses, step)
        if obstacle:
            break
        value = _on_grid(parts, step, delta - spent, tail)
        if value is None:
            obstacle = "a number on the way exceeds double precision"
            break
        value += 2.0 * spent  # what the cut tails may add; see mixture_weights
        if best is not None:
            change = (best - value) / value if value > 0 else 0.0
        best = value if best is None else min(best, value)
        if change <= tolerance:
            return best, ""
        step = _next_step(parts, losses, step)
    if best is None:
        return None, f"too large to compute: {obstacle}"
    shown = f"{change:.1%} at the last refinement" if math.isfinite(change) else "not refined"
    return best, f"upper bound on a coarse grid ({shown})"


def _merge_gaussians(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Replace all releases without sampling by the one Gaussian that equals their composition."""
    precision = sum(p.times * (p.examples / p.noise_multiplier) ** 2 for p in parts if p.sampling_rate == 1.0)
    rest = tuple(p for p in parts if p.sampling_rate < 1.0)
    return (*rest, Part(1.0 / math.sqrt(precision), 1.0, 1)) if precision else rest


def gaussian(noise_multiplier: float, delta: float) -> tuple[float | None, str]:
    with np.errstate(all="ignore"):
        value = float(dp.get_epsilon_gaussian(noise_multiplier, delta))
    if math.isfinite(value):
        return value, ""
    return None, "too large to compute: epsilon exceeds double precision"


@functools.lru_cache(maxsize=256)
def mixture_weights(
    examples: int, sampling_rate: float, tail: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (sensitivities, probabilities), each (k,), standing in for Binomial(examples, sampling_rate).

    The upper tail, of probability p <= `tail`, is cut off. Over n releases that is undone exactly by
    computing epsilon at delta - n * p and adding 2 * n * p to it: the sum with the unit is the cut mixture
    with probability at least (1 - p)**n >= exp(-2 * n * p). The lower tail is moved up to the first value
    kept, and if more than 128 values remain neighbours are merged upwards; moving probability to a larger
    sensitivity never lowers epsilon (Choquette-Choo, Ganesh, Steinke, Thakurta 2023, section 4).
    """
    binomial = stats.binom(examples, sampling_rate)
    low = max(0, int(binomial.ppf(tail)))
    high = min(examples, int(binomial.isf(tail)) + 1)
    values = np.arange(low, high + 1)
    weights = binomial.pmf(values)
    weights[0] = binomial.cdf(low)
    stride = -(-values.size // _MAX_SENSITIVITIES)
    if stride > 1:
        weights = np.bincount(np.arange(values.size) // stride, weights=weights)
        values = np.minimum(low + (np.arange(weights.size) + 1) * stride - 1, high)
    return values.astype(np.float64), weights / weights.sum()


@functools.lru_cache(maxsize=1024)
def _loss_of(part: Part, tail: float) -> _Loss:
    """Width and standard deviation of ln(P/Q) under P, the sum with the unit, by quadrature."""
    sigma = part.noise_multiplier
    sensitivities, weights = _sensitivities(part, tail)
    normal = np.linspace(-_TAIL_QUANTILE, _TAIL_QUANTILE, 2001 if sensitivities.size <= 2 else 201)
    density = np.exp(-0.5 * normal**2)
    points = np.append(sensitivities[:, None] + sigma * normal[None, :], -_TAIL_QUANTILE * sigma)
    mass = np.append(weights[:, None] * density[None, :], 0.0)  # the last point: where Q's own tail ends
    exponents = (points[:, None] - 0.5 * sensitivities[None, :]) * sensitivities[None, :] / sigma**2
    losses = special.logsumexp(exponents, axis=1, b=weights[None, :])
    mean = np.average(losses, weights=mass)
    deviation = math.sqrt(float(np.average((losses - mean) ** 2, weights=mass)))
    return _Loss(width=float(losses.max() - losses.min()), deviation=deviation)


def _sensitivities(part: Part, tail: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if part.sampling_rate == 1.0:
        return np.array([1.0]), np.array([1.0])
    if part.examples == 1:
        return np.array([0.0, 1.0]), np.array([1.0 - part.sampling_rate, part.sampling_rate])
    return mixture_weights(part.examples, part.sampling_rate, tail)


def _first_step(part: Part, loss: _Loss) -> float:
    # A quarter of the deviation carries the shape of a release; the share of the width matters for rare,
    # large losses, whose deviation is tiny.
    share = 2000.0 if part.examples == 1 else 200.0
    return min(max(loss.width / share, loss.deviation / 4.0), _MAX_STEP)


def _next_step(parts: tuple[Part, ...], losses: list[_Loss], step: float) -> float:
    """Return a quarter of `step`, or the finest a mixture's size allows if that is still a gain of 1.5."""
    finest = max(
        (
            loss.width / (_MAX_SINGLE_MIXTURE - 1)
            for part, loss in zip(parts, losses, strict=True)
            if part.examples > 1
        ),
        default=0.0,
    )
    smaller = step / _REFINE
    return finest if smaller < finest < step / 1.5 else smaller


def _obstacle(parts: tuple[Part, ...], losses: list[_Loss], step: float) -> str:
    """Say why a grid of spacing `step` is not used, or return an empty string."""
    composed = round_off = 0.0
    for part, loss in zip(parts, losses, strict=True):
        points = loss.width / step + 1.0
        if points > (_MAX_SINGLE if part.examples == 1 else _MAX_SINGLE_MIXTURE):
            return f"one release needs {points:.1e} grid points"
        composed += _composed_points(points, loss.deviation / step, part.times)
        round_off += 0.0 if part.times == 1 else part.times * points * 2.0**-53 / min(step, 1.0)
    if composed > _MAX_COMPOSED:
        return f"the composition needs {composed:.1e} grid points"
    if round_off > _MAX_ROUND_OFF:
        return "the loss of one release is below what double precision resolves over so many releases"
    return ""


def _composed_points(points: float, deviation: float, count: int) -> float:
    """Estimate the library's grid after self-composition, which it cuts by Chernoff bounds at 1e-15."""
    if count == 1:
        return points
    slope = math.sqrt(70.0 / count) / max(deviation, 1e-12)
    slope = min(max(slope, 1.0 / points), 20.0 / points)
    side = count * slope * deviation**2 / 2.0 + 35.0 / slope
    return min(count * points, 2.0 * side + 2.0 * points)


def _on_grid(parts: tuple[Part, ...], step: float, delta: float, tail: float) -> float | None:
    """Epsilon on one grid, or None where the arithmetic leaves the range of doubles."""
    total: pld.PrivacyLossDistribution | None = None
    try:
        with np.errstate(all="ignore"):
            for part in parts:
                one = _single(part.noise_multiplier, part.sampling_rate, part.examples, step, tail)
                many = one if part.times == 1 else one.self_compose(part.times)
                total = many if total is None else total.compose(many)
            assert total is not None
            value = float(total.get_epsilon_for_delta(delta))
            if not math.isfinite(value) or 690.0 < value < 760.0:
                value = _by_bisection(total, delta)  # exp(-epsilon) is subnormal: the library divides by it
    except (ArithmeticError, MemoryError, ValueError):
        return None  # reported by the caller as not computable
    return value if math.isfinite(value) else None


def _by_bisection(total: pld.PrivacyLossDistribution, delta: float) -> float:
    """Smallest epsilon with delta(epsilon) <= delta, rounded up by at most 1e-6 of it; inf if above 1e18."""
    low, high = 0.0, 1024.0
    while float(total.get_delta_for_epsilon(high)) > delta:
        low, high = high, 2.0 * high
        if high > 1e18:
            return math.inf
    while high - low > 1e-6 * high:
        middle = (low + high) / 2.0
        if float(total.get_delta_for_epsilon(middle)) > delta:
            low = middle
        else:
            high = middle
    return high


@functools.lru_cache(maxsize=32)
def _single(
    sigma: float, rate: float, examples: int, step: float, tail: float
) -> pld.PrivacyLossDistribution:
    if rate == 1.0:
        return pld.from_gaussian_mechanism(sigma, value_discretization_interval=step)
    if examples == 1:
        return single_release.sampled_gaussian(sigma, rate, step)
    return single_release.mixture(sigma, *mixture_weights(examples, rate, tail), step, _MIXTURE_LOG_MASS)
