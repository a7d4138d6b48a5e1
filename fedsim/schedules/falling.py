"""Constant, and falls towards a share of the full rate.

A fall is towards a rate that holds after the last step: no step has rate 0, since each costs privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsim import validate
from fedsim.schedules import SCHEDULES
from fedsim.schedules.base import Schedule


@SCHEDULES.register("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """The full rate in every step."""

    def factor(self, progress: float) -> float:
        """See `Schedule.factor`."""
        return 1.0


@SCHEDULES.register("linear")
@dataclass(frozen=True)
class Linear(Schedule):
    """A linear fall.

    Attributes:
        final_fraction: of the full rate, reached at the end of the fall.
        part: of the fall that the run's steps make: below 1 the run ends before the fall does, as where
            published settings stop a longer schedule early: (steps - warm-up) / (its steps - warm-up).
    """

    final_fraction: float = 0.0
    part: float = 1.0

    def __post_init__(self) -> None:
        validate.in_range(self.final_fraction, 0.0, 1.0, "optimizer.schedule.options.final_fraction")
        validate.in_range(self.part, 1e-9, 1.0, "optimizer.schedule.options.part")

    def factor(self, progress: float) -> float:
        """See `Schedule.factor`."""
        return self.final_fraction + (1.0 - self.final_fraction) * self._remaining(progress * self.part)

    def _remaining(self, progress: float) -> float:
        return 1.0 - progress


@SCHEDULES.register("cosine")
@dataclass(frozen=True)
class Cosine(Linear):
    """A fall by half a cosine (Loshchilov and Hutter 2017)."""

    def _remaining(self, progress: float) -> float:
        return (1.0 + math.cos(math.pi * progress)) / 2
