"""Any of several labels an example."""

from __future__ import annotations

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
from fedsim.tasks.areas import AVERAGES, WithAreas
from fedsim.tasks.base import Task, finite_rows
from fedsim.validate import PrivateInputError


@TASKS.register("multi_label")
@dataclass(frozen=True)
class MultiLabel(Task):
    """Any of several labels an example: binary cross entropy on logits (n, labels), area under ROC curves.

    The loss is the sum over labels. "auc" is the mean over labels that some test examples have and some have
    not, ties counting one half; "label_accuracy" and "exact_match" take a label for present
    where its logit is above 0.

    Attributes:
        labels_at_most: declared bound on the labels of one example, for statistics whose sensitivity depends
            on it; None: any number. Examples above it are refused.
        average: of the areas: "macro", each label alike, or "weighted" by the test examples that have it.
    """

    kind: ClassVar[str] = "labels"
    own_metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("auc", "%"),
        Metric("label_accuracy", "%"),
        Metric("exact_match", "%"),
    )
    labels_at_most: int | None = None
    average: str = "macro"

    def __post_init__(self) -> None:
        validate.one_of(self.average, AVERAGES, "task.options.average")
        if self.labels_at_most is not None:
            validate.positive(self.labels_at_most, "task.options.labels_at_most")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task.loss`; targets are 0 or 1, (n, labels)."""
        each = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
        return each.sum(1)

    def measures(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """See `Task.measures`; an example whose logits are not finite counts as wrong."""
        right = ((outputs > 0) == (targets > 0.5)) & finite_rows(outputs)[:, None]
        return {"label_accuracy": right.double().mean(1), "exact_match": right.all(1)}

    def meter(self) -> WithAreas:
        """See `Task.meter`."""
        return WithAreas(self, self.average, lambda outputs, targets: (outputs.float(), targets > 0.5))

    def undefined(self, targets: NDArray[Any]) -> tuple[str, ...]:
        """The area, where every label is that of all examples or of none."""
        return () if (targets != targets[:1]).any() else ("auc",)

    def check_targets(self, targets: NDArray[Any]) -> None:
        """Refuse examples with more labels than are declared."""
        if self.labels_at_most is not None and targets.sum(1).max(initial=0) > self.labels_at_most:
            expected = (
                f"an example must have at most task.options.labels_at_most={self.labels_at_most} labels"
            )
            raise PrivateInputError(
                f"{expected}, got {targets.sum(1).max()}. Raise it, or mend the data.", f"{expected}."
            )

    def strata(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """The first label of each example, and the number of labels for those that have none."""
        return np.where(targets.any(1), targets.argmax(1), targets.shape[1]).astype(np.int64)
