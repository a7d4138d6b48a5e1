"""Noise that changes over a run in a few levels.

The noise multiplier of a step is one number times the factor of the part of the run the step lies in: the
run is cut into as many equal parts as there are factors. The levels are public and fixed beforehand, so the
steps compose like any others (adaptive composition does not ask for equal ones). A few levels rather than
one a step, because a privacy loss distribution is built for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from fedsim import validate
from fedsim.validate import InputError

MAX_LEVELS = 16


class Levels(Protocol):
    """Factors on the noise multiplier over a run."""

    def factor(self, step: int) -> float:
        """Return the factor of step `step`, counted from 0; the last one from the end on."""
        ...

    def counts(self, first: int) -> tuple[tuple[float, int], ...]:
        """Return (factor, how many of the first `first` steps have it), in order, none of them 0."""
        ...


@dataclass(frozen=True)
class Runs:
    """Factors that each hold for some steps.

    Attributes:
        runs: (factor, steps), in order.
    """

    runs: tuple[tuple[float, int], ...]

    @classmethod
    def of(cls, factors: Iterable[float]) -> Runs:
        """Return the runs of one factor a step."""
        return cls(tuple((factor, sum(1 for _ in same)) for factor, same in groupby(factors)))

    def factor(self, step: int) -> float:
        """See `Levels.factor`."""
        left = step
        for factor, steps in self.runs:
            if left < steps:
                return factor
            left -= steps
        return self.runs[-1][0]

    def counts(self, first: int) -> tuple[tuple[float, int], ...]:
        """See `Levels.counts`; steps beyond the last run are as that one."""
        out, left = [], first
        for place, (factor, steps) in enumerate(self.runs):
            own = left if place == len(self.runs) - 1 else min(steps, left)
            out.append((factor, own))
            left -= own
        return tuple((factor, count) for factor, count in out if count)


@dataclass(frozen=True)
class NoiseLevels:
    """Factors on the noise multiplier over `steps` steps.

    Attributes:
        factors: one a part of the run, in order; (1.0,) is constant noise.
        steps: planned steps of the whole run, which are cut into parts; a run that ends early keeps them.

    Raises:
        InputError: no factor or more than MAX_LEVELS or steps, or one that is not positive.
    """

    factors: tuple[float, ...]
    steps: int

    def __post_init__(self) -> None:
        validate.positive(self.steps, "train.steps")
        for factor in self.factors:
            validate.positive(factor, "every entry of noise.options.factors")
        most = min(MAX_LEVELS, self.steps)
        if not 1 <= len(self.factors) <= most:
            raise InputError(
                f"noise.options.factors must hold 1 to {most} factors for {self.steps} steps, got "
                f"{len(self.factors)}. Make it coarser."
            )

    def factor(self, step: int) -> float:
        """Return the factor of step `step`, counted from 0; the last one from `steps` on."""
        return self.factors[min(step * len(self.factors) // self.steps, len(self.factors) - 1)]

    def counts(self, first: int) -> tuple[tuple[float, int], ...]:
        """Return (factor, how many of the first `first` steps have it), in order, none of them 0."""
        parts = len(self.factors)
        starts = [-(-self.steps * part // parts) for part in range(parts)]
        ends = [*starts[1:], max(first, self.steps)]
        inside = [max(0, min(end, first) - start) for start, end in zip(starts, ends, strict=True)]
        return tuple((f, count) for f, count in zip(self.factors, inside, strict=True) if count)
