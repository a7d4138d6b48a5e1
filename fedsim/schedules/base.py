"""A schedule of the learning rate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule(ABC):
    """The course of the learning rate after the warm-up; its fields are the options."""

    @abstractmethod
    def factor(self, progress: float) -> float:
        """Return what the full rate is multiplied by.

        Args:
            progress: share of the steps after the warm-up that were made before this one, in [0, 1); from the
                last step on, 1.
        """


@dataclass(frozen=True)
class Function(Schedule):
    """A function from outside in place of a schedule: (progress, **options) -> factor."""

    function: Callable[[float], float]

    def factor(self, progress: float) -> float:
        """See `Schedule.factor`."""
        return float(self.function(progress))
