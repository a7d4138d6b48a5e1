"""The next token of a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.data.targets import IGNORED
from fedsim.headline import Metric
from fedsim.tasks import TASKS
from fedsim.tasks.base import Task


@TASKS.register("language_modelling")
@dataclass(frozen=True)
class LanguageModelling(Task):
    """The next token of a text, causally: cross entropy on logits (n, places, vocabulary).

    The unit of privacy is one text, the row of tokens that is an example. Its loss is the mean over its
    places; target tokens of -100 do not count, and a text of such alone has loss 0.
    """

    kind: ClassVar[str] = "tokens"
    own_metrics: ClassVar[tuple[Metric, ...]] = (Metric("token_accuracy", "%"),)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task.loss`; targets are int64 (n, places)."""
        return token_losses(outputs, targets).sum(1) / (targets != IGNORED).sum(1).clamp(min=1)

    def measures(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """See `Task.measures`."""
        counted = targets != IGNORED
        right = (outputs.argmax(2) == targets) & counted & torch.isfinite(outputs).all(2)
        return {"token_accuracy": right.sum(1) / counted.sum(1).clamp(min=1)}


def token_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each token, 0 where none counts, (n, places), of logits (n, places,
    tokens)."""
    each = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return each.view(targets.shape)
