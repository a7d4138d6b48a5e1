"""Finished runs of a comparison, and how they belong together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsim.headline import Metric
from fedsim.report import significance
from fedsim.report.significance import Difference


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
    """

    variant: str
    epsilon: float | None
    seed: int
    result: dict[str, Any]
    curve: list[tuple[int, float]]
    settings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """The runs of one variant at one budget, one a seed."""

    variant: str
    epsilon: float | None
    cells: tuple[Cell, ...]

    @property
    def result(self) -> dict[str, Any]:
        """The result of the first seed, for what all seeds share."""
        return self.cells[0].result

    @property
    def headline(self) -> Metric:
        """What the runs are judged by."""
        return Metric.of(self.result)

    @property
    def scores(self) -> list[float]:
        """The headline of each run, by seed."""
        return [cell.result[self.headline.name] for cell in sorted(self.cells, key=lambda c: c.seed)]

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

    def minus(self, other: Group) -> Difference:
        """Return the difference to another group, seed by seed over those that both have finished."""
        own, others = ({c.seed: c.result[self.headline.name] for c in g.cells} for g in (self, other))
        both = sorted(set(own) & set(others))
        if not both:
            return Difference(self.mean - other.mean, None, None)
        return significance.paired([own[s] for s in both], [others[s] for s in both])

    def said(self, value: float | None = None) -> str:
        """Return the mean with its 95 % interval, or `value`, in the headline's unit."""
        if value is not None:
            return self.headline.shown(value)
        half = significance.half_width(self.scores)
        spread = "" if half is None else f" ± {self.headline.number(half)}"
        unit = f" {self.headline.unit}".rstrip()
        return f"{self.headline.number(self.mean)}{spread}{unit}"


def groups(cells: Iterable[Cell]) -> list[Group]:
    """Return the groups by budget, smallest first and those without one last, else in the order given."""
    found: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.variant, cell.epsilon), []).append(cell)
    unsorted = [Group(*key, tuple(held)) for key, held in found.items()]
    return sorted(unsorted, key=lambda g: float("inf") if g.epsilon is None else g.epsilon)


def by_budget(found: Sequence[Group]) -> dict[float | None, list[Group]]:
    """Return the groups of each budget, in order."""
    out: dict[float | None, list[Group]] = {}
    for group in found:
        out.setdefault(group.epsilon, []).append(group)
    return out


def neighbours(found: Sequence[Group]) -> list[Difference | None]:
    """Return for each group what it is above or below the one before it at the same budget, None for the
    first; p is adjusted for all of these tests (Holm)."""
    pairs = zip(found[1:], found, strict=False)
    raw = [own.minus(above) if own.epsilon == above.epsilon else None for own, above in pairs]
    adjusted = iter(significance.holm([difference for difference in raw if difference is not None]))
    return [None, *(None if difference is None else next(adjusted) for difference in raw)]
