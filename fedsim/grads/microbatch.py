"""Walking over a virtual batch in physical pieces, and the types of the piece engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fedsim.clipping.base import ClipRule
from fedsim.grads.batch import Batch
from fedsim.validate import InputError

Loss = Callable[[Any, Any], Tensor]
"""(outputs of n views, targets of n views) -> losses (n,): one loss a view, not reduced.

The outputs are what the model returns: a tensor, a tuple, a mapping, an object. The targets are a tensor or
named arrays, (n, ...) each, as the caller gave them."""

Answer = tuple[Tensor, Tensor, Tensor]
"""(clipped sum (P,) in the parameters' dtype, norms float64, example losses (n,)).

Norms are (n,), or (n, G) of the parts of a gradient for a rule with G groups of parameters."""

Engine = Callable[[nn.Module, Batch, Batch, Loss, ClipRule], Answer]
"""(model, inputs (n, K, ...), targets (n, ...), loss, clip), n >= 1, on the model's device, -> `Answer`.

The gradient of an example is that of `loss(model(its K views), its target for each of them).mean()`, with
the model in the modes its modules are in. An example whose gradient is not finite adds exactly zero and
shows as a non-finite norm. The engine may write into its inputs and targets, and leaves no hook, attribute
or `.grad` on the model. It raises any exception where it cannot follow the model: `fedsim.grads.ways` goes
on from there."""


class CannotFollow(Exception):
    """What an engine raises where it would not get the gradients of this model right."""


def slices(examples: int, views: int, physical_batch_size: int) -> Iterator[slice]:
    """Yield consecutive slices over `examples`, each of at most `physical_batch_size` views.

    An example is never split: with more views than fit, it goes alone. The last slice may be shorter.
    """
    step = max(1, physical_batch_size // views)
    for start in range(0, examples, step):
        yield slice(start, min(start + step, examples))


def check_losses(losses: Tensor, views: int) -> None:
    """Raise InputError unless `loss` gave one real value a view, shape (views,)."""
    if not isinstance(losses, Tensor) or losses.shape != (views,):
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(
            f"loss must return one value a view, shape ({views},), got {found}. "
            "Use reduction='none' and sum over any other axis."
        )
    if not losses.is_floating_point():
        raise InputError(
            f"loss must return real floating values, got {losses.dtype}. It must be differentiable: return a "
            "float32 or float64 tensor, of complex numbers their absolute values."
        )
