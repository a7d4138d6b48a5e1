"""A model, a trust model and a task of one's own, named from outside as own_parts:Net and so on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

import fedsim
from fedsim.headline import Metric
from fedsim.noise.gaussian import standard_normal
from fedsim.seeds import derive
from fedsim.strategies.central import Central


class Net(nn.Module):
    """Two layers; `width` is an option, the shapes are what fedsim says of the data."""

    def __init__(self, input_shape, num_classes, width=32):
        super().__init__()
        self.body = nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.body(images.flatten(1)).tanh())


@dataclass(frozen=True)
class TwoServers(Central):
    """Two servers add half the variance of the noise each, by keys of their own: neither knows all of it."""

    noise_added = "two servers, half of it each, on the sum"

    def added(self, at, release, got, noise, root, step):
        """What both servers add to each part of the sum: together the noise that the event counts on."""
        sums = {}
        for part in release.statistic.parts:
            first, second = (
                standard_normal(derive(root, f"{part.purpose} of a server", step, server), part.length)
                for server in (0, 1)
            )
            sums[part.name] = release.noise_stds[part.name] * math.sqrt(0.5) * (first + second)
        return sums


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
