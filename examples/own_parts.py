"""A model, a trust model and a task of one's own, named from outside as own_parts:Net and so on."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

import fedsim
from fedsim.headline import Metric
from fedsim.noise.gaussian import GaussianNoise
from fedsim.privacy.budget import within_budget
from fedsim.privacy.family import EventFamily
from fedsim.strategies.base import DataFacts, Plan
from fedsim.strategies.central_dpsgd import CentralDPSGD


class Net(nn.Module):
    """Two layers; `width` is an option, the shapes are what fedsim says of the data."""

    def __init__(self, input_shape, num_classes, width=32):
        super().__init__()
        self.body = nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.body(images.flatten(1)).tanh())


class FullBatch(CentralDPSGD):
    """Gradient descent on all examples in every step: the guarantee needs no sampling to be secret."""

    def plan(self, facts: DataFacts) -> Plan:
        """The Gaussian mechanism on everything, divided by the public number of examples."""
        budget = within_budget(self.config.privacy, EventFamily.gaussian(1.0), self.config.train.steps)
        clip = self.clip_rule()
        noise = GaussianNoise(budget.noise_multiplier, clip.sensitivity)
        return Plan("example", 1.0, float(facts.examples), clip, noise, budget)


@dataclass(frozen=True)
class Focal(fedsim.Task):
    """Classification that cares less for what the model already knows (Lin et al. 2017)."""

    own_metrics = (Metric("accuracy", "%"),)
    gamma: float = 2.0

    def loss(self, outputs, targets):
        """One loss an example, (n,)."""
        entropy = F.cross_entropy(outputs, targets, reduction="none")
        return (1 - (-entropy).exp()) ** self.gamma * entropy

    def measures(self, outputs, targets):
        """One number an example, (n,), by the name of the metric it is averaged to."""
        return {"accuracy": (outputs.argmax(1) == targets).float()}
