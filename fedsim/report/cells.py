"""Finished runs of a comparison, and how they belong together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedsim.headline import Metric
from fedsim.report import claim, significance
from fedsim.report.significance import Difference

UNLIKE = "not the same seeds of both"


@dataclass(frozen=True)
class Cell:
    """One finished run of a comparison.

    Attributes:
        variant: its row.
        epsilon: the budget it was given; None: one of its own, or none.
        seed: of the run.
        result: its result.json.
        curve: (step, headline) over its course.
        settings: what its variant changes in the recipe, as "key=value".
        held_out: whether it was judged by held-out training examples in place of the test data.
    """

    variant: str
    epsilon: float | None
    seed: int
    result: dict[str, Any]
    curve: list[tuple[int, float]]
    settings: list[str] = field(default_factory=list)
    held_out: bool = False


@dataclass(frozen=True)
class Group:
    """The runs of one variant at one budget, one a seed; `seeds` is how many the comparison has."""

    variant: str
    epsilon: float | None
    cells: tuple[Cell, ...]
    seeds: int = 0

    @property
    def result(self) -> dict[str, Any]:
        """The result of the first seed, for what all seeds share."""
        return self.cells[0].result

    @property
    def epsilons(self) -> dict[str, dict[str, Any]]:
        """Epsilon by unit, as in result.json: of the seed that spent most, because a row claims it of all."""
        held = [cell.result["epsilon"] for cell in self.cells]
        units = dict.fromkeys(unit for epsilons in held for unit in epsilons)
        return {unit: max((e[unit] for e in held if unit in e), key=_size) for unit in units}

    @property
    def claimed(self) -> dict[str, Any]:
        """The epsilon of the unit that its trust model protects; empty where it has none."""
        return self.epsilons.get(self.result["trust"]["unit"], {})

    @property
    def noised(self) -> bool:
        """Whether there is noise in it, claimed or not."""
        return any(cell.result["noise_multiplier"] for cell in self.cells)

    @property
    def headline(self) -> Metric:
        """What the runs are judged by."""
        return Metric.of(self.result)

    @property
    def scores(self) -> list[float]:
        """The headline of each run, by seed."""
        return [cell.result[self.headline.name] for cell in sorted(self.cells, key=lambda c: c.seed)]

    @property
    def judged_by(self) -> str:
        """The headline's name, with what it was computed on."""
        return f"{'held-out' if self.cells[0].held_out else 'test'} {self.headline.name}"

    @property
    def axis(self) -> str:
        """The label of an axis of scores."""
        return f"{'held-out' if self.cells[0].held_out else 'test'} {self.headline.label}"

    @property
    def protected(self) -> bool:
        """Whether an epsilon can be claimed for some unit."""
        return any(claim.number(spent["value"]) != claim.NONE for spent in self.epsilons.values())

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return statistics.mean(self.scores)

    @property
    def seconds(self) -> float:
        """Mean length of a run."""
        return statistics.mean(cell.result["seconds"] for cell in self.cells)

    @property
    def holders(self) -> tuple[float, float, float] | None:
        """The 5th, 50th and 95th percentile of scores over holders, means over seeds; None where a run has
        none."""
        if not all(cell.result["holder_scores"] for cell in self.cells):
            return None
        low, middle, high = (
            statistics.mean(cell.result["holder_scores"][name] for cell in self.cells)
            for name in ("5%", "50%", "95%")
        )
        return low, middle, high

    @property
    def by_seed(self) -> list[tuple[int, float]]:
        """Seeds, smallest first, with their scores."""
        return sorted((c.seed, c.result[self.headline.name]) for c in self.cells)

    def minus(self, other: Group) -> Difference:
        """Return the difference to another group, seed by seed; no test where they do not have the same
        seeds, as in a comparison that is not finished."""
        own, others = self.by_seed, other.by_seed
        if [seed for seed, _ in own] != [seed for seed, _ in others]:
            return Difference(self.mean - other.mean, None, None, UNLIKE)
        return significance.paired([score for _, score in own], [score for _, score in others])

    def said(self) -> str:
        """Return the mean with half its 95 % interval, in the headline's unit, and of how many seeds it is
        where some are missing."""
        return significance.of_scores(self.scores, self.headline, of=self.seeds)


def _size(spent: Mapping[str, Any]) -> float:
    return math.inf if spent["value"] is None else float(spent["value"])


def groups(cells: Iterable[Cell]) -> list[Group]:
    """Return the groups by budget, smallest first and those without one last, else in the order given."""
    found: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.variant, cell.epsilon), []).append(cell)
    seeds = len({cell.seed for held in found.values() for cell in held})
    unsorted = [Group(*key, tuple(held), seeds) for key, held in found.items()]
    return sorted(unsorted, key=lambda g: float("inf") if g.epsilon is None else g.epsilon)


def by_budget(found: Sequence[Group]) -> dict[float | None, list[Group]]:
    """Return the groups of each budget, in order."""
    out: dict[float | None, list[Group]] = {}
    for group in found:
        out.setdefault(group.epsilon, []).append(group)
    return out


Tests = dict[tuple[int, int], Difference]


def pairwise(found: Sequence[Group]) -> Tests:
    """Return by places (i, j), i > j, what group i is above or below group j, for all pairs of one budget.

    All of them are one family: p is adjusted for their number (Holm), so that a page with no true difference
    at all calls two apart at most one time in twenty, whichever is looked at because it came out best. Groups
    of the same scores, as of variants that are the same by construction, are tested once: copies of a row
    change no other row's p.
    """
    places: dict[Any, int] = {}
    first = [places.setdefault((own.epsilon, *own.by_seed), i) for i, own in enumerate(found)]
    pairs = [(i, j) for i, own in enumerate(found) for j in range(i) if own.epsilon == found[j].epsilon]
    tested = {place: (first[place[0]], first[place[1]]) for place in pairs}
    family = list(dict.fromkeys((max(of), min(of)) for of in tested.values() if of[0] != of[1]))
    known = dict(zip(family, significance.holm([found[i].minus(found[j]) for i, j in family]), strict=True))
    return {
        (i, j): found[i].minus(found[j]) if one == other else between(known, one, other)
        for (i, j), (one, other) in tested.items()
    }


def between(known: Tests, one: int, other: int) -> Difference:
    """Return the difference of two groups of one budget, by their places."""
    if one > other:
        return known[one, other]
    turned = known[other, one]
    return replace(turned, mean=-turned.mean)
