"""Epsilon of an event, the noise for a target epsilon, and the steps a budget allows.

By any accountant (fedsim.accountants); every value of one that is an upper bound is one under the relation of
its event.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import dp_accounting as dp

from fedsim import references, validate
from fedsim.accountants import ACCOUNTANTS, Accountant
from fedsim.privacy import calibrations, events, loss_distribution
from fedsim.privacy.events import Release
from fedsim.privacy.family import EventFamily
from fedsim.privacy.loss_distribution import Part
from fedsim.validate import InputError

UNITS = ("example", "holder")
MEANINGLESS_ABOVE = 100.0  # e**100 protects nobody; printed with the value, which stays exact
MOST_N_DELTA = 10.0  # N x delta units may be given away whole within (epsilon, delta); above this: refused
WARNED_N_DELTA = 1.0
CALIBRATION_TOLERANCE = 1e-4

_COARSE = 0.02  # relative tolerance of the first stage of a PLD calibration
_EDGE = 0.01  # a calibration further than this below its target ended at the edge of the range
_SIGMA_RANGE = (1e-4, 1e6)


@dataclass(frozen=True)
class EpsilonResult:
    """An epsilon together with everything it depends on; never print the value alone.

    Attributes:
        value: upper bound on epsilon; math.inf where nothing is claimed, None where it could not be computed.
        delta: the delta it holds for.
        relation: neighbouring relation.
        accountant: the one that answered, by its name.
        unit: whose presence is protected, "example" or "holder".
        amplification: what sampling the value takes credit for.
        note: empty, or why there is no value or how to read it.
        n_delta: N x delta for the N units of the data: so many could be given away whole, on average, by a
            mechanism of this epsilon and delta. None where N is not known.
    """

    value: float | None
    delta: float
    relation: str
    accountant: str
    unit: str
    amplification: str
    note: str = ""
    n_delta: float | None = None

    def among(self, units: int) -> EpsilonResult:
        """Return the same for data of `units` units: with N x delta, and a note where that is above 1.

        Raises:
            InputError: it is above 10.
        """
        n_delta = check_delta(self.delta, units, self.unit)
        note = (
            f"WARNING: N x delta is above 1, use a delta below {1 / units:.1g}"
            if n_delta > WARNED_N_DELTA
            else ""
        )
        return replace(self, n_delta=n_delta, note="; ".join(part for part in (self.note, note) if part))

    @property
    def finite(self) -> bool:
        """Return whether there is a finite epsilon to claim."""
        return self.value is not None and math.isfinite(self.value)

    def describe(self) -> str:
        """Return one line with the value and all that belongs to it."""
        if self.value is None:
            head = "epsilon not computed"
        elif math.isinf(self.value):
            head = "no claimable epsilon"
        else:
            head = f"epsilon {self.value:.5g}"
        n_delta = "unknown" if self.n_delta is None else f"{self.n_delta:.2g}"
        line = (
            f"{head} at delta {self.delta:g} (N x delta {n_delta}) per {self.unit} "
            f"({self.relation}; accountant {self.accountant}; {self.amplification})"
        )
        return f"{line}: {self.note}" if self.note else line


def check_delta(delta: float, units: int, unit: str = "example") -> float:
    """Return N x delta.

    Raises:
        InputError: it is above MOST_N_DELTA.
    """
    validate.positive(units, f"number of {unit}s")
    n_delta = units * delta
    if n_delta > MOST_N_DELTA:
        raise InputError(
            f"privacy.delta must be at most {MOST_N_DELTA / units:.2g} for {units:g} {unit}s, got {delta:g}: "
            f"N x delta is {n_delta:.3g}, and a mechanism that gives away that many {unit}s whole would keep "
            f"to it. Use a delta below 1 / N = {1 / units:.2g}."
        )
    return n_delta


@dataclass(frozen=True)
class Calibration:
    """A noise multiplier for a target: what the chosen accountant says of it, and what the other says."""

    noise_multiplier: float
    achieved: EpsilonResult
    verified: EpsilonResult


def epsilon(event: dp.DpEvent, delta: float, accountant: str = "pld", unit: str = "example") -> EpsilonResult:
    """Return the epsilon of `event` at `delta`.

    Args:
        event: made by `events`: Gaussian, Poisson sampled Gaussian, compositions, non-private.
        delta: 0 < delta < 1.
        accountant: a name of fedsim.accountants, or package.module:Object.
        unit: what the event's neighbouring relation adds or removes; a label, it changes no number.

    Raises:
        InputError: unknown accountant, unit or kind of event; delta out of range.
    """
    _check(delta, accountant, unit)
    asked, accountant = accountant, _answering(event, accountant)
    value, note = _epsilon(_parts(event), float(delta), accountant)
    if reason := named(asked).supports(event):
        note = "; ".join(part for part in (note, f"{asked} has no answer: {reason}") if part)
    found = events.releases(event)
    relation = events.relation(event)
    return EpsilonResult(value, delta, relation, accountant, unit, _amplification(found, relation), note)


def holder_epsilon(
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    examples_of_holder: int,
    accountant: str = "pld",
) -> EpsilonResult:
    """Return a whole holder's epsilon under an example-level mechanism; see `holder_epsilon_of_event`."""
    event = events.composed(events.gaussian_step(noise_multiplier, sampling_rate), steps)
    return holder_epsilon_of_event(event, delta, examples_of_holder, accountant)


