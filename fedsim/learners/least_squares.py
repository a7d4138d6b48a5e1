"""A linear head by least squares on noisy moments (Mehta et al. 2023, arXiv 2211.13403: DP-LS).

The moments of all steps so far are averaged, and the weights W = b (G + r I)^-1 solved in float64: one step
over everybody is all it needs, more steps are so many looks at samples. Scores are W x for rows x with the
query's constant entry; for decisions it does not matter that a row was clipped, which scales all scores of an
example alike.

With noise of known scale, G is denoised and r follows from the noise (fedsim.heads.solve.ridge), unless
given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import validate
from fedsim.config import Config
from fedsim.grads.flat import FlatSpec
from fedsim.heads import solve, spectrum
from fedsim.heads.linear import LinearHead
from fedsim.learners import LEARNERS
from fedsim.learners.base import Learner, Learning, Means
from fedsim.learners.linear import OPTIMIZER_SETTINGS, linear_head
from fedsim.queries.base import Query

_LEAST_RIDGE = 1e-9  # of the mean eigenvalue of G, where there is no noise to tell one


@LEARNERS.register("least_squares")
@dataclass(frozen=True)
class LeastSquares(Learner):
    """The linear head that the averaged moments determine; for query moments.

    Attributes:
        ridge: r, which is added to mean second moments G / N; null: from the noise.
        centred: whether targets are taken less their mean over the classes, which changes no decision; not
            with `alpha`.
        alpha: weight a of all examples beside those of a class: w_l = (A_l + a G + r I)^-1 b_l with the
            second moments A_l of class l, for query moments with per_class; null: one G for all.
    """

    ridge: float | None = None
    centred: bool = True
    alpha: float | None = None

    takes = ("second", "first")
    needs_fresh_noise = True
    unread = OPTIMIZER_SETTINGS
    tiny = {"ridge": 0.1}  # noqa: RUF012

    def __post_init__(self) -> None:
        if self.ridge is not None:
            validate.positive(self.ridge, "learner.options.ridge")
        if self.alpha is not None:
            validate.positive(self.alpha, "learner.options.alpha")

    def start(self, config: Config, query: Query, layout: FlatSpec, examples: int) -> Solving:
        """See `Learner.start`: the model must be one linear layer."""
        if (self.alpha is not None) != bool(getattr(query, "per_class", False)):
            validate.conflicts(
                f"learner.options.alpha is {self.alpha}, and query.options.per_class is "
                f"{getattr(query, 'per_class', False)}: second moments of every class are for alpha.",
                "Set both, or neither.",
            )
        return Solving(self, linear_head(query, layout, "least_squares"))


class Solving(Learning):
    """The averaged moments, and what they determine.

    Args:
        options: of the learner.
        head: the layer.
    """

    def __init__(self, options: LeastSquares, head: LinearHead) -> None:
        self._options, self._head = options, head
        self._means: dict[str, Tensor] = {}
        self._steps = 0

    def init(self, params: Tensor) -> None:
        """See `Learning.init`."""
        self._means, self._steps = {}, 0

    def update(self, params: Tensor, means: Means, step_index: int) -> Tensor:
        """See `Learning.update`."""
        self._steps += 1
        by_class = () if self._options.alpha is None else ("by_class",)
        for name in (*LeastSquares.takes, *by_class):
            new = torch.from_numpy(means.values[name]).double()
            held = self._means.get(name, torch.zeros_like(new))
            self._means[name] = held + (new - held) / self._steps
        second = spectrum.of_packed(self._means["second"])
        noise_std = means.noise_stds.get("second", 0.0) / self._steps**0.5
        if noise_std > 0.0:
            second, ridge = second.denoised(noise_std), solve.ridge(noise_std, len(second.values))
        else:
            second = second.projected()
            ridge = _LEAST_RIDGE * float(second.values.mean())
        if self._options.ridge is not None:
            ridge = self._options.ridge
        first = self._means["first"].reshape(self._head.outputs, -1)
        if self._options.alpha is not None:
            own = self._means["by_class"].reshape(self._head.outputs, -1)
            weights = solve.weighted_least_squares(
                own, self._means["second"], first, ridge, self._options.alpha
            )
            return self._head.flat(weights).to(params.dtype)
        weights = solve.least_squares(second, solve.centred(first) if self._options.centred else first, ridge)
        return self._head.flat(weights).to(params.dtype)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """See `Learning.state_dict`."""
        return {name: mean.clone() for name, mean in self._means.items()}, {"steps": self._steps}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """See `Learning.load_state_dict`."""
        self._means = {name: value.clone() for name, value in tensors.items()}
        self._steps = numbers["steps"]
