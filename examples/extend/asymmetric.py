"""A task: any of several labels, with the asymmetric loss, judged by whether the first label said is there.

Guarantee: the loss is one number an example and sees that example alone, so its gradients are clipped one by
one like any other's. Metrics are taken of released parameters.
Source: Ben-Baruch et al. 2021, "Asymmetric Loss For Multi-Label Classification" (arXiv 2009.14119).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from fedsim import validate
from fedsim.headline import Metric
from fedsim.tasks.multi_label import MultiLabel


@dataclass(frozen=True)
class Asymmetric(MultiLabel):
    """Labels that are absent count less the surer the model is of it.

    Attributes:
        present, absent: exponents that make easy labels count less; 0, 0 and margin 0: cross entropy.
        margin: chance of an absent label that is forgiven.
    """

    own_metrics: ClassVar[tuple[Metric, ...]] = (Metric("first_right", "%"), *MultiLabel.own_metrics)
    present: int = 1
    absent: int = 4
    margin: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        validate.in_range(self.present, 0, 100, "task.options.present")
        validate.in_range(self.absent, 0, 100, "task.options.absent")
        validate.in_range(self.margin, 0.0, 0.9, "task.options.margin")

    def loss(self, outputs, targets):
        """One loss an example, (n,), of logits and of labels 0 or 1, both (n, labels)."""
        chance = outputs.sigmoid()
        shifted = (chance - self.margin).clamp(min=0.0)
        there = (1.0 - chance) ** self.present * F.logsigmoid(outputs)
        missing = shifted**self.absent * (1.0 - shifted).clamp(min=1e-8).log()
        return -(targets * there + (1.0 - targets) * missing).sum(1)

    def measures(self, outputs, targets):
        """One number an example, (n,), of each metric but the area under the curves."""
        first = targets.gather(1, outputs.argmax(1, keepdim=True))[:, 0]
        return {"first_right": first, **super().measures(outputs, targets)}
