"""What a ledger says: whose it is, what each step released, and the epsilons that follow.

The header says whose ledger it is: the run's name, a commitment to its secret, and a keyed digest of each
holder's examples. A run's result takes its epsilon from here and from nowhere else; a plan's is that of the
ledger the run would write.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import dp_accounting as dp

from fedsim import validate
from fedsim.privacy import accountant, events
from fedsim.privacy.accountant import EpsilonResult
from fedsim.validate import InputError
from fedsim.visibility import Public

VERSION = 2
RESERVED = ("step", "event", "noise_multiplier", "sampling_rate", "parameters", "chain")


@dataclass(frozen=True)
class LedgerHeader:
    """What the whole run states before its first step.

    Attributes:
        config_hash: `Config.digest()` of the run.
        delta: the delta its epsilon is stated for.
        unit: unit of the events, "example" or "holder".
        relation: neighbouring relation of the events.
        accountant: the accountant of the run's own reports.
        target_epsilon, stop_at_epsilon: the budget, if one was given.
        examples: number N of training examples used; treated as public.
        holders: number of holders.
        examples_per_holder_at_most: the declared cap, for the epsilon of a whole holder; None: there is none,
            and the size of the largest holder, being sensitive, is not written.
        holder_noise_factor: factor on the noise multipliers for a holder of several examples, where events
            bound single examples only.
        example_noise_factor: the same for an example, where the unit is the holder; None: not bounded apart.
        selection: (mean, distribution) where the run is the best of a hidden number of runs, and the others
            are not released (`events.Selection`); None: it is the only one.
        imitated_batch_size: expected batch size of the run whose noise per update this one had with a smaller
            one (`train.imitated_batch_size`): it claims no epsilon; None: it imitates nothing.
        run: random name of a run under secure noise; empty under seeded noise.
        secret: commitment to its secret (`fedsim.privacy.secret`), or empty.
        code: digest of the source of what the configuration names from outside (package.module:Object), or
            empty.
        data: keyed digest of each holder's examples (`fedsim.privacy.binding`), in holder order.
        evaluation: digest of the examples that models are judged by, keyed where these are held-out ones.
        version: format of the file.
    """

    config_hash: str
    delta: float
    unit: str = "example"
    relation: str = events.ADD_REMOVE
    accountant: str = "pld"
    target_epsilon: float | None = None
    stop_at_epsilon: float | None = None
    examples: int | None = None
    holders: int | None = None
    examples_per_holder_at_most: int | None = None
    holder_noise_factor: float = 1.0
    example_noise_factor: float | None = None
    selection: tuple[float, str] | None = None
    imitated_batch_size: float | None = None
    run: str = ""
    secret: str = ""
    code: str = ""
    data: tuple[str, ...] = ()
    evaluation: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data))
        if self.selection is not None:
            object.__setattr__(self, "selection", events.Selection(*self.selection))
            events.check_selection(events.Selection(*self.selection))
        if not 0.0 < self.delta < 1.0:
            raise InputError(f"delta must be above 0 and below 1, got {self.delta!r}.")
        validate.one_of(self.unit, accountant.UNITS, "unit")
        validate.one_of(self.relation, (events.ADD_REMOVE, events.REPLACE), "relation")
        accountant.named(self.accountant)
        for name in ("examples", "holders", "examples_per_holder_at_most"):
            if (number := getattr(self, name)) is not None:
                validate.positive(number, name)
        validate.in_range(self.holder_noise_factor, 1e-6, 1.0, "holder_noise_factor")
        if self.example_noise_factor is not None:
            validate.in_range(self.example_noise_factor, 1e-6, 1.0, "example_noise_factor")
        validate.one_of(self.version, (VERSION,), "ledger version")


@dataclass(frozen=True)
class LedgerRecord:
    """One step: its event, the two numbers of the event a reader looks for, and further public facts.

    `noise_multiplier` and `sampling_rate` are None where the event is not a single Gaussian release.
    `parameters` is the SHA-256 of the parameters it released.
    """

    step: int
    event: dp.DpEvent
    noise_multiplier: float | None
    sampling_rate: float | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    parameters: str | None = None

    @classmethod
    def of(
        cls,
        step: int,
        event: dp.DpEvent,
        facts: Mapping[str, Public[Any]] | None = None,
        parameters: str | None = None,
    ) -> LedgerRecord:
        """Return the record of a step.

        Raises:
            InputError: an event of an unknown kind or a reserved fact.
            TypeError: a fact that is not public.
        """
        for name, fact in (facts or {}).items():
            if not isinstance(fact, Public):
                raise TypeError(f"a ledger is public: its fact '{name}' must be made Public.")
        taken = sorted(set(facts or {}) & set(RESERVED))
        if taken:
            raise InputError(f"facts of a step must not be named {', '.join(taken)}: the event says that.")
        found = events.releases(event)
        one = len(found) == 1 and found[0].times == 1 and found[0].noise_multiplier > 0.0
        one = one and events.relation(event) == events.ADD_REMOVE  # else they are of what dominates it
        sigma, rate = (found[0].noise_multiplier, found[0].sampling_rate) if one else (None, None)
        stated = {name: fact.value for name, fact in (facts or {}).items()}
        return cls(step, event, sigma, rate, stated, parameters)


@dataclass(frozen=True)
class LedgerView:
    """A checked ledger in memory."""

    header: LedgerHeader
    records: tuple[LedgerRecord, ...]

    @property
    def steps(self) -> int:
        """Return the number of recorded steps; the next step has this number."""
        return len(self.records)

    def until(self, steps: int) -> LedgerView:
        """Return the ledger as it was after so many steps."""
        return LedgerView(self.header, self.records[:steps])

    def total_event(self) -> dp.DpEvent:
        """Return the composition of all steps, and the selection of the run; equal consecutive events are
        counted, not repeated."""
        chosen = self.header.selection
        steps = events.sequence(record.event for record in self.records)
        return events.selected(steps, None if chosen is None else events.Selection(*chosen))

    @property
    def private(self) -> bool:
        """Return whether everything recorded had noise."""
        return all(release.noise_multiplier > 0.0 for release in events.releases(self.total_event()))

    def epsilon(self, accountant_name: str | None = None, delta: float | None = None) -> EpsilonResult:
        """Return the epsilon of everything recorded, in the header's unit."""
        name = self.header.accountant if accountant_name is None else accountant_name
        target = self.header.delta if delta is None else delta
        if (none := self._imitation(target, name, self.header.unit)) is not None:
            return none
        return self._stated(accountant.epsilon(self.total_event(), target, name, self.header.unit))

    def example_epsilon(self) -> EpsilonResult | None:
        """Return the epsilon of one example where the unit is the holder, or None where none is bounded."""
        header = self.header
        if header.example_noise_factor is None:
            return None
        if (none := self._imitation(header.delta, header.accountant, "example")) is not None:
            return none
        event = events.with_noise(self.total_event(), header.example_noise_factor)
        return self._stated(accountant.epsilon(event, header.delta, header.accountant, "example"))

    def holder_epsilon(self, examples_of_holder: int, delta: float | None = None) -> EpsilonResult:
        """Return the epsilon of a whole holder with that many examples.

        Under holder-level events the number of examples does not matter and the result is `epsilon`'s.
        """
        target = self.header.delta if delta is None else delta
        if self.header.unit == "holder":
            return self.epsilon("pld", target)
        if (none := self._imitation(target, "pld", "holder")) is not None:
            return none
        event = self.total_event()
        if examples_of_holder > 1 and self.header.holder_noise_factor != 1.0:
            event = events.with_noise(event, self.header.holder_noise_factor)
        return self._stated(accountant.holder_epsilon_of_event(event, target, examples_of_holder))

    def _imitation(self, delta: float, name: str, unit: str) -> EpsilonResult | None:
        """Return what a run says that imitates a larger batch: nothing is claimed; None for all others."""
        if (whole := self.header.imitated_batch_size) is None:
            return None
        note = f"a simulation: its updates have the noise of those with an expected batch size of {whole:g}"
        relation = self.header.relation
        return self._stated(EpsilonResult(math.inf, delta, relation, name, unit, "no amplification", note))

    def _stated(self, spent: EpsilonResult) -> EpsilonResult:
        """Say N x delta beside an epsilon. A run's delta is chosen for its own unit: where it is much too
        large for the other one, of which there may be many more, nothing is claimed of that one."""
        units = self.header.examples if spent.unit == "example" else self.header.holders
        if units is None:
            return spent
        if spent.unit != self.header.unit and (n_delta := units * spent.delta) > accountant.MOST_N_DELTA:
            note = f"delta is for {self.header.unit}s, and much too large for {units} {spent.unit}s"
            return dataclasses.replace(spent, value=math.inf, note=note, n_delta=n_delta)
        return spent.among(units)
