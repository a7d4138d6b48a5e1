"""From a target epsilon to the noise multiplier (calibration), and to the steps a budget allows.

Both search by what `fedsim.privacy.accountant` says the epsilon of an event is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedsim import validate
from fedsim.privacy import calibrations, events, loss_distribution
from fedsim.privacy.accountant import (
    EpsilonResult,
    answering,
    check_asked,
    epsilon,
    named,
    refuse_approximation,
    value_of,
)
from fedsim.privacy.events import Release
from fedsim.privacy.family import EventFamily
from fedsim.validate import InputError

CALIBRATION_TOLERANCE = 1e-4

_COARSE = 0.02  # relative tolerance of the first stage of a PLD calibration
_EDGE = 0.01  # a calibration further than this below its target ended at the edge of the range
_SIGMA_RANGE = (1e-4, 1e6)


@dataclass(frozen=True)
class Calibration:
    """A noise multiplier for a target: what the chosen accountant says of it, and what the other says."""

    noise_multiplier: float
    achieved: EpsilonResult
    verified: EpsilonResult


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    family: EventFamily,
    steps: int,
    accountant: str = "pld",
    unit: str = "example",
) -> Calibration:
    """Return the smallest noise multiplier of `family` whose epsilon over `steps` steps is within the target.

    The achieved epsilon is never above the target, and below it by at most 1e-4 of it (in rare cases a
    little more, where refining the grid makes the computed epsilon jump). A number that was found before is
    taken from a file (`calibrations`) if its epsilon, computed anew, says the same.

    Raises:
        InputError: the budget is unreachable; the message names the nearest that is.
    """
    validate.positive(target_epsilon, "target_epsilon")
    refuse_approximation(accountant)
    check_asked(delta, accountant, unit)
    validate.positive(steps, "steps")
    unit_noise = family.event(1.0, steps)
    chosen, accountant = accountant, answering(unit_noise, accountant)

    def gap(log_sigma: float, tolerance: float = loss_distribution.TOLERANCE) -> float:
        event = family.event(math.exp(log_sigma), steps)
        value, _ = value_of(event, float(delta), accountant, tolerance)
        if value is None:
            return math.inf
        return math.log(value / target_epsilon) if value > 0.0 else -math.inf

    def exact(log_sigma: float) -> bool:
        return -CALIBRATION_TOLERANCE <= gap(log_sigma) <= 0.0

    # Nobody can look into a family: what it releases at two noise multipliers tells families apart, and
    # what a file says for another one is not exact.
    found_at = [family.event(sigma, steps) for sigma in (1.0, 2.0)]
    released = [(events.releases(event), events.apart(event)[1]) for event in found_at]
    key = calibrations.key(float(target_epsilon), float(delta), released, accountant)
    held = calibrations.recall(key)
    if held is not None and math.log(_SIGMA_RANGE[0]) <= held <= math.log(_SIGMA_RANGE[1]) and exact(held):
        found = held
    else:
        start = _first_guess(target_epsilon, delta, events.releases(unit_noise))
        found = _search(gap, start, accountant)
        if exact(found):
            calibrations.keep(key, found)
    event = family.event(math.exp(found), steps)
    result = epsilon(event, delta, accountant, unit)
    # Epsilon 0 meets any target: a target below the smallest positive epsilon ends there.
    if not (-_EDGE < gap(found) <= 0.0 or result.value == 0.0):
        reached = result.note if result.value is None else f"epsilon {result.value:.4g}"
        raise InputError(
            f"target_epsilon {target_epsilon:g} at delta {delta:g} cannot be reached over {steps} steps with "
            f"{result.amplification} by the {accountant} accountant: the nearest is "
            f"{reached} at noise_multiplier {math.exp(found):.4g}. "
            "Change the target, delta, the steps or the batch."
        )
    other = named(chosen).check
    return Calibration(math.exp(found), result, epsilon(event, delta, other, unit))


def max_steps(
    target_epsilon: float,
    delta: float,
    family: EventFamily,
    noise_multiplier: float,
    accountant: str = "pld",
    limit: int = 10_000_000,
) -> int:
    """Return the largest number of steps, at most `limit`, whose epsilon does not exceed the target.

    0 where a single step exceeds it.

    Raises:
        InputError: the epsilon of a single step, or of the first that would be too many, cannot be computed;
            the message says why.
    """
    validate.positive(target_epsilon, "target_epsilon")
    refuse_approximation(accountant)
    check_asked(delta, accountant, "example")
    validate.positive(noise_multiplier, "noise_multiplier")

    first = epsilon(family.event(noise_multiplier, 1), delta, accountant)
    if first.value is None:
        raise InputError(
            f"the epsilon of a single release at delta {delta:g} cannot be computed by the "
            f"{first.accountant} accountant: {first.note}. Use privacy.accountant=rdp, or another delta."
        )

    def result(steps: int) -> EpsilonResult:
        return epsilon(family.event(noise_multiplier, steps), delta, accountant)

    def value(steps: int) -> float:  # what cannot be computed is taken for too much; `decided` looks again
        found = result(steps).value
        return math.inf if found is None else found

    def decided(steps: int) -> int:
        over = None if steps == limit else result(steps + 1)
        if over is not None and over.value is None:
            raise InputError(
                f"the steps within epsilon {target_epsilon:g} at delta {delta:g} cannot be counted by the "
                f"{accountant} accountant: {over.note} (step {steps + 1}). Use privacy.accountant=rdp, or a "
                "larger delta."
            )
        return steps

    if value(1) > target_epsilon:
        return 0
    low, high = 1, 2
    while high <= limit and value(high) <= target_epsilon:
        low, high = high, high * 4
    high = min(high, limit + 1)
    turn = 0
    while high - low > 1:
        middle = (low + high) // 2
        top = value(high) if high <= limit else math.inf
        turn += 1
        if turn % 3 and 0.0 < value(low) < top < math.inf:  # epsilon is close to a power of the steps
            power = math.log(top / value(low)) / math.log(high / low)
            aim = low * (target_epsilon / value(low)) ** (1.0 / power)
            middle = int(min(max(aim, low + 1), high - 1))
        if value(middle) <= target_epsilon:
            low = middle
        else:
            high = middle
    return decided(low)


def _first_guess(target_epsilon: float, delta: float, unit_noise: Sequence[Release]) -> float:
    """Return about the logarithm of the noise multiplier wanted, from the releases at noise multiplier 1: as
    if all were as often and as largely sampled as the most, which for equal releases is no assumption."""
    protected = [release for release in unit_noise if release.noise_multiplier > 0.0]
    if not protected:
        return 0.0
    rate = max(release.sampling_rate for release in protected)
    times = sum(release.times for release in protected)
    start = math.log(_clt_noise_multiplier(target_epsilon, delta, rate, times))
    weight = sum(release.times / release.noise_multiplier**2 for release in protected)
    return start + math.log(weight / times) / 2.0


def _clt_noise_multiplier(target_epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """A first guess only: the central limit of Bu, Dong, Long, Su 2020, with a crude tail."""
    quantile = 0.9 * math.sqrt(-2.0 * math.log(delta))
    mu = math.sqrt(quantile**2 + 2.0 * target_epsilon) - quantile
    if sampling_rate == 1.0:
        return math.sqrt(steps) / mu
    return 1.0 / math.sqrt(math.log1p((mu / sampling_rate) ** 2 / steps))


def _search(gap: Callable[..., float], start: float, accountant: str) -> float:
    """Return where `gap(logarithm of the noise multiplier, tolerance of its epsilon)` ends just below 0."""
    width = 0.15
    if named(
        accountant
    ).searches_coarsely:  # a coarse grid finds the place at a tenth of the price, and the slope there
        start = _solve(lambda x: gap(x, _COARSE), start, width)
        width = 0.02
        slope = (gap(start + width, _COARSE) - gap(start, _COARSE)) / width
        if math.isfinite(slope) and slope < 0.0 and math.isfinite(gap(start)):
            start -= (gap(start) + CALIBRATION_TOLERANCE / 2.0) / slope
        width = 0.004
    return _solve(gap, start, width)


def _solve(gap: Callable[[float], float], start: float, width: float) -> float:
    """Return x, a logarithm of a noise multiplier, with -1e-4 <= gap(x) <= 0 for a decreasing `gap`.

    Where `gap` has no such place in range, the end of the range nearest to one is returned.
    """
    bottom, top = math.log(_SIGMA_RANGE[0]), math.log(_SIGMA_RANGE[1])
    end = min(max(start, bottom), top)
    if -CALIBRATION_TOLERANCE <= gap(end) <= 0.0:
        return end
    upwards = gap(end) > 0.0
    while True:
        before, end = end, min(max(end + (width if upwards else -width), bottom), top)
        if (gap(end) > 0.0) is not upwards:
            return _root_below(gap, min(before, end), max(before, end))
        if end in (bottom, top):
            return end
        width *= 2.0


def _root_below(gap: Callable[[float], float], low: float, high: float) -> float:
    """Root of `gap` by the Illinois method (Dowell, Jarratt 1971); gap(low) > 0 >= gap(high) throughout."""
    aim = CALIBRATION_TOLERANCE / 2.0
    low_gap, high_gap = gap(low) + aim, gap(high) + aim
    last = 0
    while gap(high) < -CALIBRATION_TOLERANCE and high - low > 1e-9:
        middle = (low + high) / 2.0
        if math.isfinite(low_gap) and math.isfinite(high_gap):
            secant = high - high_gap * (high - low) / (high_gap - low_gap)
            edge = (high - low) * 1e-3
            middle = min(max(secant, low + edge), high - edge)
        value = gap(middle)
        if value > 0.0:
            low, low_gap = middle, value + aim
            high_gap, last = (high_gap / 2.0 if last > 0 else high_gap), 1
        else:
            high, high_gap = middle, value + aim
            low_gap, last = (low_gap / 2.0 if last < 0 else low_gap), -1
    return high
