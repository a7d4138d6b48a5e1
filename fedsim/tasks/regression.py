"""Real numbers an example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedsim import validate
from fedsim.headline import Metric
from fedsim.tasks import TASKS
from fedsim.tasks.base import Means, Task
from fedsim.validate import InputError

STRATA = 10


@TASKS.register("regression")
@dataclass(frozen=True)
class Regression(Task):
    """Real numbers an example: squared or Huber loss on outputs (n, values), root mean squared error.

    The model learns (target - center) / scale, both public; metrics are in the targets' own unit. A scale
    near half the declared range keeps outputs and gradients of order one.

    Attributes:
        center, scale: of the targets.
        loss_name: "squared" or "huber" (quadratic up to 1 in the scaled difference, then linear).
        unit: of the targets, for tables.
    """

    kind: ClassVar[str] = "values"
    center: float = 0.0
    scale: float = 1.0
    loss_name: str = "squared"
    unit: str = ""

    def __post_init__(self) -> None:
        validate.positive(self.scale, "task.options.scale")
        validate.one_of(self.loss_name, ("squared", "huber"), "task.options.loss_name")
        if not np.isfinite(self.center):
            raise InputError(f"task.options.center must be finite, got {self.center}.")

    @property
    def own_metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """Root of the mean squared error, mean absolute error."""
        return Metric("rmse", self.unit, False), Metric("mae", self.unit, False)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task.loss`; targets are floats (n, values), the mean over values is taken."""
        wanted = (targets - self.center) / self.scale
        if outputs.shape != wanted.shape:
            raise InputError(
                f"regression must have outputs of the targets' shape {tuple(wanted.shape)}, got "
                f"{tuple(outputs.shape)}. Give the model as many outputs as there are values."
            )
        if self.loss_name == "huber":
            return F.huber_loss(outputs, wanted, reduction="none").mean(1)
        return 0.5 * F.mse_loss(outputs, wanted, reduction="none").mean(1)

    def predicted(self, outputs: Tensor) -> Tensor:
        """Return predictions in the targets' own unit."""
        return outputs * self.scale + self.center

    def measures(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """See `Task.measures`: of "rmse" the squared error, whose root the meter takes."""
        difference = (self.predicted(outputs) - targets).double()
        return {"rmse": difference.square().mean(1), "mae": difference.abs().mean(1)}

    def meter(self) -> _Rooted:
        """See `Task.meter`."""
        return _Rooted(self)

    def strata(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """The decile of each example's first value."""
        first = targets[:, 0]
        edges = np.quantile(first, np.arange(1, STRATA) / STRATA)
        return np.searchsorted(edges, first, side="right").astype(np.int64)


class _Rooted(Means):
    def result(self) -> dict[str, float]:
        found = super().result()
        return found | {"rmse": math.sqrt(found["rmse"])}
