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
from fedsim.learners import LEARNERS
from fedsim.learners.base import Learner, Learning, Means
from fedsim.queries.base import Query
from fedsim.validate import InputError

_LEAST_RIDGE = 1e-9  # of the mean eigenvalue of G, where there is no noise to tell one


@LEARNERS.register("least_squares")
@dataclass(frozen=True)
class LeastSquares(Learner):
    """The linear head that the averaged moments determine; for query moments.

    Attributes:
        ridge: r in units of the mean second moment of a row's entries; null: from the noise.
        centred: whether targets are taken less their mean over the classes, which changes no decision.
    """

    ridge: float | None = None
    centred: bool = True

    takes = ("second", "first")
    needs_fresh_noise = True
    unread = ("optimizer.learning_rate", "optimizer.name", "optimizer.weight_decay", "optimizer.warmup_steps",
              "optimizer.warmup_epochs",
              "optimizer.schedule", "optimizer.scale_with_batch", "train.ema_decay")  # fmt: skip
    tiny = {"ridge": 0.1}  # noqa: RUF012

    def __post_init__(self) -> None:
        if self.ridge is not None:
            validate.positive(self.ridge, "learner.options.ridge")

    def start(self, config: Config, query: Query, layout: FlatSpec, examples: int) -> Solving:
        """See `Learner.start`: the model must be one linear layer."""
        shapes = layout.shapes
        if len(shapes) != 2 or len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
            raise InputError(
                "learner=least_squares makes the weights (k, d) and biases (k,) of one linear layer, but the "
                f"model's trainable parameters have shapes {list(shapes)}. Use model.name=linear."
            )
        return Solving(self, shapes[0][0], shapes[0][1], float(getattr(query, "bias", 0.0)))


class Solving(Learning):
    """The averaged moments, and what they determine.

    Args:
        options: of the learner.
        outputs: k.
        features: d.
        bias: constant entry of every row; 0 for none.
    """

    def __init__(self, options: LeastSquares, outputs: int, features: int, bias: float) -> None:
        self._options, self._outputs, self._features, self._bias = options, outputs, features, bias
        self._means: dict[str, Tensor] = {}
        self._steps = 0

    def init(self, params: Tensor) -> None:
        """See `Learning.init`."""
        self._means, self._steps = {}, 0

    def update(self, params: Tensor, means: Means, step_index: int) -> Tensor:
        """See `Learning.update`."""
        self._steps += 1
        for name in LeastSquares.takes:
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
        first = self._means["first"].reshape(self._outputs, -1)
        weights = solve.least_squares(second, solve.centred(first) if self._options.centred else first, ridge)
        biases = weights[:, self._features] * self._bias if self._bias else weights.new_zeros(self._outputs)
        return torch.cat([weights[:, : self._features].reshape(-1), biases]).to(params.dtype)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """See `Learning.state_dict`."""
        return {name: mean.clone() for name, mean in self._means.items()}, {"steps": self._steps}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """See `Learning.load_state_dict`."""
        self._means = {name: value.clone() for name, value in tensors.items()}
        self._steps = numbers["steps"]
