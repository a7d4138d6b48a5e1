"""What a step sums up: named parts, each with its length, its dtype and the bound on one unit's contribution.

A step releases all parts together, each with Gaussian noise of its own. Where part i has noise multiplier
m_i (noise standard deviation / bound), one unit moves the noised parts, in standard deviations, by at most
1 / m_i each, hence all together by at most the root of the sum of 1 / m_i^2: they are one Gaussian release
of noise multiplier sigma wherever

    sum of 1 / m_i^2  <=  1 / sigma^2.

`Query.multipliers` says how a query splits sigma; `within` checks it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.validate import InputError

Expected = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""name -> (shape, dtype) of the arrays a reply must hold."""


@dataclass(frozen=True)
class Part:
    """One array of a statistic.

    Attributes:
        name: of the array in a reply.
        length: its entries.
        dtype: of the exact sum in a reply.
        bound: largest L2 norm of one unit's contribution, hence the sensitivity of the sum when a unit is
            added or removed.
        purpose: of the keys its noise derives from; no two parts may share one.
    """

    name: str
    length: int
    dtype: np.dtype[Any]
    bound: float
    purpose: str = "noise"

    @property
    def nbytes(self) -> int:
        """Return the bytes of the array."""
        return self.length * self.dtype.itemsize


@dataclass(frozen=True)
class Statistic:
    """The parts of a step's sum, the main one first: what signal and noise are reported of."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        for attribute in ("name", "purpose"):
            held = [getattr(part, attribute) for part in self.parts]
            if len(set(held)) != len(held):
                raise InputError(
                    f"the parts of a statistic must each have a {attribute} of their own, got {held}."
                )

    @property
    def main(self) -> Part:
        """Return the first part."""
        return self.parts[0]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def arrays(self) -> Expected:
        """Return name -> (shape, dtype) of the sums."""
        return {part.name: ((part.length,), part.dtype) for part in self.parts}

    def check(self, sums: Mapping[str, NDArray[Any]], query: str) -> None:
        """Refuse sums of others than the parts: noise and bounds go by the part.

        Args:
            sums: (..., length) by name.
            query: whose they are.

        Raises:
            InputError: names, lengths or dtypes differ.
        """
        wanted = {part.name: (part.length, part.dtype) for part in self.parts}
        got = {name: (values.shape[-1], values.dtype) for name, values in sums.items()}
        if got != wanted:
            raise InputError(
                f"query {query} must sum up {_listed(wanted)}, as its statistic says, but its sums are "
                f"{_listed(got)}."
            )

    def bounds(self, units: int) -> dict[str, float]:
        """Return the largest L2 norm of each part's sum over so many units."""
        return {part.name: units * part.bound if units else 0.0 for part in self.parts}


def _listed(parts: Mapping[str, tuple[int, np.dtype[Any]]]) -> str:
    return ", ".join(f"{name} ({length} of {dtype})" for name, (length, dtype) in sorted(parts.items()))


@dataclass(frozen=True)
class Means:
    """What a step gives: the noisy sums, divided by the public number of units.

    Attributes:
        values: by part, float64 (length,).
        main: name of the main part.
        noise_stds: by part, standard deviation of the noise in every entry; empty without noise.
    """

    values: Mapping[str, NDArray[np.float64]]
    main: str
    noise_stds: Mapping[str, float]


def within(multipliers: Sequence[float], noise_multiplier: float) -> bool:
    """Return whether parts of these noise multipliers are together one release of `noise_multiplier`."""
    return math.fsum(m**-2.0 for m in multipliers) <= noise_multiplier**-2.0 * (1.0 + 1e-12)
