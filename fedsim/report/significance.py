"""What a few seeds can tell: means with an interval, and differences with a test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy import special, stats

from fedsim.headline import Metric

LEVEL = 0.05
ROUNDING = 1e-12  # of scores: differences closer than this are the same number
FEWEST = 3  # seeds for an interval: that of two is twelve times their spread, or nothing where they agree
FEW = "too few seeds of both"


@dataclass(frozen=True)
class Difference:
    """A difference of two means.

    Attributes:
        mean: one minus the other.
        half_width: of its 95 % interval by Student's t; None where there is none (`half_width`).
        p: two-sided, of the test that both are the same; None where there is no test.
        why: there is none.
    """

    mean: float
    half_width: float | None
    p: float | None
    why: str = ""

    @property
    def significant(self) -> bool:
        """Whether the test tells the two apart at 5 %."""
        return self.p is not None and self.p <= LEVEL

    @property
    def verdict(self) -> str:
        """Return the p, or that there is nothing to tell."""
        if self.p is None:
            return f"no test: {self.why}"
        shown = "p < 0.001" if self.p < 0.001 else f"p {self.p:.2g}"
        return shown if self.significant else f"not significant, {shown}"


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of the mean, by Student's t.

    None for fewer than three values, and for values that are all the same: that few seeds agree, as they may
    on few examples, does not make their mean certain.
    """
    if len(values) < FEWEST or _same(values):
        return None
    quantile = float(special.stdtrit(len(values) - 1, 0.975))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def mean_with_interval(
    values: Sequence[float], places: int | None = None, unit: str = "", name: str = "", of: int = 0
) -> str:
    """Return how people read a mean over seeds: "80.10 ± 0.52 %", or "80.10 % (2 seeds, no interval)".

    Args:
        values: one a seed.
        places: after the point, of the mean and of half its 95 % interval; None: four digits of the mean.
        unit: behind the number.
        name: of what it is, in parentheses.
        of: number of seeds there should be; fewer are told.
    """
    mean, half, count = statistics.mean(values), half_width(values), len(values)
    text = f"{mean:#.4g}" if places is None else f"{mean:.{places}f}"
    shown = len(text.partition("e")[0].partition(".")[2])
    if half is not None:
        text = f"{text.removesuffix('.')} ± " + (f"{half:.4g}" if "e" in text else f"{half:.{shown}f}")
    seeds = f"{count} of {of} seeds" if count < of else f"{count} seed{'s' if count > 1 else ''}"
    told = seeds if count < of else ""
    if half is None:
        told = f"{seeds}{' that agree' if count >= FEWEST else ''}, no interval"
    about = "; ".join(filter(None, (name, told)))
    return f"{text.removesuffix('.')} {unit}".rstrip() + (f" ({about})" if about else "")


def of_scores(scores: Sequence[float], headline: Metric, name: str = "", of: int = 0) -> str:
    """Return `mean_with_interval` of scores, in the unit of what they are."""
    places = 2 if headline.unit == "%" else None
    return mean_with_interval([headline.scale * x for x in scores], places, headline.unit, name, of)


def _same(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= ROUNDING * max(map(abs, values))


def paired(own: Sequence[float], other: Sequence[float]) -> Difference:
    """Compare runs of the same seeds, in the same order, by a paired t-test (Student 1908).

    Where all differences are the same number, as few runs on few examples may give, by the sign test.
    """
    changes = [a - b for a, b in zip(own, other, strict=True)]
    mean = statistics.mean(changes)
    if len(changes) < 2:
        return Difference(mean, None, None, FEW)
    # The t-test divides by the spread, which here is nothing but rounding: a sign test instead.
    if max(changes) - min(changes) <= ROUNDING * max(map(abs, (*own, *other))):
        return Difference(mean, None, 1.0 if mean == 0 else 2.0 ** (1 - len(changes)))
    t = mean * math.sqrt(len(changes)) / statistics.stdev(changes)
    return Difference(mean, half_width(changes), 2.0 * float(special.stdtr(len(changes) - 1, -abs(t))))


def welch(own: Sequence[float], other: Sequence[float]) -> Difference:
    """Compare runs whose seeds do not belong together, by the t-test of Welch (1947)."""
    mean = statistics.mean(own) - statistics.mean(other)
    if min(len(own), len(other)) < 2:
        return Difference(mean, None, None, FEW)
    if len(set(own)) == len(set(other)) == 1:  # as in `paired`
        return Difference(mean, None, 1.0 if mean == 0 else 2.0 ** (1 - min(len(own), len(other))))
    test = stats.ttest_ind(own, other, equal_var=False)
    interval = test.confidence_interval(0.95)
    return Difference(mean, float(interval.high - interval.low) / 2, float(test.pvalue))


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with p adjusted for there being several tests (Holm 1979), in the same order."""
    places = [i for i, difference in enumerate(differences) if difference.p is not None]
    adjusted, largest = list(differences), 0.0
    for rank, place in enumerate(sorted(places, key=lambda i: differences[i].p or 0.0)):
        p = differences[place].p
        assert p is not None
        largest = max(largest, min(1.0, (len(places) - rank) * p))
        adjusted[place] = replace(differences[place], p=largest)
    return adjusted
