"""Per-example gradients by Opacus hooks (Yousefpour et al. 2021), kept local to the call.

Opacus samples gradients a view; those of an example's K views are averaged before clipping. Layers without
an Opacus rule (weight-standardised convolutions) fall back to functorch inside Opacus.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.grads.clip import ClipRule, clip_and_sum
from fedsim.grads.flat import trainable_parameters
from fedsim.grads.microbatch import Loss, check_losses
from fedsim.validate import InputError


def clipped_sum(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, clip: ClipRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped gradient sum of one physical batch; see `microbatch.Engine`.

    Raises:
        NotImplementedError: Opacus refuses the model (a trainable layer with buffers).
    """
    examples, views = inputs.shape[:2]
    named = trainable_parameters(model)
    parameters = list(named.values())
    with _left_as_found(model), torch.enable_grad(), warnings.catch_warnings():
        # The first layer's inputs need no gradient; torch remarks on it at every backward pass.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        wrapped = _grad_sample_module()(model, loss_reduction="sum", strict=True)
        try:
            outputs = wrapped(inputs.flatten(0, 1))
            losses = loss(outputs, targets.repeat_interleave(views, dim=0))
            check_losses(losses, examples * views)
            losses.sum().backward()
            gradients = [_over_views(p, examples, views) for p in parameters]
        finally:
            wrapped.remove_hooks()
    total, norms = clip_and_sum(gradients, clip, clip.group_of(tuple(named)))
    return total, norms, losses.detach().unflatten(0, (examples, views)).mean(1)


def _over_views(parameter: nn.Parameter, examples: int, views: int) -> Tensor:
    """Mean over views of one parameter's gradient samples, (examples, *shape); zeros if it was not used."""
    sample: Tensor | None = getattr(parameter, "grad_sample", None)
    if sample is None:
        return parameter.new_zeros((examples, *parameter.shape))
    if sample.shape[0] != examples * views:
        raise InputError(
            f"every layer must see one row a view, {examples * views} here, got {sample.shape[0]} rows. "
            "Keep the batch axis first and apart in forward, or use engine.gradients=vmap."
        )
    return sample.unflatten(0, (examples, views)).mean(1) if views > 1 else sample


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Undo what Opacus sets on modules and parameters: hooks, new attributes, `.grad`."""
    modules = [(m, set(vars(m)), m._is_full_backward_hook) for m in model.modules()]
    parameters = [(p, set(vars(p)), p.grad) for p in model.parameters()]
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for handle in vars(model).get("autograd_grad_sample_hooks", ()):  # Opacus failed while hooking
            handle.remove()
        for module, names, full in modules:
            for name in set(vars(module)) - names:
                delattr(module, name)
            module._is_full_backward_hook = full
        for parameter, names, gradient in parameters:
            for name in set(vars(parameter)) - names:
                delattr(parameter, name)
            parameter.grad = gradient


@functools.cache
def _grad_sample_module() -> Any:
    """Import Opacus on first use: it takes 2 s and hangs a handler on the root logger, removed here."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    from opacus.grad_sample import GradSampleModule

    root.handlers[:] = handlers
    return GradSampleModule
