"""The one public way to a sum of clipped per-example gradients."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import validate
from fedsim.grads import bookkeeping, opacus_engine, vmap
from fedsim.grads.bookkeeping import Options
from fedsim.grads.clip import ClipRule, clip_and_sum_by_owner, overall
from fedsim.grads.flat import trainable_names, trainable_parameters
from fedsim.grads.microbatch import Engine, Loss, slices, train_mode
from fedsim.types import ClippedSum
from fedsim.validate import InputError

ENGINES: dict[str, Engine] = {
    "bookkeeping": bookkeeping.clipped_sum,
    "vmap": vmap.clipped_sum,
    "opacus": opacus_engine.clipped_sum,
}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy a view: logits (n, classes) and labels (n,) to losses (n,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


def check_engine(name: str) -> None:
    """Raise InputError unless `name` is a key of `ENGINES`; the nearest one is suggested."""
    validate.one_of(name, ENGINES, "engine.gradients")


def engine_of(name: str, options: Options) -> Engine:
    """Return the engine `name` of `ENGINES`, working as `options` say.

    Raises:
        InputError: no such engine, or options given to one other than bookkeeping, which alone has them.
    """
    check_engine(name)
    if options == Options():
        return ENGINES[name]
    if name != "bookkeeping":
        validate.conflicts(
            "engine.precision, engine.channels_last and engine.gradient_memory are settings of the "
            f"bookkeeping engine, but engine.gradients is {name!r}.",
            "Leave them at float32, auto and full, or use engine.gradients=bookkeeping.",
        )
    return functools.partial(bookkeeping.clipped_sum, options=options)


def clipped_gradient_sum(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    clip: ClipRule,
    *,
    loss: Loss = cross_entropy,
    engine: str = "vmap",
    physical_batch_size: int = 256,
    options: Options | None = None,
) -> ClippedSum:
    """Sum the clipped gradients of all examples, divided by nothing.

    An example's gradient is that of the mean of its K view losses: averaged over views before clipping (De et
    al. 2022, augmentation multiplicity). `engine` and `physical_batch_size` change speed and memory, and the
    result only by float rounding. The model runs in train mode and is left as it came: parameters, modes,
    `.grad`, hooks and attributes, also when an exception leaves this function.

    Args:
        model: one that `fedsim.models.check` accepts; gradients are of its trainable parameters.
        inputs: (B, K, ...), K views an example; B may be 0. Moved piece by piece to the parameters' device
            and, if floating, to their dtype.
        targets: (B, ...), one an example.
        clip: clip rule; also the source of the sensitivity.
        loss: (outputs (n, ...), targets (n, ...)) -> one loss a view, (n,).
        engine: key of `ENGINES`.
        physical_batch_size: views through the model at once; an example with more views goes alone.
        options: of the bookkeeping engine; None for its defaults.

    Returns:
        The sum in the parameters' dtype and on their device, the count B, the rule's sensitivity, and each
        example's norm and loss. An example whose gradient is not finite adds exactly zero and shows as a
        non-finite norm. Norms are of whole gradients, also for a rule with groups of parameters.

    Raises:
        InputError: unknown engine, options of another one, shapes that do not fit, a loss that is not per
            view, trainable parameters of several dtypes or devices, or that the rule's groups do not fit.
    """
    run = engine_of(engine, Options() if options is None else options)
    validate.positive(physical_batch_size, "engine.physical_batch_size")
    if inputs.dim() < 2 or inputs.shape[1] < 1 or targets.shape[:1] != inputs.shape[:1]:
        raise InputError(
            "inputs must have shape (examples, views, ...) with at least one view, and targets "
            f"(examples, ...), got {tuple(inputs.shape)} and {tuple(targets.shape)}. "
            "Use inputs.unsqueeze(1) for one view an example."
        )
    first = next(iter(trainable_parameters(model).values()))
    examples, views = inputs.shape[:2]
    total = torch.zeros(
        sum(p.numel() for p in trainable_parameters(model).values()), dtype=first.dtype, device=first.device
    )
    groups = clip.group_of(trainable_names(model))
    shape = (examples,) if groups is None else (examples, max(groups) + 1)
    norms = torch.zeros(shape, dtype=torch.float64, device=first.device)
    losses = torch.zeros(examples, dtype=torch.float64, device=first.device)
    with train_mode(model):
        for piece in slices(examples, views, physical_batch_size):
            part = inputs[piece].to(first.device, first.dtype if inputs.is_floating_point() else None)
            answer = run(model, part, targets[piece].to(first.device), loss, clip)
            total += answer[0]
            norms[piece], losses[piece] = answer[1], answer[2]
    clipped = None if groups is None else clip.clipped(norms)
    return ClippedSum(total, examples, clip.sensitivity, overall(norms), losses, clipped)


def clipped_gradient_sums(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    clip: ClipRule,
    owners: Tensor,
    totals: Tensor,
    loss: Loss = cross_entropy,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add the clipped gradients of one physical batch to the sums of their owners.

    By the vmap engine, which has every gradient on its own. Otherwise as `clipped_gradient_sum`.

    Args:
        inputs, targets: (B, K, ...) and (B, ...); B may be 0.
        owners: (B,) int64, each example's row in `totals`.
        totals: (owners, P) in the parameters' dtype and on their device, changed in place.

    Returns:
        Norms before clipping and losses, (B,) float64 each, and `ClippedSum.clipped`.
    """
    device = totals.device
    groups = clip.group_of(trainable_names(model))
    if not len(inputs):
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return empty, empty, None if groups is None else empty > 0
    with train_mode(model):
        part = inputs.to(device, totals.dtype if inputs.is_floating_point() else None)
        gradients, losses = vmap.example_gradients(model, part, targets.to(device), loss)
        norms = clip_and_sum_by_owner(gradients, clip, owners.to(device), totals, groups)
    return overall(norms), losses.to(torch.float64), None if groups is None else clip.clipped(norms)
