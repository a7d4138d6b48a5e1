"""Second and label moments of features: what least squares needs (Mehta et al. 2023, DP-LS).

An example's features, with a constant entry, are one row x, clipped to norm C; with class y it adds x x^T to
the second moments, bound C^2, and x to row y of the label moments, bound C (fedsim.heads.moments). Both
together are one release, each with its share of the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim import validate
from fedsim.clipping.base import ClipRule
from fedsim.config import Config
from fedsim.heads import moments
from fedsim.heads import rows as bounded
from fedsim.heads.moments import default_shares
from fedsim.heads.rows import Rows
from fedsim.queries import QUERIES
from fedsim.queries.base import Arrays, NodeView, Query, Shape, State
from fedsim.queries.statistic import Part, Statistic
from fedsim.rules import ENGINE_SETTINGS
from fedsim.types import ClippedSum, StepTask

_UNBOUNDED = 1e12  # longer than any row of finite features that were normalised


@QUERIES.register("moments")
@dataclass(frozen=True)
class Moments(Query):
    """Second moments of an example's clipped features, and of features with its class; for a linear head.

    Attributes:
        bias: constant entry of every row, which counts in its norm; 0 for none.
        second_share: part of the budget that the second moments get, in (0, 1); null: what disturbs the
            solution least.
    """

    bias: float = 1.0
    second_share: float | None = None

    what = "moments of features"
    learner = "least_squares"
    measures_loss = False
    unread = (*ENGINE_SETTINGS, "train.augment_multiplicity", "train.augmentations")

    def __post_init__(self) -> None:
        validate.in_range(self.bias, 0.0, 1e6, "query.options.bias")
        if self.second_share is not None:
            validate.in_range(self.second_share, 1e-6, 1 - 1e-6, "query.options.second_share")

    def check(self, config: Config) -> None:
        """See `Query.check`."""
        if (clipping := config.privacy.clipping.name) != "flat":
            validate.conflicts(
                f"query moments clips rows of features flat, got privacy.clipping={clipping}.",
                "Use flat.",
            )
        if config.task.name != "classification":
            validate.conflicts(
                f"query moments needs one class an example, but task is {config.task.name}.",
                "Use task=classification, or query=gradient.",
            )

    def statistic(self, shape: Shape, clip: ClipRule, state: State) -> Statistic:
        """See `Query.statistic`."""
        layout = self._moments(shape.features, shape.outputs, clip).layout()
        infinite = math.isinf(clip.sensitivity)
        return Statistic(
            tuple(
                Part(
                    part.name,
                    part.length,
                    np.dtype(np.float64),
                    math.inf if infinite else part.bound,
                    "noise" if part.name == "second" else f"noise of {part.name}",
                )
                for part in layout.parts
            )
        )

    def multipliers(self, noise_multiplier: float, expected_units: float) -> tuple[float, ...]:
        """See `Query.multipliers`."""
        second = default_shares(1)[0] if self.second_share is None else self.second_share
        return tuple(noise_multiplier / math.sqrt(share) for share in (second, 1.0 - second))

    def _moments(self, features: int, outputs: int, clip: ClipRule) -> moments.Moments:
        bound = clip.sensitivity if math.isfinite(clip.sensitivity) else _UNBOUNDED
        return moments.Moments(Rows(bound, self.bias), features, outputs)

    def sums(self, node: NodeView, task: StepTask, clip: ClipRule) -> tuple[Arrays, ClippedSum]:
        """See `Query.sums`: a block of examples at a time in memory; norms are of rows before clipping."""
        ids = node.drawn(task)
        total: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        for start in range(0, max(1, len(ids)), bounded.BLOCK):
            inputs, labels = node.plain(ids[start : start + bounded.BLOCK])
            features = inputs.flatten(1)
            lengths = torch.linalg.vector_norm(features, dim=1, dtype=torch.float64).cpu()
            norms.append(torch.hypot(lengths, torch.full_like(lengths, self.bias)))
            block = self._moments(features.shape[1], node.outputs, clip).sums(features, labels)
            for name, value in block.items():
                total[name] = value if name not in total else total[name].add_(value)
        nothing = torch.zeros(0, dtype=torch.float64)
        result = ClippedSum(nothing, len(ids), clip.sensitivity, torch.cat(norms), nothing)
        return {name: value.reshape(-1).numpy() for name, value in total.items()}, result
