"""Is a model fit for per-example gradients? A static check of its layers and a check of its behaviour."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedParameter

from fedsim.validate import InputError

_RUNNING = {"running_mean", "running_var", "num_batches_tracked"}
_POWER_ITERATION = {"weight_u", "weight_v", "_u", "_v", "_u0", "_v0"}


def check(model: nn.Module) -> None:
    """Refuse layers for which per-example gradients are undefined or would depend on the engine.

    Layers are judged in the mode they are in: what is frozen in eval mode is served as it then is. Refused:
    BatchNorm in all forms in train mode, or in eval mode without running statistics; InstanceNorm and others
    with running statistics, spectral normalisation, dropout and other random layers with a rate above zero in
    train mode; Embedding with `max_norm`, and a model without trainable parameters.
    What the layer list cannot show (a parameter the forward pass never reads, examples mixed by hand) is left
    to the engines, which look before they compute (`fedsim.grads.independence`).

    Raises:
        InputError: names the layer, its path in the model, the reason and the replacement.
    """
    for path, module in model.named_modules():
        problem = _problem(module)
        if problem:
            where = f"at '{path}'" if path else "as its outermost module"
            raise InputError(f"model contains {type(module).__name__} {where}: {problem}")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "model must have at least one trainable parameter, got none. Set requires_grad on a part of it."
        )


def refuse_uncopied(model: nn.Module) -> None:
    """Refuse what copies of a model, which a run trains, would not have: parameters without shapes or values,
    and hooks of parameters, which torch leaves out.

    Raises:
        InputError: names the parameter.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise InputError(
                f"model must have the shapes of all its parameters, but {name} gets its own in the first "
                "call. Call the model on one example before you hand it in, or write the layer's size down."
            )
        if parameter.is_meta:
            raise InputError(
                f"model must have values, and {name} is on the meta device. Make it on the CPU, or load its "
                "weights."
            )
        if parameter._backward_hooks:
            raise InputError(
                f"parameter {name} of the model must have no hook (register_hook): a run trains copies of "
                "the model, which have none. Say it in the forward pass, by torch.nn.utils.parametrize for "
                "example, or keep whole parameters as they are by model.freeze."
            )


def examples_are_independent(model: nn.Module, input_shape: tuple[int, ...]) -> bool:
    """Return whether one example's output stays the same when its neighbours in the batch change.

    Runs two batches of three, in the modes the model's modules are in, that share their middle example, and
    compares its output within 1e-4 relative (1e-10 for float64). A buffer that the forward pass changes also
    gives False, because its value carries examples from one batch to the next. The model itself is not
    changed.

    Args:
        model: takes (n, *input_shape) of its parameters' dtype.
        input_shape: shape of one example, without the batch axis.
    """
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn((2, 3, *input_shape), generator=generator, dtype=torch.float64)
    second[1] = first[1]
    second[[0, 2]] = 3.0 * second[[0, 2]] + 1.0  # other scale and place: statistics of the batch must move
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    before = {name: value.clone() for name, value in buffers.items()}
    with torch.no_grad():
        a, b = (functional_call(model, buffers, (batch.to(parameter),))[1] for batch in (first, second))
    if any(not torch.equal(before[name], buffers[name]) for name in before):
        return False
    return _close(a, b)


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-10 if a.dtype == torch.float64 else 1e-4
    return bool((a - b).norm() <= tolerance * (a.norm() + torch.finfo(a.dtype).tiny))


def for_training(model: nn.Module) -> nn.Module:
    """Put a model into train mode, but for layers that are frozen in eval mode; returns the model.

    A model in train mode is left alone: layers it has in eval mode are frozen on purpose. One that is in eval
    mode as a whole, as loaders of public weights return it, trains, but for layers with running statistics.
    """
    if model.training:
        return model
    frozen = [m for m in model.modules() if not m.training and _has_statistics(m)]
    model.train()
    for module in frozen:
        module.eval()
    return model


def mixes_examples(module: nn.Module) -> bool:
    """Whether a module is a batch norm that takes its statistics from the batch."""
    frozen = not module.training and _has_statistics(module)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and not frozen


def random_rate(module: nn.Module) -> tuple[str, float]:
    """Return the attribute that holds a module's rate of random masks, and the rate; ("", 0.0) if none does.

    Knows torch's dropout, recurrent layers and attention, and what torchvision and timm drop paths with.
    """
    if isinstance(module, nn.modules.dropout._DropoutNd):
        name = "p"
    elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        name = "dropout"
    else:
        name = {"StochasticDepth": "p", "DropPath": "drop_prob"}.get(type(module).__name__, "")
    return name, (getattr(module, name, None) or 0.0) if name else 0.0


def _has_statistics(module: nn.Module) -> bool:
    return bool(_RUNNING & {name for name, _ in module.named_buffers(recurse=False)})


def _problem(module: nn.Module) -> str | None:
    """Reason and remedy if this one layer is not allowed, in the mode it is in."""
    if mixes_examples(module):
        return (
            "it mixes examples, so per-example gradients are not defined; set model.fix=true, which puts "
            "GroupNorm in its place, or freeze it with its running statistics in eval mode."
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "max_norm rewrites the weights during the forward pass, outside clipping and noise; remove it."
    if isinstance(module, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
        return "it draws from a global generator; use MaxPool."
    return _problem_in_training(module) if module.training else None


def _problem_in_training(module: nn.Module) -> str | None:
    if getattr(module, "track_running_stats", False):
        return (
            "its running statistics carry examples from batch to batch; set track_running_stats=False, or "
            "freeze it in eval mode."
        )
    names = {name for name, _ in module.named_buffers(recurse=False)}
    if names & (_RUNNING | _POWER_ITERATION):
        return "its buffers change during training, outside clipping and noise; use weight standardisation."
    _, rate = random_rate(module)
    if rate:
        return (
            f"its masks (p = {rate:g}) would need randomness keyed by example and step; set p = 0, or "
            "model.fix=true, which does."
        )
    if isinstance(module, nn.RReLU):
        return "it draws from a global generator; use ReLU or LeakyReLU."
    return None
