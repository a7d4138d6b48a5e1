"""Independent noise whose scale changes in a few fixed levels: adaptive composition (Abadi et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedsim import validate
from fedsim.noise import NOISE
from fedsim.noise.levels import NoiseLevels
from fedsim.noise.over_time import NoiseOverTime
from fedsim.rules import REAL
from fedsim.samplers import Participation


@NOISE.register("schedule")
@dataclass(frozen=True)
class Scheduled(NoiseOverTime):
    """Fresh noise in every step, of a scale that changes in equal parts of the run.

    Attributes:
        factors: on the noise multiplier, one a part of the run, such as [1.2, 1.0, 0.8].
    """

    factors: list[float] = field(default_factory=list)

    said = ""
    tiny = {"factors": [1.25, 0.75]}  # noqa: RUF012

    def __post_init__(self) -> None:
        for factor in self.factors:
            validate.in_range(factor, *REAL, "every entry of noise.options.factors")

    def check(self, participation: Participation, steps: int) -> None:
        """See `NoiseOverTime.check`: a release of several steps has one noise multiplier."""
        self.levels(steps)
        if participation.period > 1:
            validate.conflicts(
                f"noise.name=schedule changes the noise from step to step, but with this sampler "
                f"{participation.period} steps are one release.",
                "Use sampler=poisson, or noise=independent.",
            )

    def levels(self, steps: int) -> NoiseLevels:
        """See `NoiseOverTime.levels`."""
        return NoiseLevels(tuple(self.factors), steps)
