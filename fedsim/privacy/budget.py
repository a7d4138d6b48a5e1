"""From the privacy settings and what a run would release to its noise and steps; and the check of both."""

from __future__ import annotations

from dataclasses import dataclass

import dp_accounting as dp

from fedsim import validate
from fedsim.config import PrivacyConfig
from fedsim.privacy import accountant, events, search
from fedsim.privacy.family import EventFamily
from fedsim.privacy.search import Calibration


@dataclass(frozen=True)
class Budget:
    """What a run releases and how much of it the privacy settings allow.

    Attributes:
        family: the events for any noise multiplier.
        noise_multiplier: the one of this run.
        steps: server updates to make.
        stopped: whether that is less than configured, because of stop_at_epsilon.
        calibration: how the noise multiplier was found, when it was.
    """

    family: EventFamily
    noise_multiplier: float
    steps: int
    stopped: bool = False
    calibration: Calibration | None = None

    def event(self, steps: int, factor: float = 1.0) -> dp.DpEvent:
        """Return what `steps` steps release together, at `factor` times the noise multiplier."""
        return self.family.event(self.noise_multiplier * factor, steps)


def within_budget(privacy: PrivacyConfig, family: EventFamily, steps: int) -> Budget:
    """Return the noise for `steps` steps, from a target epsilon or as given, and how many steps it allows.

    Args:
        privacy: gives exactly one of target_epsilon and noise_multiplier.
        family: what the run releases; nothing else is accounted.
        steps: as configured.

    Raises:
        InputError: both or neither given, an unreachable target, or a budget below one step.
    """
    if (privacy.target_epsilon is None) == (privacy.noise_multiplier is None):
        given = "neither" if privacy.target_epsilon is None else "both"
        validate.conflicts(
            f"privacy.target_epsilon and privacy.noise_multiplier: {given} given.",
            "Give exactly one: a target calibrates the noise, a noise multiplier determines epsilon.",
        )
    calibration, multiplier, delta, kind = None, privacy.noise_multiplier, privacy.delta, privacy.accountant
    if privacy.target_epsilon is not None:
        calibration = search.noise_multiplier_for(privacy.target_epsilon, delta, family, steps, kind)
        multiplier = calibration.noise_multiplier
    assert multiplier is not None
    allowed = steps
    if (most := privacy.stop_at_epsilon) is not None:
        allowed = search.max_steps(most, delta, family, multiplier, kind, steps)
        if allowed == 0:
            validate.conflicts(
                f"privacy.stop_at_epsilon {most} is below the epsilon of a single release: that of the first "
                f"step is {accountant.epsilon(family.event(multiplier, 1), delta, kind).value:.4g}.",
                "Raise it, raise privacy.noise_multiplier, or lower what a step releases: "
                "train.expected_batch_size, local steps.",
            )
    return Budget(family, multiplier, allowed, allowed < steps, calibration)


def without_privacy(steps: int) -> Budget:
    """Return the budget of a strategy that claims nothing."""
    return Budget(EventFamily(lambda _: events.non_private_step()), 0.0, steps)


def check(event: dp.DpEvent, unit: str, privacy: PrivacyConfig) -> None:
    """Refuse a whole run whose own events spend more than the settings allow, however it came to its noise.

    Raises:
        InputError: epsilon of `event`, by the chosen accountant, above target_epsilon or stop_at_epsilon.
    """
    for name in ("target_epsilon", "stop_at_epsilon"):
        limit = getattr(privacy, name)
        if limit is None:
            continue
        spent = accountant.epsilon(event, privacy.delta, privacy.accountant, unit)
        if spent.value is None or spent.value > limit:
            validate.conflicts(
                f"privacy.{name} is {limit:g}, but the mechanism releases {spent.describe()}.",
                "Its noise and steps must be those of within_budget, with the family of its own events.",
            )
