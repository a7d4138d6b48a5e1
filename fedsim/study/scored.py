"""Trials of a search with their scores, and which of them is the best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.headline import Metric
from fedsim.report.significance import ROUNDING
from fedsim.study.compare import Planned
from fedsim.study.judged import all_unscored, unscored
from fedsim.validate import RunError


@dataclass(frozen=True, eq=False)
class Trial:
    """Settings tried for one variant at one budget, and the runs that judge them."""

    variant: str
    epsilon: float | None
    number: int
    settings: tuple[str, ...]
    edges: tuple[str, ...]
    runs: tuple[Planned, ...]


@dataclass(frozen=True, eq=False)
class Judged:
    """A trial with its scores, one a seed (NaN: the run has none), its seconds, and why a run has none."""

    trial: Trial
    scores: tuple[float, ...]
    seconds: float
    headline: Metric | None
    unscored: str = ""

    @property
    def score(self) -> float:
        """Return the mean over seeds, NaN where one has no score."""
        return statistics.mean(self.scores)


def judged(trial: Trial, results: Sequence[dict[str, Any]]) -> Judged:
    """Return a trial with the scores of its runs."""
    reasons = [unscored(result) for result in results]
    scores = tuple(
        math.nan if why else float(result[Metric.of(result).name])
        for why, result in zip(reasons, results, strict=True)
    )
    headline = next((Metric.of(r) for why, r in zip(reasons, results, strict=True) if not why), None)
    seconds = sum(result.get("seconds", 0.0) for result in results)
    return Judged(trial, scores, seconds, headline, "; ".join(dict.fromkeys(filter(None, reasons))))


def chosen(done: Sequence[Judged]) -> dict[tuple[str, float | None], Judged]:
    """Return the best trial by variant and budget; of equal ones the first.

    Raises:
        RunError: none of a variant's trials has a score.
    """
    out: dict[tuple[str, float | None], Judged] = {}
    for key in dict.fromkeys((one.trial.variant, one.trial.epsilon) for one in done):
        mine = [one for one in done if (one.trial.variant, one.trial.epsilon) == key]
        whole = [one for one in mine if one.headline is not None and not math.isnan(one.score)]
        if not whole:
            raise RunError(
                f"no trial of variant '{key[0]}' ended with a score, of {len(mine)}: "
                f"{all_unscored([one.unscored for one in mine])}"
            )
        assert whole[0].headline is not None
        better = max if whole[0].headline.higher_is_better else min
        out[key] = better(whole, key=lambda one: one.score)
    return out


def ties(done: Sequence[Judged], best: Judged) -> int:
    """Return how many trials of the best one's variant and budget have its score, itself among them."""
    place = (best.trial.variant, best.trial.epsilon)
    same = [one for one in done if (one.trial.variant, one.trial.epsilon) == place]
    return sum(abs(one.score - best.score) <= ROUNDING * abs(best.score) for one in same)


def tied(done: Sequence[Judged], best: Judged) -> str:
    """Return in words that other trials are as good as the best; "" where none is."""
    count = ties(done, best)
    return f"{count} of {best.trial.variant}'s trials tie; the first is taken" if count > 1 else ""
