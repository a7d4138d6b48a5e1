"""Metrics and loss of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.grads import arithmetic
from fedsim.grads.batch import call
from fedsim.grads.state import left_as_found
from fedsim.tasks.base import Task, WithGauges
from fedsim.validate import InputError


@contextmanager
def on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block, have the model on `device`."""
    home = next(model.parameters()).device
    try:
        model.to(device)
        yield
    finally:
        model.to(home)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block, eval mode and no gradients; the model is as it came afterwards, modes and attributes
    that its forward pass sets among them (`left_as_found`)."""
    with left_as_found(model), torch.no_grad():
        model.eval()
        yield


@arithmetic.float32()
def by_class(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], task: Task, classes: int
) -> NDArray[np.float64]:
    """Return the mean of the headline measure over the examples of each class (classes,), NaN for a class
    without examples, and for all where the headline is no mean over examples; eval mode."""
    name = task.chosen.name
    sums = torch.zeros(2, classes, dtype=torch.float64)
    with evaluating(model):
        for inputs, targets in batches:
            measured = task.all_measures(call(model, task.shown(inputs, targets)), targets)
            if name not in measured:
                return np.full(classes, np.nan)
            values = measured[name].double().cpu()
            rows = torch.stack([values, torch.ones_like(values)])
            sums.index_add_(1, targets.cpu(), rows)
    return (sums[0] / sums[1]).numpy()


@arithmetic.float32()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], task: Task) -> dict[str, float]:
    """Evaluate in eval mode and without gradients; afterwards every module is back in its own mode.

    Args:
        model: maps (n, ...) to outputs of the task.
        batches: pairs of inputs (n, ...) and targets (n, ...), of any n, also 0; moved to the model's device
            and, if floating, dtype.
        task: what is measured.

    Returns:
        The task's metrics and "loss", over all examples whatever the batches.

    Raises:
        InputError: no example at all.
    """
    first = next(model.parameters())
    meter, examples = WithGauges(task), 0

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(first.device, first.dtype if tensor.is_floating_point() else None)

    with evaluating(model):
        for inputs, targets in batches:
            if len(targets):
                examples += len(targets)
                own = placed(targets)
                meter.add(call(model, task.shown(placed(inputs), own)), own)
    if not examples:
        raise InputError("evaluation must get at least one example, got none. Check data.test_examples.")
    return meter.result()
