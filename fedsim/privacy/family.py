"""What a mechanism releases for any noise multiplier: the one thing all accounting of a run asks.

Calibration, the budget stop, the dry run, the ledger and the reports all take their events from the family of
the run's mechanism, so a trust model that states its own event is calibrated and stopped by that event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import dp_accounting as dp

from fedsim import validate
from fedsim.noise.levels import Levels
from fedsim.privacy import events


@dataclass(frozen=True)
class EventFamily:
    """Noise multiplier and steps -> event.

    Attributes:
        release: noise multiplier -> event of one release; its epsilon falls as the noise multiplier rises.
        period: steps a release covers, at the first of which it is made; 1 unless the mechanism is analysed
            in groups of steps.
        levels: factors on the noise multiplier over the run; None: constant noise.
        selection: how the run is selected among others that stay hidden; None: it is not.

    Raises:
        InputError: a period below 1, or levels with a period above 1.
    """

    release: Callable[[float], dp.DpEvent]
    period: int = 1
    levels: Levels | None = None
    selection: events.Selection | None = None

    def __post_init__(self) -> None:
        validate.positive(self.period, "steps of a release")
        if self.period > 1 and self.levels is not None:
            validate.conflicts(
                f"a release covers {self.period} steps, but its noise multiplier changes from step to step.",
                "Use noise=independent and a query of one noise multiplier, or sampler=poisson.",
            )

    @classmethod
    def gaussian(cls, sampling_rate: float, levels: Levels | None = None) -> EventFamily:
        """Return the family of Poisson sampled Gaussian releases, one a step (plain ones at rate 1).

        Raises:
            InputError: a rate outside (0, 1].
        """
        events.gaussian_step(1.0, sampling_rate)  # refuses the rate before anybody asks for an event
        return cls(lambda noise_multiplier: events.gaussian_step(noise_multiplier, sampling_rate), 1, levels)

    def factor(self, step: int) -> float:
        """Return what multiplies the noise of step `step`, counted from 0."""
        return 1.0 if self.levels is None else self.levels.factor(step)

    def event_at(self, noise_multiplier: float, step: int) -> dp.DpEvent:
        """Return what step `step`, counted from 0, releases."""
        if step % self.period:
            return dp.NoOpDpEvent()
        return self.release(noise_multiplier * self.factor(step))

    def event(self, noise_multiplier: float, steps: int) -> dp.DpEvent:
        """Return what the first `steps` steps release together; a release that is cut short counts whole.

        Where the run is selected among others, what selecting it releases is in it.
        """
        counts = ((1.0, -(-steps // self.period)),) if self.levels is None else self.levels.counts(steps)
        run = events.sequence(
            events.composed(self.release(noise_multiplier * factor), count) for factor, count in counts
        )
        return events.selected(run, self.selection)
