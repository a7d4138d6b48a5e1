"""What privacy costs, measured: the path of central trust without clipping and noise.

Who is trusted: everyone. What is sent: the sum of per-example gradients, or of holder updates, a node and
step. Noise: none. Event: non-private, so no epsilon is claimed. Dropout policy: as central trust. Same
draws as the private trust models; nothing else differs.

Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
FedSGD and FedAvg, with Poisson-sampled examples or holders and without weighting by size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import dp_accounting

from fedsim import validate
from fedsim.privacy import events
from fedsim.privacy.budget import without_privacy
from fedsim.privacy.family import EventFamily
from fedsim.samplers import Participation
from fedsim.seeds import Root
from fedsim.strategies import STRATEGIES
from fedsim.strategies.base import (
    Agreed,
    Collected,
    DataFacts,
    Noise,
    Phase,
    Release,
    Setting,
    Split,
    Sums,
    Trust,
)


@STRATEGIES.register("nonprivate")
@dataclass(frozen=True)
class NonPrivate(Trust):
    """No clipping, no noise, no claim: what privacy costs is measured against it."""

    private = False
    trusted = "everyone"
    sent = "sum of {what}, not clipped"
    noise_added = "none"
    dropout_policy = "ask once more with the same keys, then stop"
    adapts = False
    unread = ("privacy.clip_norm", "privacy.clipping")

    def check(self, at: Setting) -> None:
        """See `Trust.check`."""
        privacy = at.config.privacy
        for name in ("target_epsilon", "noise_multiplier", "stop_at_epsilon"):
            if (value := getattr(privacy, name)) is not None:
                validate.conflicts(
                    f"strategy nonprivate has no noise, but privacy.{name} is {value}.",
                    f"Set privacy.{name}=null, or use strategy=central.",
                )
        super().check(at)

    def event(self, at: Setting, noise_multiplier: float, taking: Participation) -> dp_accounting.DpEvent:
        """See `Trust.event`."""
        return events.non_private_step()

    def agree(
        self, at: Setting, family: EventFamily, phases: Sequence[Phase], split: Split, facts: DataFacts
    ) -> Agreed:
        """See `Trust.agree`: a budget that claims nothing."""
        return Agreed(without_privacy(at.config.train.steps), (0.0,) * len(phases), (None,) * len(phases))

    def added(
        self, at: Setting, release: Release, got: Collected, noise: Noise, root: Root, step: int
    ) -> Sums:
        """See `Trust.added`: nothing."""
        return {}
