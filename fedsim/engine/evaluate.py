"""Accuracy and loss of a model on labelled data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedsim import validate
from fedsim.grads import arithmetic
from fedsim.grads.microbatch import Loss
from fedsim.grads.per_example import cross_entropy
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block, eval mode and no gradients; every module is back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@arithmetic.float32()
def class_accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int
) -> list[float]:
    """Return the accuracy on the examples of each class, NaN for a class without examples; eval mode."""
    hits, counts = torch.zeros(num_classes), torch.zeros(num_classes)
    device = next(model.parameters()).device
    with _evaluating(model):
        for inputs, targets in batches:
            right = model(inputs.to(device)).argmax(1).cpu() == targets
            counts += torch.bincount(targets, minlength=num_classes)
            hits += torch.bincount(targets[right], minlength=num_classes)
    return [float(value) for value in hits / counts]


@arithmetic.float32()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss: Loss = cross_entropy,
    top_k: int = 1,
) -> dict[str, float]:
    """Evaluate in eval mode and without gradients; afterwards every module is back in its own mode.

    Args:
        model: maps (n, ...) to logits (n, classes).
        batches: pairs of inputs (n, ...) and labels (n,), of any n, also 0; moved to the model's device and,
            if floating, dtype.
        loss: one loss an example, (n,).
        top_k: k above 1 adds "top_<k>_accuracy", the share of examples whose label is among the k largest
            logits.

    Returns:
        "accuracy" in [0, 1] and "loss", the means over all examples whatever the batches. Logits that are not
        finite count as wrong, and make the loss non-finite too.

    Raises:
        InputError: no example at all, or `top_k` outside 1 .. classes.
    """
    first = next(model.parameters())
    examples = 0
    sums = torch.zeros(3, dtype=torch.float64, device=first.device)  # asked once: asking waits for a GPU
    with _evaluating(model):
        for inputs, targets in batches:
            if not len(targets):
                continue
            inputs = inputs.to(first.device, first.dtype if inputs.is_floating_point() else None)
            targets = targets.to(first.device)
            logits = model(inputs)
            validate.in_range(top_k, 1, logits.shape[1], "top_k")
            right = logits.topk(top_k, dim=1).indices == targets.unsqueeze(1)
            right &= torch.isfinite(logits).all(1, keepdim=True)
            examples += len(targets)
            found = right[:, 0].sum(), right.sum(), loss(logits, targets).double().sum()
            sums += torch.stack([part.double() for part in found])
    if not examples:
        raise InputError("evaluation must get at least one example, got none. Check data.test_examples.")
    hits, top_hits, loss_sum = sums.tolist()
    result = {"accuracy": hits / examples, "loss": loss_sum / examples}
    if top_k > 1:
        result[f"top_{top_k}_accuracy"] = top_hits / examples
    return result
