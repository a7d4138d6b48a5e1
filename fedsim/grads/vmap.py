"""Per-example gradients by torch.func: vmap over the gradient of one example's loss.

Follows the definition literally, for any differentiable model, and therefore serves as the oracle for the
other engines. Memory: one full gradient an example of the physical batch.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedsim.grads.clip import ClipRule, clip_and_sum
from fedsim.grads.flat import trainable_names, trainable_parameters
from fedsim.grads.microbatch import Loss, check_losses


def clipped_sum(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, clip: ClipRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped gradient sum of one physical batch; see `microbatch.Engine`.

    Raises:
        RuntimeError: the model draws random numbers (dropout and the like).
    """
    gradients, losses = example_gradients(model, inputs, targets, loss)
    total, norms = clip_and_sum(gradients, clip, clip.group_of(trainable_names(model)))
    return total, norms, losses


def example_gradients(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss
) -> tuple[list[Tensor], Tensor]:
    """Return one gradient tensor (n, *shape) a parameter, unclipped, and the losses (n,)."""
    parameters = {name: p.detach() for name, p in trainable_parameters(model).items()}

    def example_loss(values: dict[str, Tensor], views: Tensor, target: Tensor) -> Tensor:
        outputs = functional_call(model, values, (views,))
        losses = loss(outputs, target.expand(views.shape[0], *target.shape))
        check_losses(losses, views.shape[0])
        return losses.mean()

    per_example = vmap(grad_and_value(example_loss), in_dims=(None, 0, 0), randomness="error")
    gradients, losses = per_example(parameters, inputs, targets)
    return [gradients[name] for name in parameters], losses.detach()
