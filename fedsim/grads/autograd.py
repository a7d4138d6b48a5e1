"""Per-example gradients by plain autograd, one example after the other: slow, and what every model has.

Needs nothing but that the loss of one example's views can be differentiated. Hooks on parameters, activations
and modules, checkpointing, custom functions, TorchScript, sparse gradients and control flow that depends on
values mean here what they mean in ordinary training on that example alone. Memory: one gradient at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.clipping.base import ClipRule
from fedsim.grads import batch
from fedsim.grads.batch import Batch
from fedsim.grads.clip import clip_and_sum, clip_and_sum_by_owner
from fedsim.grads.flat import trainable_parameters
from fedsim.grads.microbatch import Answer, Loss, check_losses
from fedsim.grads.state import ChangesState, left_as_found, same_bits, writes_parameters

Ask = Callable[[Tensor, Sequence[Tensor]], list[Tensor]]


def clipped_sum(model: nn.Module, inputs: Batch, targets: Batch, loss: Loss, clip: ClipRule) -> Answer:
    """Clipped gradient sum of one physical batch; see `microbatch.Engine`."""
    named = trainable_parameters(model)
    groups = clip.group_of(tuple(named))
    first = next(iter(named.values()))
    total = first.new_zeros(sum(p.numel() for p in named.values())).detach()
    norms, losses = [], []
    for gradients, value in example_gradients(model, inputs, targets, loss):
        part, norm = clip_and_sum(gradients, clip, groups)
        total += part
        norms.append(norm)
        losses.append(value)
    return total, torch.cat(norms), torch.stack(losses)


def clipped_sums(
    model: nn.Module,
    inputs: Batch,
    targets: Batch,
    loss: Loss,
    clip: ClipRule,
    owners: Tensor,
    totals: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add the clipped gradients to the rows of `totals` (owners, P) that `owners` (n,) names.

    Returns norms and losses, as `clipped_sum`. `totals` is of no use after an exception.
    """
    groups = clip.group_of(tuple(trainable_parameters(model)))
    norms, losses = [], []
    examples = example_gradients(model, inputs, targets, loss)
    for owner, (gradients, value) in zip(owners.split(1), examples, strict=True):
        norms.append(clip_and_sum_by_owner(gradients, clip, owner, totals, groups))
        losses.append(value)
    return torch.cat(norms), torch.stack(losses)


def example_gradients(
    model: nn.Module, inputs: Batch, targets: Batch, loss: Loss
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield for each example one gradient (1, *shape) a trainable parameter, unclipped, and its loss, ().

    Raises:
        ChangesState: also, after the last example, where values of parameters were changed past autograd, or
            where an example has another loss than it had: the forward pass remembers, somewhere.
    """
    named = trainable_parameters(model)
    parameters = list(named.values())
    before = [parameter.detach().clone() for parameter in parameters]
    examples, views = batch.sizes(inputs, targets)
    # torch's backward pass of a frozen batch norm is wrong on the CPU for a single row whose gradient comes
    # transposed (seen in 2.14). Such a row goes twice: the mean of the losses is the same.
    frozen = any(isinstance(module, _BatchNorm) and not module.training for module in model.modules())
    twice = views == 1 and frozen
    views = 2 if twice else views
    ask: Ask = gradients_of
    seen: list[Tensor] = []

    def example_loss(row: int) -> Tensor:
        device = parameters[0].device
        own, target = (batch.placed(batch.take(given, row), device) for given in (inputs, targets))
        if twice:
            own = batch.each(lambda array: array.repeat(2, *[1] * (array.dim() - 1)), own)
        losses = loss(batch.call(model, own), batch.expanded(target, views))
        check_losses(losses, views)
        return losses.mean()

    for row in range(examples):
        with torch.enable_grad(), left_as_found(model):  # examples do not meet in the model's attributes
            found, value, ask = _differentiated(partial(example_loss, row), parameters, ask)
        seen.append(value)
        yield [gradient[None] for gradient in found], value
    for row in reversed(range(examples)):  # after others than before
        with torch.enable_grad(), left_as_found(model):
            again = example_loss(row).detach()
        if not _near(seen[row], again):
            raise ChangesState(
                "the forward pass must not remember earlier ones, nor be random, but the loss of an example "
                "is another after others ran. Through what is remembered examples would reach one another, "
                "past clipping and noise. Let no average, counter, cache or generator enter the loss."
            )
    # What is written through `.data` shows in the values alone.
    names = [n for n, old in zip(named, before, strict=True) if not same_bits(named[n].detach(), old)]
    if names:
        raise writes_parameters(names)


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether two losses are equal but for rounding, which depends on where tensors lie in memory."""
    finite = torch.isfinite(one) & torch.isfinite(other)
    return not finite or bool((one - other).abs() <= 1e-5 * torch.maximum(one.abs(), other.abs()) + 1e-7)


def _differentiated(
    function: Callable[[], Tensor], parameters: Sequence[Tensor], ask: Ask
) -> tuple[list[Tensor], Tensor, Ask]:
    """Return gradients and value of `function()`, and how they were had: what the next example asks first."""
    value = function()
    try:
        return ask(value, parameters), value.detach(), ask
    except RuntimeError as problem:
        if ask is _accumulated or "checkpoint" not in str(problem):
            raise
    value = function()  # what was refused used up the graph
    return _accumulated(value, parameters), value.detach(), _accumulated


def gradients_of(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of the scalar `value` with respect to each parameter, dense, zeros if unused."""
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    return _dense(torch.autograd.grad(value, parameters, allow_unused=True), parameters)


def _accumulated(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """As `gradients_of`, by `.backward()`, which alone passes through a re-entrant checkpoint.

    Within `left_as_found`, which keeps other threads out and puts every `.grad` back.
    """
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    value.backward()
    return _dense([p.grad for p in parameters], parameters)


def _dense(found: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    gradients = []
    for gradient, parameter in zip(found, parameters, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        gradients.append(gradient.detach() if gradient.layout is torch.strided else gradient.to_dense())
    return gradients
