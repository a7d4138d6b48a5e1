"""The parts of one release: named sums, the bound on what one example adds, and shares of the budget.

A part with bound D and share a gets noise of standard deviation sigma D / sqrt(a) in every entry: in those
units an example adds at most sqrt(a) to it, to all parts together at most 1. So the parts are one Gaussian
release of noise multiplier sigma (`fedsim.queries.statistic`), and nothing is given away where one example
can reach all bounds at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedsim import validate
from fedsim.validate import InputError


@dataclass(frozen=True)
class Part:
    """One named sum.

    Attributes:
        name: what it is called in `Layout`.
        shape: of the sum.
        bound: largest L2 norm of what one example adds to it, in its own units, > 0.
        share: of the budget, in (0, 1].
    """

    name: str
    shape: tuple[int, ...]
    bound: float
    share: float = 1.0

    def __post_init__(self) -> None:
        validate.positive(self.bound, f"bound of part {self.name}")
        validate.positive(self.share, f"share of part {self.name}")

    @property
    def length(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The parts of one release, whose shares add up to 1.

    Raises:
        InputError: no part, two of a name, or shares that do not add up to 1.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise InputError(f"a release must have parts of different names, got {names}.")
        whole = math.fsum(part.share for part in self.parts)
        if abs(whole - 1) > 1e-9:
            raise InputError(f"the shares of {', '.join(names)} must add up to 1, got {whole:.12g}.")


def split(errors: Sequence[float]) -> tuple[float, ...]:
    """Return the shares a_j that make sum of e_j^2 / a_j smallest: a_j = e_j / sum of e.

    e_j is how much the noise of part j moves the result (root mean square) when it has the whole budget; with
    share a_j its variance is e_j^2 / a_j. By Cauchy and Schwarz the sum is at least (sum of e)^2, which these
    shares reach.

    Raises:
        InputError: an error that is not positive.
    """
    for error in errors:
        validate.positive(error, "the error of a part")
    whole = math.fsum(errors)
    return tuple(error / whole for error in errors)
