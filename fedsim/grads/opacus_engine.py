"""Per-example gradients by Opacus hooks (Yousefpour et al. 2021), kept local to the call.

Opacus samples gradients a view; those of an example's K views are averaged before clipping. Layers without
an Opacus rule (weight-standardised convolutions) fall back to functorch inside Opacus.
"""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.clipping.base import ClipRule
from fedsim.grads import batch
from fedsim.grads.batch import Batch
from fedsim.grads.clip import clip_and_sum
from fedsim.grads.flat import trainable_parameters
from fedsim.grads.microbatch import Answer, CannotFollow, Loss, check_losses
from fedsim.grads.state import left_as_found


def clipped_sum(
    model: nn.Module, inputs: Batch, targets: Batch, loss: Loss, clip: ClipRule, fill: int = 2
) -> Answer:
    """Clipped gradient sum of one physical batch; see `microbatch.Engine`.

    All views go through the model at once: what one of them gives must not depend on the others.

    Args:
        fill: examples that are computed at least: see `vmap.example_gradients`.

    Raises:
        CannotFollow: Opacus would leave out a part of the gradient.
        NotImplementedError: Opacus refuses the model (a trainable layer with buffers).
    """
    examples, views = batch.sizes(inputs, targets)
    filled = max(fill, examples)
    inputs, targets = (batch.filled(own, filled) for own in (inputs, targets))
    named = trainable_parameters(model)
    _check_modes(model)
    with left_as_found(model), torch.enable_grad(), warnings.catch_warnings():
        # The first layer's inputs need no gradient; torch remarks on it at every backward pass.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        for parameter in named.values():
            parameter.grad = None
        positional, keywords = batch.arguments(model, batch.each(lambda array: array.flatten(0, 1), inputs))
        wrapped = _grad_sample_module()(model, loss_reduction="sum", strict=True)
        try:
            losses = loss(wrapped(*positional, **keywords), batch.repeated(targets, views))
            check_losses(losses, filled * views)
            if losses.requires_grad:
                losses.sum().backward()
            gradients = [_over_views(name, p, filled, views)[:examples] for name, p in named.items()]
        finally:
            wrapped.remove_hooks()
    total, norms = clip_and_sum(gradients, clip, clip.group_of(tuple(named)))
    return total, norms, losses.detach().unflatten(0, (filled, views)).mean(1)[:examples]


def _check_modes(model: nn.Module) -> None:
    """Raise CannotFollow for a trainable layer in eval mode: Opacus passes over it."""
    for path, module in model.named_modules():
        if not module.training and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise CannotFollow(f"Opacus passes over {type(module).__name__} '{path}', which is in eval mode")


def _over_views(name: str, parameter: nn.Parameter, examples: int, views: int) -> Tensor:
    """Mean over views of one parameter's gradient samples, (examples, *shape); zeros if it was not used.

    Raises:
        CannotFollow: the samples do not add up to the parameter's gradient.
    """
    sample: Tensor | None = getattr(parameter, "grad_sample", None)
    if sample is None:
        if parameter.grad is not None and parameter.grad.any():
            raise CannotFollow(f"Opacus does not see where {name} is used")
        return parameter.new_zeros((examples, *parameter.shape))
    if not isinstance(sample, Tensor) or sample.shape[0] != examples * views:
        rows = len(sample)
        raise CannotFollow(f"Opacus finds {rows} rows for {examples * views} views where {name} is used")
    whole = parameter.grad
    rounding = 1e-3 * float(sample.detach().reshape(len(sample), -1).norm(dim=1).sum())
    if whole is not None and float((sample.sum(0) - whole).norm()) > rounding:  # not so for nan
        raise CannotFollow(f"Opacus sees a part only of where {name} is used")
    return sample.detach().unflatten(0, (examples, views)).mean(1)


@functools.cache
def _grad_sample_module() -> Any:
    """Import Opacus on first use: it takes 2 s and hangs a handler on the root logger, removed here."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    from opacus.grad_sample import GradSampleModule

    root.handlers[:] = handlers
    return GradSampleModule