def holder_epsilon_of_event(
    event: dp.DpEvent, delta: float, examples_of_holder: int, accountant: str = "pld"
) -> EpsilonResult:
    """Return what adding or removing a holder with all of its examples loses under `event`.

    `event` is that of the example-level mechanism. The number of the holder's examples in a draw is
    Binomial(m, q), and that number bounds the shift of the sum: a mixture of Gaussians (Choquette-Choo et
    al. 2023, Corollary 4.7), composed over the steps. Only PLD can compute it, so `accountant` "rdp"
    answers with a value only for m = 1 or without sampling.

    Raises:
        InputError: m below 1, and as `epsilon`.
    """
    _check(delta, accountant, "holder")
    if examples_of_holder < 1:
        raise InputError(f"examples_of_holder must be at least 1, got {examples_of_holder}.")
    count = int(examples_of_holder)
    found = events.releases(event)
    parts = _parts(event, count)
    accountant, relation = _answering(event, accountant), events.relation(event)
    if count > 1 and relation == events.REPLACE:
        value, note = (
            None,
            "not available: how many of a holder's examples a fixed-size draw takes is not bounded",
        )
    elif (
        not named(accountant).takes_groups
        and count > 1
        and any(release.sampling_rate < 1.0 for release in found)
    ):
        value, note = None, "Renyi DP of a mixture of Gaussians is not available; use pld"
        if events.renyi_only(event):
            note = "not available: the mechanism is bounded at whole Renyi orders only"
    else:
        value, note = _epsilon(parts, float(delta), accountant)
    if value is not None and MEANINGLESS_ABOVE < value < math.inf:
        reading = f"no meaningful protection of a holder with {count} examples"
        note = f"{note}; {reading}" if note else reading
    amplification = _amplification(found, relation)
    if count > 1:
        amplification += f", {count} examples of the holder drawn independently"
    return EpsilonResult(value, delta, relation, accountant, "holder", amplification, note)


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
    _check(delta, accountant, unit)
    validate.positive(steps, "steps")
    unit_noise = family.event(1.0, steps)
    chosen, accountant = accountant, _answering(unit_noise, accountant)

    def gap(log_sigma: float, tolerance: float = loss_distribution.TOLERANCE) -> float:
        parts = _parts(family.event(math.exp(log_sigma), steps))
        value, _ = _epsilon(parts, float(delta), accountant, tolerance)
        if value is None:
            return math.inf
        return math.log(value / target_epsilon) if value > 0.0 else -math.inf

    def exact(log_sigma: float) -> bool:
        return -CALIBRATION_TOLERANCE <= gap(log_sigma) <= 0.0

    # Nobody can look into a family: what it releases at two noise multipliers tells families apart, and
    # what a file says for another one is not exact.
    released = [events.releases(family.event(sigma, steps)) for sigma in (1.0, 2.0)]
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
    _check(delta, accountant, "example")
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


def _check(delta: float, accountant: str, unit: str) -> None:
    if not 0.0 < delta < 1.0:
        raise InputError(f"delta must be above 0 and below 1, got {delta!r}. Use at most 1 / examples.")
    named(accountant)
    validate.one_of(unit, UNITS, "unit")


def named(accountant: str) -> Accountant:
    """Return the accountant of a name, or of package.module:Object.

    Raises:
        InputError: there is none (with the nearest name), or it is something else.
    """
    found = ACCOUNTANTS.find(accountant)
    made = references.called(found, {}, {}, accountant) if isinstance(found, type) else found
    if not isinstance(made, Accountant):
        raise InputError(
            f"privacy.accountant must name a fedsim.accountants.Accountant, but {accountant} is {found!r}."
        )
    return made


def refuse_approximation(accountant: str) -> None:
    """Refuse an accountant by whose answer nothing may be promised.

    Raises:
        InputError: it is no upper bound.
    """
    if not named(accountant).is_upper_bound:
        raise InputError(
            f"accountant {accountant} is an approximation, not an upper bound on epsilon: it calibrates no "
            "noise and stops no run. Use pld or rdp."
        )


def _answering(event: dp.DpEvent, accountant: str) -> str:
    """Return the accountant that answers for `event` when `accountant` is asked."""
    return next(name for name in (accountant, "rdp", "rdp_integer") if not named(name).supports(event))


def _parts(event: dp.DpEvent, examples: int = 1) -> tuple[Part, ...]:
    return tuple(
        Part(found.noise_multiplier, found.sampling_rate, found.times, examples, found.sample)
        for found in events.releases(event)
    )


@functools.lru_cache(maxsize=4096)
def _epsilon(
    parts: tuple[Part, ...], delta: float, accountant: str, tolerance: float = loss_distribution.TOLERANCE
) -> tuple[float | None, str]:
    if not parts:
        return 0.0, "nothing was released"
    if any(part.noise_multiplier <= 0.0 for part in parts):
        return math.inf, "a release without noise is among the steps"
    asked = named(accountant)
    answer = asked.epsilon(parts, delta, tolerance)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise InputError(f"accountant {accountant} must answer with (epsilon, note), got {answer!r}.")
    value, note = answer
    if not asked.is_upper_bound:
        note = "; ".join(part for part in (note, "an approximation, not a bound") if part)
    return value, note


def _amplification(found: tuple[Release, ...], relation: str) -> str:
    rates = sorted({release.sampling_rate for release in found if release.noise_multiplier > 0.0})
    if not rates:
        return "no amplification"
    if rates == [1.0]:
        return "no amplification (full batch)"
    how = "Poisson sampling" if relation == events.ADD_REMOVE else "sampling without replacement"
    if len(rates) == 1:
        return f"{how} with rate {rates[0]:.4g}"
    return f"{how} with rates {rates[0]:.4g} to {rates[-1]:.4g}"


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
