"""Clipped per-example gradients: the sum of DP-SGD (Abadi et al. 2016, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.clipping.base import ClipRule
from fedsim.queries import QUERIES
from fedsim.queries.base import Arrays, NodeView, Query, Shape, State
from fedsim.queries.statistic import Part, Statistic
from fedsim.types import ClippedSum, StepTask


@QUERIES.register("gradient")
@dataclass(frozen=True)
class Gradient(Query):
    """The gradient of an example at the step's parameters, averaged over its views, then clipped."""

    what = "per-example gradients"

    def statistic(self, shape: Shape, clip: ClipRule, state: State) -> Statistic:
        """See `Query.statistic`."""
        return Statistic((Part("sum", shape.parameters, shape.dtype, clip.sensitivity),))

    def sums(self, node: NodeView, task: StepTask, clip: ClipRule) -> tuple[Arrays, ClippedSum]:
        """See `Query.sums`: it does not matter whose example is next to whose, so the examples of all holders
        share full physical batches."""
        result = node.clipped_sum(node.drawn(task), task, clip)
        return {"sum": result.sum.cpu().numpy()}, result

    def sums_by_holder(
        self, node: NodeView, task: StepTask, clip: ClipRule, here: NDArray[np.bool_]
    ) -> tuple[dict[str, Tensor], ClippedSum]:
        """See `Query.sums_by_holder`."""
        ids = node.drawn(task)
        sums, result = node.clipped_sums(ids[np.isin(node.owners(ids), node.holders[here])], task, clip)
        return {"sum": sums}, result
