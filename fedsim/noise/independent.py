"""Fresh noise in every step (Abadi et al. 2016, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.noise import NOISE
from fedsim.noise.over_time import NoiseOverTime
from fedsim.samplers import Participation


@NOISE.register("independent")
@dataclass(frozen=True)
class Independent(NoiseOverTime):
    """Fresh noise of one scale in every step."""

    said = ""

    def check(self, participation: Participation, steps: int) -> None:
        """Nothing to refuse: whatever step of its cycle a unit is in, it moves that step's sum alone."""
