"""Second and label moments of features: what least squares needs (Mehta et al. 2023, DP-LS).

With class y an example adds x x^T to the second moments, bound C^2, and x to row y of the label moments,
bound C; with `per_class`, x x^T to the second moments of its class, too (fedsim.heads.moments). All together
are one release, each part with its share of the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fedsim import validate
from fedsim.clipping.base import ClipRule
from fedsim.heads import moments
from fedsim.heads.moments import default_shares
from fedsim.queries import QUERIES
from fedsim.queries.base import Arrays, NodeView, Shape, State
from fedsim.queries.features import FeatureQuery
from fedsim.queries.statistic import Statistic
from fedsim.types import ClippedSum, StepTask


@QUERIES.register("moments")
@dataclass(frozen=True)
class Moments(FeatureQuery):
    """Second moments of an example's clipped features, and of features with its class; for a linear head.

    Attributes:
        second_share: part of the budget that the second moments get, in (0, 1), the rest is for the others in
            equal parts; null: what disturbs the solution least.
        per_class: whether to release the second moments of every class beside those of all, for least squares
            with `alpha`.
    """

    second_share: float | None = None
    per_class: bool = False

    what = "moments of features"
    learner = "least_squares"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.second_share is not None:
            validate.in_range(self.second_share, 1e-6, 1 - 1e-6, "query.options.second_share")

    def statistic(self, shape: Shape, clip: ClipRule, state: State) -> Statistic:
        """See `Query.statistic`."""
        return self.statistic_of(self._moments(shape.features, shape.outputs, clip).layout(), clip)

    def multipliers(self, noise_multiplier: float, expected_units: float) -> tuple[float, ...]:
        """See `Query.multipliers`."""
        shares = default_shares(1, per_class=self.per_class)
        if self.second_share is not None:
            others = len(shares) - 1
            shares = (self.second_share, *((1.0 - self.second_share) / others,) * others)
        return tuple(noise_multiplier / math.sqrt(share) for share in shares)

    def operations(self, shape: Shape) -> float:
        """See `Query.operations`: products of a row with itself and with its class."""
        width = shape.features + (self.bias > 0)
        return 2.0 * width * (width + shape.outputs)

    def _moments(self, features: int, outputs: int, clip: ClipRule) -> moments.Moments:
        return moments.Moments(self.rows(clip), features, outputs, per_class=self.per_class)

    def sums(self, node: NodeView, task: StepTask, clip: ClipRule) -> tuple[Arrays, ClippedSum]:
        """See `Query.sums`: a block of examples at a time in memory; norms are of rows before clipping."""
        ids = node.drawn(task)
        total: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        for _, features, labels in self.blocks(node, ids):
            norms.append(self.row_norms(features))
            block = self._moments(features.shape[1], node.outputs, clip).sums(features, labels)
            for name, value in block.items():
                total[name] = value if name not in total else total[name].add_(value)
        arrays = {name: value.reshape(-1).numpy() for name, value in total.items()}
        return arrays, self.result(len(ids), clip.sensitivity, norms)
