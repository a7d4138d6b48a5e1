"""One mechanism: query, sampler, noise over time, trust model and learner, composed; or why they are not.

Everything private about a run follows from it: calibration, budget stop, dry run, ledger, noise and reports
ask it, and nothing else states an event, a sensitivity or a scale of noise, so they cannot disagree.

    cycle of the sampler  ->  one release of the Gaussian mechanism  (noise over time, trust model)
    releases of the run   ->  `EventFamily`, an event for every noise multiplier and number of steps
    target or multiplier  ->  `Budget`, the noise of this run and the steps it allows
    query                 ->  noise of each part of the sum, from that multiplier and the part's bound

`fedsim.method.Method` is what a node knows, from the configuration alone; `Mechanism` adds what the server
knows of the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import dp_accounting
import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.config import Config
from fedsim.learners import Means
from fedsim.method import Method
from fedsim.noise.gaussian import step_noise
from fedsim.noise.levels import Runs
from fedsim.noise.stream import Stream
from fedsim.privacy import budget as budgets
from fedsim.privacy import events
from fedsim.privacy.budget import Budget
from fedsim.privacy.family import EventFamily
from fedsim.queries import Statistic
from fedsim.queries.base import Shape, State
from fedsim.queries.statistic import Expected, within
from fedsim.samplers import SAMPLERS, Participation, trial
from fedsim.samplers.keyed import sampling_rate
from fedsim.seeds import Root
from fedsim.strategies.base import Ask, Collected, DataFacts, Phase, Release, Setting, Sums, Units
from fedsim.types import HolderReply, StepTask
from fedsim.validate import RunError

_WRITTEN_OUT = 200  # steps of a factor that is written out to be checked


@dataclass(frozen=True)
class Mechanism:
    """A method on data of stated size: what a run releases, and its noise.

    Attributes:
        method: the axes.
        facts: about the data.
        participation: how often a unit takes part.
        expected_units: that a step takes on average.
        divisor: public constant by which the noisy sums are divided.
        budget: the events of the run, their noise multiplier, and the steps made.
        multipliers: for each phase of the query, without its factor, that of the noise which makes the events
            true; 0 where nothing is private. They differ from that of the events where part of the noise is
            spent otherwise, such as on rounding.
        column_norm: sensitivity of a release of the main part, in bounds on one contribution.
        settings: for each phase, what server and nodes agree on beforehand.
    """

    method: Method
    facts: DataFacts
    participation: Participation
    expected_units: float
    divisor: float
    budget: Budget
    multipliers: tuple[float, ...]
    column_norm: float
    settings: tuple[Any, ...]

    @classmethod
    def of(cls, method: Method, facts: DataFacts) -> Mechanism:
        """Return the mechanism of a run, whose events keep within the budget the configuration gives.

        Raises:
            InputError: sampler and noise do not go together, no such noise, a batch above the data, an
                unreachable target, or a budget below one step.
        """
        at, trust, train = method.at, method.trust, method.at.config.train
        availability = at.config.federation.availability
        rate = sampling_rate(train.expected_batch_size, facts.examples, availability)
        units = facts.holders if method.unit == "holder" else facts.examples
        participation = at.sampler.participation(rate, train.expected_batch_size, units)
        if participation.sample is not None and not trust.takes_fixed_size:
            validate.conflicts(
                f"strategy={at.config.strategy.name} does not go with sampler={at.config.sampler.name}: what "
                "its noise gains by sampling is proved for Poisson draws of units that are added or removed.",
                "Use sampler=poisson, or strategy=central.",
            )
        if at.config.sampler.name not in SAMPLERS.own():
            trial.check(at.sampler, participation, units)
        at.noise.check(participation, train.steps)
        factors, phases = method.phases()
        of_phases = Runs.of(factors[phase] for phase in phases) if set(factors) != {1.0} else None
        family = EventFamily(
            lambda noise_multiplier: trust.event(at, noise_multiplier, participation),
            participation.period,
            of_phases or at.noise.levels(train.steps),
            selection_of(at.config),
        )
        expected_units = participation.share * units * availability
        agreed = trust.agree(
            at,
            family,
            [
                Phase(at.query.statistic(_shape(at, facts, i), at.clip, at.query.state(at.config)), factor)
                for i, factor in enumerate(factors)
            ],
            lambda noise_multiplier: at.query.multipliers(noise_multiplier, expected_units),
            facts,
        )
        made = cls(
            method,
            facts,
            participation,
            expected_units,
            train.expected_batch_size if method.unit == "example" else expected_units,
            agreed.budget,
            agreed.multipliers,
            at.noise.column_norm(participation, train.steps),
            agreed.settings,
        )
        made._check()
        return made

    def _check(self) -> None:
        """Refuse a run that spends more than it may, however it came to its noise.

        Raises:
            InputError: epsilon of the whole run is above target_epsilon or stop_at_epsilon, or the parts of
                a release need more noise than they get.
        """
        if not self.method.private:
            return
        budgets.check(self.total_event(self.steps), self.unit, self.method.at.config.privacy)
        _, planned = self.method.phases()
        if self.stopped_by_budget and set(planned[: self.steps]) != set(planned):
            validate.conflicts(
                f"privacy.stop_at_epsilon ends the run after {self.steps} of {len(planned)} steps, before "
                f"query {self.method.at.config.query.name} has summed all that it needs.",
                "Raise it or privacy.noise_multiplier, or use target_epsilon.",
            )
        for phase, whole in dict.fromkeys((self._phase(i), self.multiplier_at(i)) for i in range(self.steps)):
            parts, multipliers = self._statistic(phase, None).parts, self._multipliers(whole)
            for part in parts:
                validate.positive(part.bound, f"bound of part {part.name} of a query")
            for multiplier in multipliers:
                validate.positive(multiplier, "every noise multiplier of a query's parts")
            if len(multipliers) != len(parts) or not within(multipliers, whole):
                validate.conflicts(
                    f"query {self.method.at.config.query.name} splits noise multiplier {whole:g} into parts "
                    f"that together have less noise: {multipliers} for {[part.name for part in parts]}.",
                    "Its multipliers() must keep the sum of 1 / multiplier^2 within that of the whole.",
                )
        self._check_noise_over_time()

    def _check_noise_over_time(self) -> None:
        """Refuse correlated noise that states less than its own sensitivity.

        Raises:
            InputError: `column_norm` is below the largest column of the factorisation, as far as that is
                small enough to be written out.
        """
        at, steps = self.method.at, self.method.at.config.train.steps
        found, wanted = at.noise.factorisation(self.participation, steps), 1.0
        if found is not None:
            encoder, _ = found.factors(min(steps, _WRITTEN_OUT))
            wanted = float(np.linalg.norm(encoder, axis=0).max())
        if not self.column_norm >= wanted * (1.0 - 1e-9) or (found is not None) != at.noise.correlated:
            validate.conflicts(
                f"noise={at.config.noise.name} states a column norm of {self.column_norm:g}, but its factor "
                f"has one of {wanted:g}; correlated is {at.noise.correlated}.",
                "Its column_norm() must be the sensitivity of what factorisation() says.",
            )

    @property
    def unit(self) -> str:
        """Return whose presence the events protect."""
        return self.method.unit

    @property
    def relation(self) -> str:
        """Return the neighbouring relation of the events."""
        return events.relation(self.total_event(1))

    @property
    def sampling_rate(self) -> float:
        """Return the part of all units that a step takes on average."""
        return self.participation.share

    @property
    def steps(self) -> int:
        """Return the server updates to make; already cut at the budget."""
        return self.budget.steps

    @property
    def stopped_by_budget(self) -> bool:
        """Return whether `steps` is below the configured number because of stop_at_epsilon."""
        return self.budget.stopped

    @property
    def holder_noise_factor(self) -> float:
        """Return what the noise multiplier is to be multiplied with for a holder of several examples."""
        return self.method.at.noise.holder_factor(self.participation, self.steps)

    @property
    def example_noise_factor(self) -> float | None:
        """Return the same for an example where the unit is the holder, else None: changing an example changes
        one contribution, by at most twice its bound. That is what events of relation replace one say."""
        if self.unit != "holder" or not self.method.private:
            return None
        return 1.0 if self.relation == events.REPLACE else 0.5

    def noise_factor(self, step: int) -> float:
        """Return what multiplies the noise in one step."""
        return self.budget.family.factor(step)

    @property
    def noise_multiplier(self) -> float:
        """Return that of a step whose factor is 1, in the first phase."""
        return self.multipliers[0]

    def multiplier_at(self, step: int) -> float:
        """Return that of the noise of one step."""
        return self.multipliers[self._phase(step)] * self.noise_factor(step)

    def _phase(self, step: int) -> int:
        return self.method.at.query.phase(step)

    def event_at(self, step: int) -> dp_accounting.DpEvent:
        """Return what the ledger records for one step."""
        return self.budget.family.event_at(self.budget.noise_multiplier, step)

    def total_event(self, steps: int) -> dp_accounting.DpEvent:
        """Return what `steps` steps release together."""
        return self.budget.event(steps)

    def total_event_for_holder(self, steps: int, examples: int) -> dp_accounting.DpEvent:
        """Return the example-level event of `steps` steps that bounds a holder with that many examples,
        for `accountant.holder_epsilon_of_event`."""
        return self.budget.event(steps, self.holder_noise_factor if examples > 1 else 1.0)

    def total_event_for_example(self, steps: int) -> dp_accounting.DpEvent | None:
        """Return the event of `steps` steps that bounds one example where the unit is the holder, or None."""
        factor = self.example_noise_factor
        return None if factor is None else self.budget.event(steps, factor)

    def release(self, step: int = 0, state: State | None = None) -> Release:
        """Return what a step releases.

        Args:
            step: counted from 0.
            state: of the query; None: that before the first step.
        """
        phase = self._phase(step)
        statistic = self._statistic(phase, state)
        stds: dict[str, float] = {}
        if self.method.private:
            multipliers = self._multipliers(self.multiplier_at(step))
            for part, multiplier in zip(statistic.parts, multipliers, strict=True):
                norm = self.column_norm if part is statistic.main else 1.0  # other parts have fresh noise
                stds[part.name] = multiplier * (part.bound * norm)
        told = self.method.at.query.told_bytes(_shape(self.method.at, self.facts, phase))
        return Release(statistic, stds, self.facts, self.settings[phase], told)

    def releases(self) -> list[tuple[Release, int]]:
        """Return what the steps of the run release, as known before it, and how many steps are alike."""
        phases = Counter(self._phase(step) for step in range(self.steps))
        first = {phase: next(i for i in range(self.steps) if self._phase(i) == phase) for phase in phases}
        return [(self.release(first[phase]), steps) for phase, steps in phases.items()]

    def _statistic(self, phase: int, state: State | None) -> Statistic:
        at = self.method.at
        held = at.query.state(at.config) if state is None else state
        return at.query.statistic(_shape(at, self.facts, phase), at.clip, held)

    def _multipliers(self, noise_multiplier: float) -> tuple[float, ...]:
        return self.method.at.query.multipliers(noise_multiplier, self.expected_units)

    def collect(self, release: Release, state: State, ask: Ask) -> Collected:
        """Return the sums over all holders at this release."""
        at = self.method.at
        return self.method.trust.collect(at, release, at.query.arrays(state), ask)

    def noise(self, release: Release, got: Collected, stream: Stream, root: Root, step: int) -> Sums:
        """Return what the server adds to the sums of a step, by part."""
        at = self.method.at
        factorisation = at.noise.factorisation(self.participation, at.config.train.steps)
        parts = {part.name: part for part in release.statistic.parts}

        def of_part(name: str) -> NDArray[np.float64]:
            part = parts[name]
            if factorisation is not None and part is release.statistic.main:
                values = stream.sample(factorisation, root, step, part.length)
                values *= release.noise_stds[name]
                return values
            return step_noise(root, step, part.length, release.noise_stds[name], part.purpose)

        added = self.method.trust.added(at, release, got, of_part, root, step)
        wanted = {name: (part.length,) for name, part in parts.items()}
        shapes = {name: np.shape(values) for name, values in added.items()}
        if not shapes.items() <= wanted.items():
            raise RunError(
                f"strategy={at.config.strategy.name} must add noise to parts of the sum, of their shapes "
                f"{wanted}, got {shapes}. A misspelled part would go without noise: mend its added()."
            )
        return added

    def noise_std_of_sum(self, release: Release) -> float:
        """Return the standard deviation of all noise in the main part of a step's sum; 0 without noise."""
        return self.stds_of_sums(release).get(release.statistic.main.name, 0.0)

    def stds_of_sums(self, release: Release) -> dict[str, float]:
        """Return, by part, the standard deviation of all noise in a step's sum; empty without noise."""
        return self.method.trust.stds_of_sums(self.method.at, release)

    def means(self, release: Release, sums: Sums) -> Means:
        """Return what the learner gets of noisy sums, which are divided in place."""
        for values in sums.values():
            values /= self.divisor
        stds = {name: std / self.divisor for name, std in self.stds_of_sums(release).items()}
        return Means(sums, release.statistic.main.name, stds)

    def reply_arrays(self, release: Release, reply: HolderReply) -> Expected:
        """Return name -> (shape, dtype) of the arrays that a reply must hold."""
        return self.method.trust.reply_arrays(self.method.at, release, reply)

    def counted_at_most(
        self, task: StepTask, holders: NDArray[np.int64], ids: Iterable[NDArray[np.int64]]
    ) -> int:
        """Return the largest count that an honest reply of a node can have.

        Args:
            task: what the reply answers.
            holders: (H,) the node's.
            ids: of their examples, in parts.
        """
        of_holders = (Units(holders, self.facts.holders),)
        of_examples = (Units(some, self.facts.examples) for some in ids)
        parts = of_holders if self.unit == "holder" else of_examples
        return sum(self.method.trust.counted_at_most(self.method.at, task, units) for units in parts)

    def norm_bounds(self, release: Release, reply: HolderReply) -> dict[str, float]:
        """Return the largest L2 norms that an honest reply's arrays can have, by name."""
        return self.method.trust.norm_bounds(self.method.at, release, reply)

    def operations(self, of_gradients: float) -> float:
        """Return the floating point operations of all nodes over the run on average.

        Args:
            of_gradients: of one example whose gradient is taken, with all of its views.
        """
        at, total = self.method.at, 0.0
        for phase, steps in Counter(self._phase(step) for step in range(self.steps)).items():
            own = at.query.operations(_shape(at, self.facts, phase))
            total += steps * (of_gradients if own is None else own)
        return total * self.sampling_rate * self.facts.examples

    def traffic(self) -> tuple[float, int]:
        """Return (bytes a holder of its own would send and receive in a step on average, messages of one)."""
        trust, at = self.method.trust, self.method.at
        told = [(*trust.traffic(at, release), steps) for release, steps in self.releases()]
        return sum(size * steps for size, _, steps in told) / self.steps, told[0][1]

    def node_traffic(self, holders: int) -> tuple[int, int]:
        """Return the bytes of arrays that a node of so many holders receives and sends in a step at most."""
        trust, at = self.method.trust, self.method.at
        told = [trust.node_traffic(at, release, holders) for release, _ in self.releases()]
        return max(down for down, _ in told), max(up for _, up in told)

    def survivors_needed(self) -> str:
        """Return how many holders must stay to the end of a step for its privacy statement to hold."""
        return self.method.trust.survivors_needed(self.method.at)


def selection_of(config: Config) -> events.Selection | None:
    """Return how a run of this configuration is selected among hidden ones; None where it is not.

    Raises:
        InputError: no such mean or distribution.
    """
    if config.tuning.mode != "private":
        return None
    selection = events.Selection(float(config.tuning.trials or 0.0), config.tuning.distribution)
    events.check_selection(selection)
    return selection


def _shape(at: Setting, facts: DataFacts, phase: int) -> Shape:
    dtype = np.dtype(at.config.model.dtype)
    return Shape(facts.parameters, facts.features, facts.outputs, dtype, phase)
