"""Noise that changes over a run in a few levels.

The noise multiplier of a step is one number times the factor of the part of the run the step lies in: the
run is cut into as many equal parts as there are factors. The levels are public and fixed beforehand, so the
steps compose like any others (adaptive composition does not ask for equal ones). A few levels rather than
one a step, because a privacy loss distribution is built for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim import validate
from fedsim.validate import InputError

MAX_LEVELS = 16


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
