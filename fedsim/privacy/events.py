"""Events: what a step released, in the vocabulary of dp_accounting, and as JSON.

Of an example or of a holder: which of the two is the unit the caller states. A step of DP-SGD with Poisson
sampling is PoissonSampled(q, Gaussian(sigma)) (Abadi et al. 2016; Mironov, Talwar, Zhang 2019), full batch is
plain Gaussian; their relation is add/remove one.

A step that takes a fixed number of B units out of N is SampledWithoutReplacement(N, B, Gaussian(sigma)), with
relation replace one. Sigma is the noise over the bound C on one contribution, as everywhere here; replacing a
unit moves the sum by up to 2 C, that is as adding one does at sigma / 2, which is what `releases` states.
Steps compose by Renyi DP (Wang, Balle, Kasiviswanathan 2019). By privacy loss distributions they have no
answer here: a step is dominated by Poisson sampling's pair in one direction for losses above 0 and by the
reverse pair below, and no single pair is proved to dominate compositions (Lebeda et al. 2024, "Avoiding
pitfalls for privacy accounting of subsampled mechanisms under composition"). dp_accounting takes the
multiplier of this event as noise / 2 C for Renyi DP.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import attr
import dp_accounting as dp

from fedsim import validate
from fedsim.validate import InputError

DISTRIBUTIONS = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}
"""Of the number of runs: eta of the truncated negative binomial distribution; infinity is Poisson's."""

_Kind = tuple[float, float, tuple[int, int] | tuple[()]]


class Selection(NamedTuple):
    """The best of a hidden random number of equal runs is released, and nothing of the others.

    Papernot and Steinke 2022, "Hyperparameter Tuning with Renyi Differential Privacy".

    Attributes:
        mean: of the number of runs, above 1.
        distribution: of the number of runs, one of DISTRIBUTIONS. Poisson's may give 0, the others do not.
    """

    mean: float
    distribution: str = "geometric"


class Release(NamedTuple):
    """One kind of Gaussian release and how often it happened.

    Attributes:
        noise_multiplier: noise standard deviation / sensitivity; 0 means a release without protection.
        sampling_rate: Poisson probability of a unit's example, 0 < q <= 1.
        times: number of such releases.
        sample: (N, B) of a draw of exactly B of N units, whose multiplier is noise / 2 C; None: Poisson.
    """

    noise_multiplier: float
    sampling_rate: float
    times: int
    sample: tuple[int, int] | None = None


@attr.s(frozen=True, slots=True, auto_attribs=True)
class RenyiGaussianDpEvent(dp.GaussianDpEvent):
    """Bounded by Gaussian(noise_multiplier) in Renyi divergence at whole orders, sampled or not.

    The bound is proved for the orders of the "rdp_integer" accountant only (fedsim.privacy.discrete), so
    every accountant answers with that one.
    """

    noise_multiplier: float


def gaussian_step(noise_multiplier: float, sampling_rate: float) -> dp.DpEvent:
    """Return the event of one step: Poisson sampled Gaussian, or plain Gaussian at sampling rate 1.

    Raises:
        InputError: a noise multiplier that is not positive, or a rate outside (0, 1].
    """
    validate.positive(noise_multiplier, "noise_multiplier")
    _check_rate(sampling_rate)
    gaussian = dp.GaussianDpEvent(float(noise_multiplier))
    if sampling_rate == 1.0:
        return gaussian
    return dp.PoissonSampledDpEvent(float(sampling_rate), gaussian)


def selected(event: dp.DpEvent, selection: Selection | None) -> dp.DpEvent:
    """Return the event of the best of a hidden number of runs whose event is `event`; None: of one run.

    Raises:
        InputError: a mean that is not above 1, or an unknown distribution.
    """
    if selection is None:
        return event
    check_selection(selection)
    shape = DISTRIBUTIONS[selection.distribution]
    return dp.dp_event.RepeatAndSelectDpEvent(event, float(selection.mean), shape)


def check_selection(selection: Selection) -> None:
    """Refuse a mean that is not above 1 or not finite, and an unknown distribution (InputError)."""
    validate.one_of(selection.distribution, tuple(DISTRIBUTIONS), "distribution of the number of runs")
    if not 1.0 < selection.mean <= 1e6:
        raise InputError(
            f"mean number of runs must be above 1 and at most 1e+06, got {selection.mean!r}. Of a "
            "single run nothing is chosen: leave out the search, or give it more trials."
        )


def apart(event: dp.DpEvent) -> tuple[dp.DpEvent, Selection | None]:
    """Return the event of one run, and how one was selected; None where there was one run."""
    if isinstance(event, dp.dp_event.RepeatAndSelectDpEvent):
        names = {shape: name for name, shape in DISTRIBUTIONS.items()}
        if event.shape not in names:
            raise _unknown(f"RepeatAndSelectDpEvent of shape {event.shape}")
        return event.event, Selection(event.mean, names[event.shape])
    return event, None


ADD_REMOVE, REPLACE = "add/remove one", "replace one"


