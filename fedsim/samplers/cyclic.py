"""Cyclic Poisson sampling: groups of units take turns (Choquette-Choo et al. 2023).

A keyed hash puts every unit into one of `groups` groups for the whole run; step t draws from group
t mod groups only, each unit with probability share * groups. The hash looks at no data, and knowing it gives
nothing away.

Source: Choquette-Choo, Ganesh, McKenna, McMahan, Rush, Thakurta, Xu 2023, "(Amplified) banded matrix
factorization: a unified approach to private training", section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.samplers import SAMPLERS
from fedsim.samplers.base import Draw, Participation, Sampler
from fedsim.samplers.keyed import PoissonSampler, in_bin
from fedsim.seeds import Root, derive


@SAMPLERS.register("cyclic")
@dataclass(frozen=True)
class Cyclic(Sampler):
    """Poisson from one of several groups of units, which take turns.

    Attributes:
        groups: how many; 1 is poisson.
    """

    groups: int = 4

    tiny = {"groups": 2}  # noqa: RUF012

    def __post_init__(self) -> None:
        validate.positive(self.groups, "sampler.options.groups")

    def participation(self, share: float, batch: float, units: int) -> Participation:
        """See `Sampler.participation`."""
        if share * self.groups > 1.0 + 1e-12:
            validate.conflicts(
                f"sampler.options.groups {self.groups} with sampling rate {share:.4g}: a step draws from one "
                f"of {self.groups} groups of the units, each with probability {share * self.groups:.4g}, "
                "above 1.",
                f"Lower sampler.options.groups to {math.floor(1.0 / share)}, or train.expected_batch_size to "
                f"{batch / (share * self.groups):g} or less.",
            )
        return Participation(self.groups, self._rate_in_group(share), self.groups, share)

    def keys(self, root: Root, step: int) -> dict[str, bytes]:
        """See `Sampler.keys`; the groups' key is one for the run."""
        return super().keys(root, step) | {"groups": derive(root, "groups")}

    def selected(self, draw: Draw, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """See `Sampler.selected`."""
        drawn = PoissonSampler(self._rate_in_group(draw.share), max(1, len(ids)))
        turn = in_bin(ids, draw.keys["groups"], draw.step % self.groups, self.groups)
        return drawn.included(ids, draw.keys["draw"]) & turn

    def _rate_in_group(self, share: float) -> float:
        return min(1.0, share * self.groups)
