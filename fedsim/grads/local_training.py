"""Ordinary training at one holder: what it sends is how far its parameters moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedsim import validate
from fedsim.grads import arithmetic, batch
from fedsim.grads.autograd import gradients_of
from fedsim.grads.batch import Batch
from fedsim.grads.flat import get_flat, trainable_parameters
from fedsim.grads.microbatch import Loss, check_losses
from fedsim.grads.per_example import cross_entropy
from fedsim.grads.state import left_as_found


@dataclass(frozen=True)
class LocalTraining:
    """How a holder trains before it sends (McMahan et al. 2017, Algorithm 1, ClientUpdate).

    Attributes:
        epochs: passes over the holder's examples.
        batch_size: examples of one local SGD step; the last of a pass may be smaller.
        learning_rate: of local SGD.
    """

    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 0.1

    def check(self, where: str) -> None:
        """Raise InputError unless all numbers are positive."""
        for name in ("epochs", "batch_size", "learning_rate"):
            validate.positive(getattr(self, name), f"{where}.local_{name}")


@arithmetic.float32()
def local_update(
    model: nn.Module,
    inputs: Batch,
    targets: Batch,
    how: LocalTraining,
    order: np.random.Generator,
    loss: Loss = cross_entropy,
) -> tuple[Tensor, float]:
    """Train on one holder's examples and return where it started minus where it ended.

    The sign makes the result a descent direction like a gradient. The model ends changed: the caller sets
    its parameters anew for the next holder.

    Args:
        model: at the step's parameters.
        inputs: (n, ...), or named arrays of such shapes, n >= 1, on the model's device.
        targets: (n, ...), or named arrays of such shapes.
        how: epochs, batch size, learning rate.
        order: source of the shuffles.

    Returns:
        (P,) update, and the mean loss over all local steps' examples as they were met.
    """
    start = get_flat(model)
    parameters = list(trainable_parameters(model).values())
    total, seen = 0.0, 0
    examples = len(batch.arrays(targets)[0])
    for _ in range(how.epochs):
        shuffled = torch.from_numpy(order.permutation(examples))
        for rows in shuffled.split(how.batch_size):
            with left_as_found(model), torch.enable_grad():
                losses = loss(batch.call(model, batch.take(inputs, rows)), batch.take(targets, rows))
                check_losses(losses, len(rows))
                gradients = gradients_of(losses.mean(), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient, alpha=how.learning_rate)
            total += float(losses.detach().double().sum())
            seen += len(rows)
    return start - get_flat(model), total / seen