def relation(event: dp.DpEvent) -> str:
    """Return the neighbouring relation of an event.

    Raises:
        InputError: parts of it have different ones.
    """
    found = set(_relations(event))
    if len(found) > 1:
        raise InputError(f"releases of one event must have one neighbouring relation, got {sorted(found)}.")
    return found.pop() if found else ADD_REMOVE


def _relations(event: dp.DpEvent) -> Iterator[str]:
    match event:
        case dp.SelfComposedDpEvent() | dp.dp_event.RepeatAndSelectDpEvent():
            yield from _relations(event.event)
        case dp.ComposedDpEvent():
            for part in event.events:
                yield from _relations(part)
        case dp.SampledWithoutReplacementDpEvent():
            yield REPLACE
        case dp.GaussianDpEvent() | dp.PoissonSampledDpEvent():
            yield ADD_REMOVE


def fixed_size_step(noise_multiplier: float, population: int, sample: int) -> dp.DpEvent:
    """Return the event of a step that takes exactly `sample` of `population` units, all subsets alike.

    Raises:
        InputError: a noise multiplier that is not positive, or a sample outside 1 .. population.
    """
    validate.positive(noise_multiplier, "noise_multiplier")
    validate.in_range(sample, 1, population, "units of a fixed-size sample")
    gaussian = dp.GaussianDpEvent(float(noise_multiplier))
    return dp.SampledWithoutReplacementDpEvent(int(population), int(sample), gaussian)


def renyi_gaussian_step(noise_multiplier: float, sampling_rate: float) -> dp.DpEvent:
    """Return the event of one Poisson sampled step that is bounded at whole Renyi orders only.

    Raises:
        InputError: as `gaussian_step`.
    """
    validate.positive(noise_multiplier, "noise_multiplier")
    _check_rate(sampling_rate)
    event = RenyiGaussianDpEvent(float(noise_multiplier))
    return event if sampling_rate == 1.0 else dp.PoissonSampledDpEvent(float(sampling_rate), event)


def renyi_only(event: dp.DpEvent) -> bool:
    """Return whether some release inside `event` is bounded at whole Renyi orders only."""
    match event:
        case dp.SelfComposedDpEvent() | dp.PoissonSampledDpEvent() | dp.dp_event.RepeatAndSelectDpEvent():
            return renyi_only(event.event)
        case dp.ComposedDpEvent():
            return any(renyi_only(part) for part in event.events)
    return isinstance(event, RenyiGaussianDpEvent)


def non_private_step() -> dp.DpEvent:
    """Return the event of a step that claims nothing."""
    return dp.NonPrivateDpEvent()


def composed(event: dp.DpEvent, steps: int) -> dp.DpEvent:
    """Return the event of `steps` adaptive repetitions of `event`.

    Raises:
        InputError: fewer than one step.
    """
    if steps < 1 or steps != int(steps):
        raise InputError(f"steps must be a whole number, at least 1, got {steps}.")
    return event if steps == 1 else dp.SelfComposedDpEvent(event, int(steps))


def sequence(events: Iterable[dp.DpEvent]) -> dp.DpEvent:
    """Return the event of `events` in order; equal neighbours become one counted event."""
    runs: list[tuple[dp.DpEvent, int]] = []
    for event in events:
        if runs and runs[-1][0] == event:
            runs[-1] = (event, runs[-1][1] + 1)
        else:
            runs.append((event, 1))
    parts = [composed(event, count) for event, count in runs]
    if not parts:
        return dp.NoOpDpEvent()
    return parts[0] if len(parts) == 1 else dp.ComposedDpEvent(parts)


def with_noise(event: dp.DpEvent, factor: float) -> dp.DpEvent:
    """Return `event` with `factor` times the noise multiplier of every Gaussian release, each of the kind it
    was; what releases nothing, or without protection, stays.

    Raises:
        InputError: an event of another kind, by name.
    """
    match event:
        case dp.dp_event.RepeatAndSelectDpEvent():
            return selected(with_noise(event.event, factor), apart(event)[1])
        case dp.SelfComposedDpEvent():
            return dp.SelfComposedDpEvent(with_noise(event.event, factor), event.count)
        case dp.ComposedDpEvent():
            return dp.ComposedDpEvent([with_noise(part, factor) for part in event.events])
        case dp.PoissonSampledDpEvent():
            return dp.PoissonSampledDpEvent(event.sampling_probability, with_noise(event.event, factor))
        case dp.SampledWithoutReplacementDpEvent():
            inner = with_noise(event.event, factor)
            return dp.SampledWithoutReplacementDpEvent(event.source_dataset_size, event.sample_size, inner)
        case RenyiGaussianDpEvent():  # before its base
            return RenyiGaussianDpEvent(event.noise_multiplier * factor)
        case dp.GaussianDpEvent():
            return dp.GaussianDpEvent(event.noise_multiplier * factor)
        case dp.NonPrivateDpEvent() | dp.NoOpDpEvent():
            return event
    raise _unknown(type(event).__name__)


