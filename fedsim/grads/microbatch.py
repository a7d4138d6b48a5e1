"""Walking over a virtual batch in physical pieces, and the types of the piece engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fedsim.grads.clip import ClipRule
from fedsim.validate import InputError

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs (n, ...), targets (n, ...)) -> losses (n,): one loss a view, not reduced."""

Engine = Callable[[nn.Module, Tensor, Tensor, Loss, ClipRule], tuple[Tensor, Tensor, Tensor]]
"""(model in train mode, inputs (n, K, ...), targets (n, ...), loss, clip), n >= 1 ->
(clipped sum (P,) in the parameters' dtype, norms float64, example losses (n,)). Norms are (n,), or (n, G) of
the parts of a gradient for a rule with G groups of parameters.

An example whose gradient is not finite adds exactly zero and shows as a non-finite norm. The engine leaves
no hook, attribute or `.grad` on the model."""


def slices(examples: int, views: int, physical_batch_size: int) -> Iterator[slice]:
    """Yield consecutive slices over `examples`, each of at most `physical_batch_size` views.

    An example is never split: with more views than fit, it goes alone. The last slice may be shorter.
    """
    step = max(1, physical_batch_size // views)
    for start in range(0, examples, step):
        yield slice(start, min(start + step, examples))


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules in train mode, and each back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_losses(losses: Tensor, views: int) -> None:
    """Raise InputError unless `loss` gave one value a view, shape (views,)."""
    if losses.shape != (views,):
        raise InputError(
            f"loss must return one value a view, shape ({views},), got {tuple(losses.shape)}. "
            "Use reduction='none' and sum over any other axis."
        )
