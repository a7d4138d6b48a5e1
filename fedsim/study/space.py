"""A space of settings, and points in it: what a search tries.

Written as a mapping of settings: a list is a choice of values, `{low, high}` a range whose logarithm is
uniform, `{low, high, scale: linear}` one that is uniform itself. Values of a range have three digits; of a
setting that is a whole number, they are whole numbers, both ends among them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from fedsim import seeds, validate
from fedsim.merging import parse_options
from fedsim.validate import InputError

_EDGE = 0.05  # part of a range that is its edge


@dataclass(frozen=True)
class Range:
    """Numbers from low to high."""

    low: float = math.nan
    high: float = math.nan
    scale: str = "log"

    def check(self, where: str) -> None:
        """Refuse a range that is none (InputError)."""
        validate.one_of(self.scale, ("log", "linear"), f"scale of {where}")
        least = 0.0 if self.scale == "log" else -math.inf
        if not (math.isfinite(self.high) and least < self.low < self.high):
            raise InputError(
                f"{where} must be a range with low below high{', above 0' if least == 0.0 else ''}, got low "
                f"{self.low:g} and high {self.high:g}."
            )

    def value(self, place: float) -> float:
        """Return the number at a place in [0, 1)."""
        if self.scale == "linear":
            found = self.low + place * (self.high - self.low)
        else:
            found = self.low * (self.high / self.low) ** place
        return min(max(float(f"{found:.3g}"), self.low), self.high)

    def ends(self, integers: bool) -> tuple[float, float]:
        """Return both ends."""
        return (int(self.low), int(self.high)) if integers else (self.low, self.high)

    def whole(self, place: float) -> int:
        """Return the whole number at a place in [0, 1): by `linear` all are equally likely, by `log` as the
        logarithm of (k + 1) / k."""
        low, high = int(self.low), int(self.high)
        if self.scale == "linear":
            return min(low + int(place * (high - low + 1)), high)
        return min(int(low * ((high + 1) / low) ** place), high)


@dataclass(frozen=True)
class Space:
    """Settings and what each may be, in order; `integers`: those whose ranges are of whole numbers."""

    settings: Mapping[str, Range | tuple[Any, ...]]
    integers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, written: Mapping[str, Any], where: str) -> Space:
        """Read a space as a file holds it.

        Raises:
            InputError: a setting that is neither a list of different values nor a range.
        """
        found: dict[str, Range | tuple[Any, ...]] = {}
        for name, values in written.items():
            place = f"{where}: {name}"
            if isinstance(values, Mapping):
                held: Range = parse_options(dict(values), Range, place)
                held.check(place)
                found[str(name)] = held
            elif isinstance(values, list | tuple) and len({json.dumps(v) for v in values}) == len(values) > 0:
                found[str(name)] = tuple(values)
            else:
                raise InputError(
                    f"{place} must be a list of different values or a range {{low, high}}, got {values!r}."
                )
        return cls(found)

    def over(self, other: Space) -> Space:
        """Return the settings of both; where both have one, this one's."""
        return Space({**other.settings, **self.settings})

    def with_integers(self, is_whole: Callable[[str], bool], where: str) -> Space:
        """Return this space with the settings that are whole numbers as such.

        Args:
            is_whole: says of the name of a setting whether it is.
            where: what holds the space, for messages.

        Raises:
            InputError: a range of whole numbers whose ends are none.
        """
        ranges = {name: held for name, held in self.settings.items() if isinstance(held, Range)}
        found = frozenset(name for name in ranges if is_whole(name))
        for name in found:
            if not (ranges[name].low.is_integer() and ranges[name].high.is_integer()):
                raise InputError(
                    f"{where}: {name} is a whole number, so low and high must be whole numbers, got "
                    f"{ranges[name].low:g} and {ranges[name].high:g}."
                )
        return Space(self.settings, found)

    def _value(self, name: str, place: float) -> Any:
        held = self.settings[name]
        if not isinstance(held, Range):
            return held[int(place * len(held))]
        return held.whole(place) if name in self.integers else held.value(place)

    def at(self, place: Sequence[float]) -> list[str]:
        """Return "key=value" overrides at a place (one coordinate in [0, 1) a setting, in order)."""
        return [
            f"{name}={json.dumps(self._value(name, u))}" for name, u in zip(self.settings, place, strict=True)
        ]

    def at_the_edge(self, place: Sequence[float]) -> list[str]:
        """Return the settings whose range, or list of numbers, ends at or near a place: better values may lie
        beyond."""
        return [name for name, u in zip(self.settings, place, strict=True) if self._ends(name, u)]

    def _ends(self, name: str, place: float) -> bool:
        held, value = self.settings[name], self._value(name, place)
        if isinstance(held, Range):
            return not _EDGE <= place <= 1.0 - _EDGE or (
                name in self.integers and value in (held.low, held.high)
            )
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in held)
        return numbers and len(held) > 1 and value in (min(held), max(held))

    def corners(self) -> Iterator[list[str]]:
        """Yield overrides that together hold every choice and both ends of every range, few at a time."""
        ends = {
            name: values.ends(name in self.integers) if isinstance(values, Range) else values
            for name, values in self.settings.items()
        }
        for row in itertools.zip_longest(*ends.values()):
            picked = zip(ends.items(), row, strict=True)
            yield [
                f"{name}={json.dumps(values[-1] if value is None else value)}"
                for (name, values), value in picked
            ]


def spread(count: int, dimensions: int, seed: int) -> NDArray[np.float64]:
    """Return places (count, dimensions) in [0, 1): the first points of a scrambled Sobol sequence.

    They cover the space more evenly than random ones, and a larger count has the same first points.
    """
    if dimensions == 0:
        return np.zeros((count, 0))
    scramble = int(seeds.stream(seed, "tune").integers(2**63))
    sequence = qmc.Sobol(dimensions, scramble=True, rng=scramble)
    return np.asarray(sequence.random_base2(max(0, math.ceil(math.log2(count)))))[:count]


def independent(number: int, dimensions: int, root: seeds.Root) -> NDArray[np.float64]:
    """Return the place (dimensions,) of trial `number`, uniform and independent of all other trials."""
    return seeds.stream(root, "tune", number).random(dimensions)
