"""Second moments of features in the first step, then gradients seen through them (Mehta et al. 2023, DP-FC).

The first step releases G = sum of x x^T, bound C^2. All later steps release the gradient of a logistic loss
(fedsim.heads.gradient), of rows that are mapped by (G + r I)^-1/2 before they are clipped, or as in the paper
of rows as they are, with (G + r I)^-1 applied to the noisy sum. The learner gets the gradient of the model's
parameters in either case. Noise of the first step is larger or smaller than that of the others by a factor
that follows from its share of the budget.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedsim import validate
from fedsim.clipping.base import ClipRule
from fedsim.config import Config
from fedsim.heads import packing, solve, spectrum
from fedsim.heads.feature_covariance import FeatureCovariance as Covariance
from fedsim.heads.feature_covariance import whitening
from fedsim.heads.gradient import Gradient
from fedsim.heads.linear import LinearHead
from fedsim.heads.logistic import Logistic
from fedsim.heads.parts import Layout, Part
from fedsim.queries import QUERIES
from fedsim.queries.base import Arrays, NodeView, Shape, State
from fedsim.queries.features import FeatureQuery
from fedsim.queries.statistic import Means, Statistic
from fedsim.rules import read_with
from fedsim.types import ClippedSum, StepTask

_MAP = "map"  # of rows, packed: in the state, and what nodes are told
_RIDGE = 0.5  # of the noise's norm
_LEAST_RIDGE = 1e-3  # of the mean second moment, where there is no noise to tell one


@QUERIES.register("feature_covariance")
@dataclass(frozen=True)
class FeatureCovariance(FeatureQuery):
    """Second moments of features once, then gradients of a linear head that are preconditioned by them.

    Attributes:
        precondition: "before_clip" maps rows and clips them to norm 1; "after_noise" is the paper's.
        covariance_share: part of the budget that the second moments get, in (0, 1). All gradients together
            have the rest, however many they are, so the best share hardly depends on the steps; in the paper
            it is that of one gradient.
        mapped_clip: largest norm of a row that was mapped before the clip; their mean square is 1.
        ridge: r, which is added to mean second moments G / N; null: half the norm of their noise.
        loss: "softmax" or "one_vs_all".
        alpha: weight of other classes' examples, for one_vs_all.
        offset: constant on every score while learning, for one_vs_all; -10 in the paper.
        residual_clip: largest norm of an example's residuals; null: what the loss promises. What is well
            classified has short ones, and noise falls with the clip.
    """

    precondition: str = "before_clip"
    covariance_share: float = 0.15
    mapped_clip: float = field(default=1.0, metadata=read_with(precondition=("before_clip",)))
    ridge: float | None = None
    loss: str = "softmax"
    alpha: float = 1.0
    offset: float = 0.0
    residual_clip: float | None = 0.3

    what = "second moments of features, then gradients of a linear head"
    tiny = {"mapped_clip": 100.0, "residual_clip": None, "ridge": 0.1}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.one_of(self.precondition, ("before_clip", "after_noise"), "query.options.precondition")
        validate.in_range(self.covariance_share, 1e-6, 1 - 1e-6, "query.options.covariance_share")
        validate.positive(self.mapped_clip, "query.options.mapped_clip")
        if self.ridge is not None:
            validate.positive(self.ridge, "query.options.ridge")
        Logistic(2, self.loss, self.alpha, self.offset)  # refuses wrong options
        if self.residual_clip is not None:
            validate.positive(self.residual_clip, "query.options.residual_clip")

    def check(self, config: Config) -> None:
        """See `Query.check`."""
        super().check(config)
        if config.train.steps < 2:
            validate.conflicts(
                "query feature_covariance takes one step for the second moments and one for every gradient, "
                f"but train.steps is {config.train.steps}.",
                "Use 2 or more, or query=moments.",
            )

    def phase(self, step: int) -> int:
        """See `Query.phase`: the second moments, then the gradients."""
        return min(step, 1)

    def factors(self, steps: int) -> tuple[float, ...]:
        """See `Query.factors`: gradients have the noise multiplier of the run; that of G follows from its
        share a of sum of 1 / sigma^2 over all steps."""
        gradients = max(1, steps - 1)
        return math.sqrt((1.0 - self.covariance_share) / (gradients * self.covariance_share)), 1.0

    def statistic(self, shape: Shape, clip: ClipRule, state: State) -> Statistic:
        """See `Query.statistic`."""
        if shape.phase == 0:
            return self.statistic_of(Covariance(self.rows(clip), shape.features).layout(), clip)
        LinearHead.of(shape.parameters, shape.features, shape.outputs, self.bias)  # refuses another model
        width = self.rows(clip).width(shape.features)
        mapping = torch.zeros(0, 0) if self._mapped else None  # bounds hold whatever the map
        bound = self._gradient(shape.outputs, clip, mapping).bound
        return self.statistic_of(Layout((Part("sum", (shape.outputs, width), bound),)), clip)

    def operations(self, shape: Shape) -> float:
        """See `Query.operations`: second moments, with the lengths of mapped rows that are taken once, then
        scores and gradients."""
        width = shape.features + (self.bias > 0)
        return 4.0 * width * shape.outputs if shape.phase else 2.0 * width**2 * (1 + self._mapped)

    @property
    def _mapped(self) -> bool:
        return self.precondition == "before_clip"

    def _gradient(self, outputs: int, clip: ClipRule, mapping: Tensor | None) -> Gradient:
        loss, rows = Logistic(outputs, self.loss, self.alpha, self.offset), self.rows(clip)
        if not math.isfinite(clip.sensitivity):
            return Gradient(rows, loss, None, mapping, rows.clip_norm)
        return Gradient(rows, loss, self.residual_clip, mapping, self.mapped_clip)

    def sums(self, node: NodeView, task: StepTask, clip: ClipRule) -> tuple[Arrays, ClippedSum]:
        """See `Query.sums`: a block of examples at a time in memory; norms are of contributions before the
        clips, in the first step of rows."""
        ids = node.drawn(task)
        norms: list[Tensor] = []
        if self.phase(task.step) == 0:
            second: Tensor | None = None
            for _, features, _ in self.blocks(node, ids):
                norms.append(self.row_norms(features))
                block = Covariance(self.rows(clip), features.shape[1]).sums(features)["second"]
                second = block if second is None else second.add_(block)
            assert second is not None
            return {"second": second.numpy()}, self.result(len(ids), clip.sensitivity, norms)
        told = hashlib.sha256(task.arrays[_MAP].tobytes()).digest() if self._mapped else b""
        mapping = node.kept("map of rows", told, lambda: _told_map(task)) if self._mapped else None
        gradient, weights = self._gradient(node.outputs, clip, mapping), self.weights(node)
        lengths = self._lengths(node, gradient, told)[np.searchsorted(node.ids, ids)]
        total = torch.zeros_like(weights)
        for place, features, labels in self.blocks(node, ids):
            block, found = gradient.sums(features, labels, weights, lengths[place])
            total += block
            norms.append(found)
        total = gradient.mapped(total)
        return {"sum": total.reshape(-1).numpy()}, self.result(len(ids), gradient.bound, norms)

    def _lengths(self, node: NodeView, gradient: Gradient, told: bytes) -> Tensor:
        """Return the length of every row of the node, (n,), which stays while nodes are told the same map."""

        def compute() -> Tensor:
            return torch.cat([gradient.lengths(features) for _, features, _ in self.blocks(node, node.ids)])

        return node.kept("lengths of rows", told, compute)

    def arrays(self, state: State) -> Arrays:
        """See `Query.arrays`: the map of rows, once there is one and where nodes need it."""
        return {_MAP: state[_MAP].numpy()} if self._mapped and _MAP in state else {}

    def told_bytes(self, shape: Shape) -> int:
        """See `Query.told_bytes`."""
        if shape.phase == 0 or not self._mapped:
            return 0
        return 4 * packing.length(shape.features + (self.bias > 0))

    def for_learner(self, state: State, means: Means) -> Means:
        """See `Query.for_learner`: gradients of mapped rows as gradients of the model's parameters."""
        if "sum" not in means.values:
            return means
        mapping = _unpacked(state[_MAP])
        slope = torch.from_numpy(means.values["sum"]).reshape(-1, len(mapping)) @ mapping
        if not self._mapped:
            slope = slope @ mapping
        head = LinearHead(len(slope), slope.shape[1] - (self.bias > 0), self.bias)
        return Means({"sum": head.flat(slope).numpy()}, "sum", {})

    def updated(self, state: State, means: Means) -> State:
        """See `Query.updated`: the map of rows that follows from the second moments."""
        if "second" not in means.values:
            return state
        second = spectrum.of_packed(torch.from_numpy(means.values["second"]))
        if noise_std := means.noise_stds.get("second", 0.0):
            second = second.denoised(noise_std)
            ridge = solve.ridge(noise_std, len(second.values), _RIDGE)
        else:
            second = second.projected()
            ridge = _LEAST_RIDGE * float(second.values.mean())
        mapping = whitening(second, 1.0, ridge if self.ridge is None else self.ridge)
        return {_MAP: packing.pack(mapping).float()}


def _told_map(task: StepTask) -> Tensor:
    return _unpacked(torch.from_numpy(task.arrays[_MAP].copy()))


def _unpacked(packed: Tensor) -> Tensor:
    return packing.unpack(packed.double())
