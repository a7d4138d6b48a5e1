"""The one public way to a sum of clipped per-example gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import validate
from fedsim.clipping.base import ClipRule
from fedsim.grads import autograd, batch, bookkeeping, gpu, independence, opacus_engine, vmap, ways
from fedsim.grads.batch import Batch
from fedsim.grads.bookkeeping import Options
from fedsim.grads.clip import overall
from fedsim.grads.flat import trainable_names, trainable_parameters
from fedsim.grads.microbatch import Answer, Engine, Loss, slices
from fedsim.types import ClippedSum
from fedsim.validate import InputError


def _bookkeeping(*arguments: Any, **named: Any) -> Answer:
    return bookkeeping.clipped_sum(*arguments, **named)  # imports the engine when it is first called


ENGINES: dict[str, Callable[..., Answer]] = {
    "bookkeeping": _bookkeeping,
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
    if name == "bookkeeping":
        return functools.partial(_bookkeeping, options=options)
    if dataclasses.replace(options, sharers=1, fill=1) != Options():
        validate.conflicts(
            "engine.precision, engine.channels_last, engine.gradient_memory and engine.cuda_graphs are "
            f"settings of the bookkeeping engine, but engine.gradients is {name!r}.",
            "Leave them at float32, auto, full and false, or use engine.gradients=bookkeeping.",
        )
    return functools.partial(ENGINES[name], fill=options.fill)


def clipped_gradient_sum(
    model: nn.Module,
    inputs: Batch,
    targets: Batch,
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
    result only by float rounding: what an engine cannot follow is computed by vmap or, at last, by autograd
    of one example at a time (`fedsim.grads.ways`). The model runs in the modes its modules are in and is left
    as it came: parameters, modes, `.grad`, hooks, attributes and buffers, also when an exception leaves this
    function.

    Args:
        model: one that `fedsim.models.check` accepts; gradients are of its trainable parameters.
        inputs: (B, K, ...), K views an example, or named arrays of such shapes; B may be 0. Copied piece by
            piece to the parameters' device and, if floating, to their dtype; ids and masks keep theirs. The
            model is called with the K views of examples, (n, ...), named arrays as keywords or, if its
            `forward` has one argument and not these names, as a mapping.
        targets: (B, ...), one an example, or named arrays of such shapes.
        clip: clip rule; also the source of the sensitivity.
        loss: (outputs of n views, targets (n, ...)) -> one loss a view, (n,). It gets what the model returns.
        engine: key of `ENGINES`.
        physical_batch_size: views through the model at once; an example with more views goes alone. On a GPU
            so many are computed whoever is there, so that no kernel is another one: no more than are needed.
        options: of the bookkeeping engine; None for its defaults.

    Returns:
        The sum in the parameters' dtype and on their device, the count B, the rule's sensitivity, and each
        example's norm and loss. An example whose gradient is not finite adds exactly zero and shows as a
        non-finite norm. Norms are of whole gradients, also for a rule with groups of parameters.

    Raises:
        InputError: unknown engine, options of another one, shapes that do not fit, a loss that is not per
            view, trainable parameters of several dtypes or devices, or that the rule's groups do not fit; a
            forward pass that changes buffers; a model or loss that cannot be differentiated at all, or that
            is seen to mix examples or to be random (`fedsim.grads.independence`).
    """
    options = Options() if options is None else options
    if not isinstance(clip, ClipRule):
        raise InputError(
            f"clip must be a clip rule, such as fedsim.clipping.flat.FlatClip(1.0), got "
            f"{type(clip).__name__}."
        )
    examples, views = batch.sizes(inputs, targets)
    validate.positive(physical_batch_size, "engine.physical_batch_size")
    parameters = list(trainable_parameters(model).values())
    # Kernels of a CPU know one from several; those of a GPU any size, and where fewer bits are kept it shows.
    most = max(1, physical_batch_size // views)
    same = gpu.on(parameters[0]) or options.precision != "float32"
    fill = most if same else min(2, most)
    chain: dict[str, Engine] = {
        engine: engine_of(engine, dataclasses.replace(options, fill=fill)),
        "vmap": functools.partial(vmap.clipped_sum, fill=fill),
        ways.LAST: autograd.clipped_sum,
    }
    device = parameters[0].device
    total = parameters[0].detach().new_zeros(sum(p.numel() for p in parameters))
    groups = clip.group_of(trainable_names(model))
    shape = (examples,) if groups is None else (examples, max(groups) + 1)
    norms = torch.zeros(shape, dtype=torch.float64, device=device)
    losses = torch.zeros(examples, dtype=torch.float64, device=device)
    independence.check(model, inputs, targets, loss)
    for piece in slices(examples, views, physical_batch_size):
        part = batch.take(inputs, piece), batch.take(targets, piece)
        answer = ways.first_that_works(chain, model, *part, loss, clip)
        total += answer[0]
        norms[piece], losses[piece] = answer[1], answer[2]
    clipped = None if groups is None else clip.clipped(norms)
    return ClippedSum(total, examples, clip.sensitivity, overall(norms), losses, clipped)


def clipped_gradient_sums(
    model: nn.Module,
    inputs: Batch,
    targets: Batch,
    clip: ClipRule,
    owners: Tensor,
    totals: Tensor,
    loss: Loss = cross_entropy,
    fill: int = 2,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add the clipped gradients of one physical batch to the sums of their owners.

    By vmap, which has every gradient on its own, or one example at a time. Otherwise as
    `clipped_gradient_sum`.

    Args:
        inputs, targets: (B, K, ...) and (B, ...); B may be 0.
        owners: (B,) int64, each example's row in `totals`.
        totals: (owners, P) in the parameters' dtype and on their device, changed in place; of no use after an
            exception.
        fill: examples that are computed at least: see `vmap.example_gradients`.

    Returns:
        Norms before clipping and losses, (B,) float64 each, and `ClippedSum.clipped`.
    """
    device = totals.device
    groups = clip.group_of(trainable_names(model))
    examples, _ = batch.sizes(inputs, targets)
    if not examples:
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return empty, empty, None if groups is None else empty > 0
    independence.check(model, inputs, targets, loss)
    chain: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "vmap": functools.partial(vmap.clipped_sums, fill=fill),
        ways.LAST: autograd.clipped_sums,
    }
    rest = (clip, owners.to(device), totals)
    norms, losses = ways.first_that_works(chain, model, inputs, targets, loss, *rest)
    return overall(norms), losses.to(torch.float64), None if groups is None else clip.clipped(norms)
