"""Gradient and Hessians of a logistic loss, for a Newton step (Mehta et al. 2023, DP-Newton).

At zero weights the Hessians of all classes coincide, so the first step releases one, without the factor
sqrt(k); later steps release one a class (fedsim.heads.newton). Bounds of later steps hold at any weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim import validate
from fedsim.clipping.base import ClipRule
from fedsim.config import Config
from fedsim.grads.flat import get_flat
from fedsim.heads import newton
from fedsim.heads.logistic import Logistic
from fedsim.queries import QUERIES
from fedsim.queries.base import Arrays, NodeView, Shape, State
from fedsim.queries.features import FeatureQuery
from fedsim.queries.statistic import Statistic
from fedsim.types import ClippedSum, StepTask
from fedsim.validate import InputError


@QUERIES.register("newton")
@dataclass(frozen=True)
class Newton(FeatureQuery):
    """Gradient and Hessian of every class of a logistic loss, for Newton steps of a linear head from zero.

    Attributes:
        loss: "softmax", of which the diagonal blocks of the Hessian are taken, or "one_vs_all".
        alpha: weight of other classes' examples, for one_vs_all; with 1 the first step has one Hessian.
        hessian_share: part of the budget that the Hessians get, in (0, 1); half as in the paper.
        residual_clip: largest norm of an example's residuals; null: what the loss promises. Beyond the first
            step that is sqrt(2), and more steps gain little without a clip of 0.3 or so.
    """

    loss: str = "softmax"
    alpha: float = 1.0
    hessian_share: float = 0.5
    residual_clip: float | None = None

    what = "gradients and Hessians of a linear head"
    learner = "newton"

    def __post_init__(self) -> None:
        super().__post_init__()
        Logistic(2, self.loss, self.alpha)  # refuses wrong options
        validate.in_range(self.hessian_share, 1e-6, 1 - 1e-6, "query.options.hessian_share")
        if self.residual_clip is not None:
            validate.positive(self.residual_clip, "query.options.residual_clip")

    def check(self, config: Config) -> None:
        """See `Query.check`."""
        super().check(config)
        if not config.model.options.get("zero_init", True):
            validate.conflicts(
                "query newton starts at zero weights, where all classes have one Hessian, but "
                "model.options.zero_init is false.",
                "Leave it true.",
            )

    def check_model(self, model: nn.Module, example_shape: tuple[int, ...], outputs: int) -> None:
        """See `Query.check_model`: also that its parameters are zero, as the first bounds take them."""
        super().check_model(model, example_shape, outputs)
        if bool(get_flat(model).any()):
            raise InputError(
                "query newton starts at zero weights, for which its first bounds hold, but the model's "
                "parameters are not zero. Use model.name=linear with its zero_init."
            )

    def phase(self, step: int) -> int:
        """See `Query.phase`: the first step, and the others."""
        return min(step, 1)

    def factors(self, steps: int) -> tuple[float, ...]:
        """See `Query.factors`: all steps alike."""
        return (1.0, 1.0) if steps > 1 else (1.0,)

    def statistic(self, shape: Shape, clip: ClipRule, state: State) -> Statistic:
        """See `Query.statistic`."""
        of_step = self._newton(shape.features, shape.outputs, clip, shape.phase)
        zero = None if shape.phase else torch.zeros(shape.outputs, of_step.width)
        return self.statistic_of(of_step.layout(zero), clip)

    def multipliers(self, noise_multiplier: float, expected_units: float) -> tuple[float, ...]:
        """See `Query.multipliers`."""
        shares = 1.0 - self.hessian_share, self.hessian_share
        return tuple(noise_multiplier / math.sqrt(share) for share in shares)

    def operations(self, shape: Shape) -> float:
        """See `Query.operations`: scores, gradient, and one Hessian or one a class."""
        width = shape.features + (self.bias > 0)
        hessians = 1 if shape.phase == 0 and self.alpha == 1.0 else shape.outputs
        return 2.0 * width * (hessians * width + 2 * shape.outputs)

    def _newton(self, features: int, outputs: int, clip: ClipRule, phase: int) -> newton.Newton:
        shared = phase == 0 and self.alpha == 1.0
        loss = Logistic(outputs, self.loss, self.alpha)
        return newton.Newton(self.rows(clip), loss, features, self.residual_clip, shared)

    def sums(self, node: NodeView, task: StepTask, clip: ClipRule) -> tuple[Arrays, ClippedSum]:
        """See `Query.sums`: a block of examples at a time in memory; norms are of rows before clipping."""
        ids, weights, phase = node.drawn(task), self.weights(node), self.phase(task.step)
        if phase == 0 and bool(weights.any()):
            raise InputError(
                "the first step of query newton must be asked at zero weights: its bounds are theirs."
            )
        total: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        for _, features, labels in self.blocks(node, ids):
            norms.append(self.row_norms(features))
            of_step = self._newton(features.shape[1], node.outputs, clip, phase)
            for name, value in of_step.sums(features, labels, weights).items():
                total[name] = value if name not in total else total[name].add_(value)
        arrays = {name: value.reshape(-1).numpy() for name, value in total.items()}
        return arrays, self.result(len(ids), clip.sensitivity, norms)
