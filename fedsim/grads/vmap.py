"""Per-example gradients by torch.func: vmap over the gradient of one example's loss.

Follows the definition literally, for any model that functorch can transform, and therefore serves as the
oracle for the other engines. Memory: one full gradient an example of the physical batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedsim.clipping.base import ClipRule
from fedsim.grads import batch
from fedsim.grads.batch import Batch
from fedsim.grads.clip import clip_and_sum, clip_and_sum_by_owner
from fedsim.grads.flat import trainable_names, trainable_parameters
from fedsim.grads.microbatch import Answer, CannotFollow, Loss, check_losses


def clipped_sum(
    model: nn.Module, inputs: Batch, targets: Batch, loss: Loss, clip: ClipRule, fill: int = 2
) -> Answer:
    """Clipped gradient sum of one physical batch; see `microbatch.Engine`.

    Args:
        fill: see `example_gradients`.

    Raises:
        CannotFollow: a parameter reaches the loss past the module it belongs to.
        RuntimeError: the model draws random numbers, or does what functorch cannot transform.
    """
    gradients, losses = example_gradients(model, inputs, targets, loss, fill)
    total, norms = clip_and_sum(gradients, clip, clip.group_of(trainable_names(model)))
    return total, norms, losses


def clipped_sums(
    model: nn.Module,
    inputs: Batch,
    targets: Batch,
    loss: Loss,
    clip: ClipRule,
    owners: Tensor,
    totals: Tensor,
    fill: int = 2,
) -> tuple[Tensor, Tensor]:
    """Add the clipped gradients to the rows of `totals` (owners, P) that `owners` (n,) names.

    Returns norms and losses, as `clipped_sum`, which says the rest. All gradients are there before `totals`
    is changed.
    """
    gradients, losses = example_gradients(model, inputs, targets, loss, fill)
    groups = clip.group_of(trainable_names(model))
    return clip_and_sum_by_owner(gradients, clip, owners, totals, groups), losses


def example_gradients(
    model: nn.Module, inputs: Batch, targets: Batch, loss: Loss, fill: int = 2
) -> tuple[list[Tensor], Tensor]:
    """Return one gradient tensor (n, *shape) a parameter, unclipped, and the losses (n,).

    Args:
        fill: examples that are computed at least, copies of the first among them. A single one takes kernels
            of its own, so that its digits would tell whether another is there.
    """
    parameters = {name: p.detach() for name, p in trainable_parameters(model).items()}
    examples, views = batch.sizes(inputs, targets)
    inputs, targets = (batch.filled(own, max(fill, examples)) for own in (inputs, targets))

    def example_loss(values: dict[str, Tensor], own: Batch, target: Batch) -> Tensor:
        positional, named = batch.arguments(model, own)
        outputs = functional_call(model, values, positional, named)
        losses = loss(outputs, batch.expanded(target, views))
        check_losses(losses, views)
        return losses.mean()

    per_example = vmap(grad_and_value(example_loss), in_dims=(None, 0, 0), randomness="error")
    with torch.enable_grad():
        gradients, losses = per_example(parameters, inputs, targets)
    # The parameters that were put in have no graph here. What has one came another way, without its gradient.
    if losses.requires_grad:
        raise CannotFollow("a trainable parameter reaches the loss past the module it belongs to")
    return [gradients[name][:examples] for name in parameters], losses[:examples]
