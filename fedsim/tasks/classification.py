"""One class of several an example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedsim import validate
from fedsim.data.targets import Targets
from fedsim.headline import Metric
from fedsim.tasks import TASKS
from fedsim.tasks.areas import AVERAGES, WithAreas
from fedsim.tasks.base import Meter, Task, finite_rows
from fedsim.validate import InputError


@TASKS.register("classification")
@dataclass(frozen=True)
class Classification(Task):
    """One class of several an example: cross entropy on logits (n, classes), accuracy.

    Attributes:
        top_k: k above 1 adds the metric "top_<k>_accuracy".
        auc: adds the metric "auc", the area under the ROC curve of each class against all others, by its
            probability, averaged: "macro", each class alike, or "weighted" by its test examples; null: none.
        label_smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016).
    """

    kind: ClassVar[str] = "class"
    top_k: int = 1
    auc: str | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        validate.positive(self.top_k, "task.options.top_k")
        validate.one_of(self.auc, (None, *AVERAGES), "task.options.auc")
        validate.in_range(self.label_smoothing, 0.0, 1.0, "task.options.label_smoothing")

    @property
    def own_metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """Accuracy, that of the k best, and the area."""
        top = (Metric(f"top_{self.top_k}_accuracy", "%"),) if self.top_k > 1 else ()
        areas = (Metric("auc", "%"),) if self.auc is not None else ()
        return (Metric("accuracy", "%"), *top, *areas)

    def check(self, declared: Targets) -> None:
        """See `Task.check`; also refuses a `top_k` above the number of classes."""
        super().check(declared)
        validate.in_range(self.top_k, 1, declared.size, "task.options.top_k")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task.loss`; targets are int64 (n,)."""
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.label_smoothing)

    def check_outputs(self, outputs: Tensor) -> None:
        """See `Task.check_outputs`; refuses probabilities, of which cross entropy takes the softmax again."""
        own_loss = type(self).loss is not Classification.loss
        ones = outputs.sum(-1)
        if not own_loss and (outputs >= 0).all() and torch.allclose(ones, torch.ones_like(ones), atol=1e-5):
            raise InputError(
                f"model must give logits for task {type(self).__name__}, whose loss takes their softmax, but "
                "gives probabilities, which sum to 1. Leave out its last softmax."
            )

    def measures(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """See `Task.measures`; an example whose logits are not finite counts as wrong."""
        right = outputs.topk(self.top_k, dim=1).indices == targets[:, None]
        right &= finite_rows(outputs)[:, None]
        found = {"accuracy": right[:, 0]}
        return found if self.top_k == 1 else found | {f"top_{self.top_k}_accuracy": right.any(1)}

    def meter(self) -> Meter:
        """See `Task.meter`."""
        return super().meter() if self.auc is None else WithAreas(self, self.auc, _against_the_rest)

    def undefined(self, targets: NDArray[Any]) -> tuple[str, ...]:
        """The area, where all examples are of one class."""
        return ("auc",) if self.auc is not None and not (targets != targets[:1]).any() else ()


def _against_the_rest(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and presence (n, classes): a logit alone has no order over examples."""
    return outputs.double().softmax(1), F.one_hot(targets, outputs.shape[1]) > 0
