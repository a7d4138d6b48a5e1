"""Newton steps of a linear head on noisy gradients and Hessians (Mehta et al. 2023: DP-Newton).

W <- W - rate (H + (r + p) I)^-1 (g + p W), class by class, in float64, with a public penalty p. Where the
noise of H is known, H is denoised and r follows from the noise (fedsim.heads.solve.ridge), unless given; else
H is projected to be positive semidefinite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import validate
from fedsim.config import Config
from fedsim.grads.flat import FlatSpec
from fedsim.heads import packing, solve
from fedsim.heads.linear import LinearHead
from fedsim.learners import LEARNERS
from fedsim.learners.base import Learner, Learning, Means
from fedsim.learners.linear import OPTIMIZER_SETTINGS, linear_head
from fedsim.queries.base import Query

_LEAST_RIDGE = 1e-9  # of a Hessian's eigenvalues, where there is no noise to tell one


@LEARNERS.register("newton")
@dataclass(frozen=True)
class NewtonSteps(Learner):
    """Newton steps of a linear head from zero weights; for query newton.

    Attributes:
        rate: factor on a step.
        ridge: r, which is added to mean Hessians H / N; null: from the noise.
        penalty: p of (p / 2) |W|^2, public; per example.
    """

    rate: float = 1.0
    ridge: float | None = None
    penalty: float = 0.0

    takes = ("gradient", "hessian")
    needs_fresh_noise = True
    unread = OPTIMIZER_SETTINGS
    tiny = {"ridge": 1.0}  # noqa: RUF012

    def __post_init__(self) -> None:
        validate.positive(self.rate, "learner.options.rate")
        validate.in_range(self.penalty, 0.0, 1e12, "learner.options.penalty")
        if self.ridge is not None:
            validate.positive(self.ridge, "learner.options.ridge")

    def start(self, config: Config, query: Query, layout: FlatSpec, examples: int) -> Stepping:
        """See `Learner.start`: the model must be one linear layer."""
        return Stepping(self, linear_head(query, layout, "newton"))


class Stepping(Learning):
    """Steps without a state of their own.

    Args:
        options: of the learner.
        head: the layer.
    """

    def __init__(self, options: NewtonSteps, head: LinearHead) -> None:
        self._options, self._head = options, head

    def init(self, params: Tensor) -> None:
        """See `Learning.init`."""

    def update(self, params: Tensor, means: Means, step_index: int) -> Tensor:
        """See `Learning.update`."""
        weights = self._head.rows(params.double())
        gradient = torch.from_numpy(means.values["gradient"]).reshape(weights.shape)
        hessian = torch.from_numpy(means.values["hessian"])
        width, noise_std = weights.shape[1], means.noise_stds.get("hessian", 0.0)
        if len(hessian) > packing.length(width):  # one a class
            hessian = hessian.reshape(len(weights), -1)
        if (ridge := self._options.ridge) is None:
            least = _LEAST_RIDGE * float(torch.linalg.vector_norm(hessian)) / width**0.5
            ridge = solve.ridge(noise_std, width) if noise_std > 0.0 else least
        stepped = solve.newton_step(
            weights, gradient, hessian, ridge, self._options.rate, self._options.penalty, noise_std
        )
        return self._head.flat(stepped).to(params.dtype)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """See `Learning.state_dict`."""
        return {}, {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """See `Learning.load_state_dict`."""
