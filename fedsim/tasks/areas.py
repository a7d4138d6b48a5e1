"""Areas under ROC curves, as a metric over all examples that were taken in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.tasks.base import Means, Task

AVERAGES = ("macro", "weighted")


class WithAreas(Means):
    """Means over examples, and "auc": the mean of the areas under the ROC curves of several columns.

    Areas are of ranks, so all scores are kept. A column that all examples have, or none, has no area.

    Args:
        task: says the means.
        average: "macro": every column alike; "weighted": by the number of examples that have it.
        columns: of outputs and targets (n, ...): scores (n, columns), floats that are higher for what is more
            likely there, and whether it is there, (n, columns) booleans.
    """

    def __init__(
        self, task: Task, average: str, columns: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__(task)
        self._average, self._columns = average, columns
        self._scores: list[Tensor] = []
        self._present: list[Tensor] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """See `Meter`."""
        super().add(outputs, targets)
        scores, present = self._columns(outputs, targets)
        self._scores.append(scores)
        self._present.append(present)

    def result(self) -> dict[str, float]:
        """See `Meter`."""
        scores, present = torch.cat(self._scores).cpu().numpy(), torch.cat(self._present).cpu().numpy()
        areas = np.array([area(scores[:, place], present[:, place]) for place in range(scores.shape[1])])
        known = ~np.isnan(areas)
        weights = present.sum(0)[known] if self._average == "weighted" else None
        mean = float(np.average(areas[known], weights=weights)) if known.any() else float("nan")
        return {"auc": mean, **super().result()}


def area(scores: NDArray[np.floating[Any]], present: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve of scores (N,), by ranks (Mann and Whitney 1947); ties count half.

    A score that is not a number is in the wrong order with every other. NaN where all examples have the
    label, or none.
    """
    positive = int(present.sum())
    if positive in (0, len(present)):
        return float("nan")
    scores = np.where(np.isnan(scores), np.where(present, -np.inf, np.inf), scores)
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks = (last - (count - 1) / 2.0)[place]
    return float(
        (ranks[present].sum() - positive * (positive + 1) / 2.0) / (positive * (len(present) - positive))
    )