def releases(event: dp.DpEvent) -> tuple[Release, ...]:
    """Return the Gaussian releases inside `event`, equal ones merged, in a fixed order.

    Composition does not depend on order, so this, with how one run was selected (`apart`), is all that an
    accountant needs.

    Raises:
        InputError: an event of another kind, by name.
    """
    counts: Counter[_Kind] = Counter()
    _collect(apart(event)[0], 1, counts)
    return tuple(
        Release(sigma, rate, count, sample or None)
        for (sigma, rate, sample), count in sorted(counts.items())
        if count
    )


def to_json(event: dp.DpEvent) -> dict[str, Any]:
    """Return `event` as a JSON object; `from_json` gives an equal event.

    Raises:
        InputError: an event of a kind the ledger does not know, by name.
    """
    match event:
        case RenyiGaussianDpEvent():  # before its base
            return {"type": "renyi_gaussian", "noise_multiplier": float(event.noise_multiplier)}
        case dp.GaussianDpEvent():
            return {"type": "gaussian", "noise_multiplier": float(event.noise_multiplier)}
        case dp.PoissonSampledDpEvent():
            return {
                "type": "poisson_sampled",
                "sampling_rate": float(event.sampling_probability),
                "event": to_json(event.event),
            }
        case dp.SampledWithoutReplacementDpEvent():
            return {
                "type": "sampled_without_replacement",
                "population": int(event.source_dataset_size),
                "sample": int(event.sample_size),
                "event": to_json(event.event),
            }
        case dp.SelfComposedDpEvent():
            return {"type": "self_composed", "count": int(event.count), "event": to_json(event.event)}
        case dp.ComposedDpEvent():
            return {"type": "composed", "events": [to_json(part) for part in event.events]}
        case dp.NonPrivateDpEvent():
            return {"type": "non_private"}
        case dp.NoOpDpEvent():
            return {"type": "no_op"}
    raise _unknown(type(event).__name__)


def from_json(data: Mapping[str, Any]) -> dp.DpEvent:
    """Rebuild the event written by `to_json`.

    Raises:
        InputError: an unknown type, a missing field, or a value out of range.
    """
    kind = data.get("type") if isinstance(data, Mapping) else None
    try:
        match kind:
            case "gaussian" | "renyi_gaussian":
                sigma = float(data["noise_multiplier"])
                validate.in_range(sigma, 0.0, math.inf, "event noise_multiplier")
                return dp.GaussianDpEvent(sigma) if kind == "gaussian" else RenyiGaussianDpEvent(sigma)
            case "poisson_sampled":
                rate = float(data["sampling_rate"])
                _check_rate(rate)
                return dp.PoissonSampledDpEvent(rate, from_json(data["event"]))
            case "sampled_without_replacement":
                population, sample = int(data["population"]), int(data["sample"])
                validate.in_range(sample, 1, population, "event sample")
                return dp.SampledWithoutReplacementDpEvent(population, sample, from_json(data["event"]))
            case "self_composed":
                count = data["count"]
                if not isinstance(count, int) or count < 1:
                    raise InputError(f"event count must be a whole number from 1, got {count!r}.")
                return dp.SelfComposedDpEvent(from_json(data["event"]), count)
            case "composed":
                return dp.ComposedDpEvent([from_json(part) for part in data["events"]])
            case "non_private":
                return dp.NonPrivateDpEvent()
            case "no_op":
                return dp.NoOpDpEvent()
    except (KeyError, TypeError) as error:
        raise InputError(f"event of type {kind!r} must carry its fields, got {data!r}. {error}") from error
    raise _unknown(repr(kind))


def _collect(event: dp.DpEvent, count: int, counts: Counter[_Kind]) -> None:
    match event:
        case dp.SelfComposedDpEvent():
            _collect(event.event, count * event.count, counts)
        case dp.ComposedDpEvent():
            for part in event.events:
                _collect(part, count, counts)
        case dp.GaussianDpEvent():
            counts[(float(event.noise_multiplier), 1.0, ())] += count
        case dp.PoissonSampledDpEvent():
            if not isinstance(event.event, dp.GaussianDpEvent):
                raise _unknown(f"PoissonSampledDpEvent of {type(event.event).__name__}")
            counts[(float(event.event.noise_multiplier), float(event.sampling_probability), ())] += count
        case dp.SampledWithoutReplacementDpEvent():
            if type(event.event) is not dp.GaussianDpEvent:
                raise _unknown(f"SampledWithoutReplacementDpEvent of {type(event.event).__name__}")
            sample = (int(event.source_dataset_size), int(event.sample_size))
            counts[(float(event.event.noise_multiplier) / 2.0, sample[1] / sample[0], sample)] += count
        case dp.NonPrivateDpEvent():
            counts[(0.0, 1.0, ())] += count
        case dp.NoOpDpEvent():
            pass
        case _:
            raise _unknown(type(event).__name__)


def _check_rate(rate: float) -> None:
    if not 0.0 < rate <= 1.0:
        raise InputError(
            f"sampling rate must be above 0 and at most 1, got {rate!r}. It is the expected batch size "
            "over the number of examples."
        )


def _unknown(name: str) -> InputError:
    return InputError(
        f"event must be Gaussian, sampled Gaussian, a composition of these, or non-private; got "
        f"{name}. A mechanism of another kind needs its event added to fedsim/privacy/events.py first."
    )
