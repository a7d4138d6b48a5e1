"""Epsilon of an event, by any accountant (fedsim.accountants), and how it is stated.

Every value of an accountant that is an upper bound is one under the relation of its event. The other way
round, from a target epsilon to the noise or to the steps, is `fedsim.privacy.search`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import dp_accounting as dp

from fedsim import references, validate
from fedsim.accountants import ACCOUNTANTS, Accountant
from fedsim.privacy import events, loss_distribution
from fedsim.privacy.events import Release
from fedsim.privacy.loss_distribution import Part
from fedsim.validate import InputError

UNITS = ("example", "holder")
MEANINGLESS_ABOVE = 100.0  # e**100 protects nobody; printed with the value, which stays exact
MOST_N_DELTA = 10.0  # N x delta units may be given away whole within (epsilon, delta); above this: refused
WARNED_N_DELTA = 1.0


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
    check_asked(delta, accountant, unit)
    asked, accountant = accountant, answering(event, accountant)
    value, note = value_of(event, float(delta), accountant)
    if reason := unsupported(event, asked):
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
    check_asked(delta, accountant, "holder")
    if examples_of_holder < 1:
        raise InputError(f"examples_of_holder must be at least 1, got {examples_of_holder}.")
    count = int(examples_of_holder)
    found = events.releases(event)
    parts = parts_of(event, count)
    accountant, relation = answering(event, accountant), events.relation(event)
    if count > 1 and events.apart(event)[1] is not None:
        value, note = None, "not available: the best of a hidden number of runs is bounded for examples only"
    elif count > 1 and relation == events.REPLACE:
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
        value, note = epsilon_of_parts(parts, float(delta), accountant, selection=events.apart(event)[1])
    if value is not None and MEANINGLESS_ABOVE < value < math.inf:
        reading = f"no meaningful protection of a holder with {count} examples"
        note = f"{note}; {reading}" if note else reading
    amplification = _amplification(found, relation)
    if count > 1:
        amplification += f", {count} examples of the holder drawn independently"
    return EpsilonResult(value, delta, relation, accountant, "holder", amplification, note)


def check_asked(delta: float, accountant: str, unit: str) -> None:
    """Refuse a delta out of range, an unknown accountant or unit (InputError)."""
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
            f"privacy.accountant must name a fedsim.accountants.Accountant, but {accountant} is "
            f"{getattr(found, '__qualname__', type(found).__name__)}, which is none. Derive its class from "
            "that one (docs/extend.md), or choose by name: `fedsim list privacy.accountant`."
        )
    return made


def refuse_approximation(accountant: str) -> None:
    """Refuse an accountant by whose answer nothing may be promised.

    Raises:
        InputError: it is no upper bound.
    """
    if not named(accountant).is_upper_bound:
        raise InputError(
            f"privacy.accountant={accountant} is an approximation, not an upper bound on epsilon: no run "
            "states, reaches or stops at an epsilon by it. Use pld or rdp; fedsim epsilon shows this one."
        )


def answering(event: dp.DpEvent, accountant: str) -> str:
    """Return the accountant that answers for `event` when `accountant` is asked."""
    return next(name for name in (accountant, "rdp", "rdp_integer") if not unsupported(event, name))


def unsupported(event: dp.DpEvent, accountant: str) -> str:
    """Return why an accountant has no answer for an event, or ""."""
    asked = named(accountant)
    if events.apart(event)[1] is not None and not asked.takes_selection:
        return "the best of a hidden number of runs is accounted by Renyi DP only"
    return asked.supports(event)


def parts_of(event: dp.DpEvent, examples: int = 1) -> tuple[Part, ...]:
    """Return the releases of `event` as accountants take them, for `examples` examples of one holder."""
    return tuple(
        Part(found.noise_multiplier, found.sampling_rate, found.times, examples, found.sample)
        for found in events.releases(event)
    )


def value_of(
    event: dp.DpEvent, delta: float, accountant: str, tolerance: float = loss_distribution.TOLERANCE
) -> tuple[float | None, str]:
    """Return (epsilon, note) of an event that `accountant` supports."""
    return epsilon_of_parts(parts_of(event), delta, accountant, tolerance, events.apart(event)[1])


@functools.lru_cache(maxsize=4096)
def epsilon_of_parts(
    parts: tuple[Part, ...],
    delta: float,
    accountant: str,
    tolerance: float = loss_distribution.TOLERANCE,
    selection: events.Selection | None = None,
) -> tuple[float | None, str]:
    """Return (epsilon, note) of `accountant`, as `Accountant.epsilon`; kept for the next that asks."""
    if not parts:
        return 0.0, "nothing was released"
    if any(part.noise_multiplier <= 0.0 for part in parts):
        return math.inf, "a release without noise is among the steps"
    asked = named(accountant)
    if selection is None:
        answer = asked.epsilon(parts, delta, tolerance)
    else:
        answer = asked.selected_epsilon(parts, delta, selection)
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
