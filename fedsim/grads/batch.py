"""Batches of any form: one tensor, or named arrays each of its own dtype.

Inputs and targets of B examples are a tensor (B, ...) or a mapping from names to such tensors (images, token
ids, masks, floats). Inputs have their K views on the second axis of every array.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.validate import InputError

Batch = Tensor | Mapping[str, Tensor]


def arrays(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch."""
    return list(batch.values()) if isinstance(batch, Mapping) else [batch]


def each(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply `function` to every array of a batch."""
    if isinstance(batch, Tensor):
        return function(batch)
    return {name: function(array) for name, array in batch.items()}


def form(batch: Batch) -> tuple[object, ...]:
    """Return what batches of any number of examples have in common: names, other axes, dtypes, devices."""
    if isinstance(batch, Tensor):
        return (tuple(batch.shape[1:]), batch.dtype, batch.device)
    return tuple((name, *form(array)) for name, array in sorted(batch.items()))


def sizes(inputs: Batch, targets: Batch) -> tuple[int, int]:
    """Return (B, K) of a batch.

    Raises:
        InputError: arrays that differ in them, that have no axes for them, no view, or no array at all.
    """
    for array in (*arrays(inputs), *arrays(targets)):
        if not isinstance(array, Tensor) or array.layout is not torch.strided or array.is_meta:
            found = array.layout if isinstance(array, Tensor) else type(array).__name__
            raise InputError(
                "inputs and targets must be dense tensors, or mappings from names to such, got "
                f"{'a meta tensor' if isinstance(array, Tensor) and array.is_meta else found}. "
                "Use torch.as_tensor, and to_dense."
            )
    shapes = [tuple(array.shape) for array in arrays(inputs)]
    wanted = [tuple(array.shape) for array in arrays(targets)]
    if (
        not shapes
        or any(len(shape) < 2 or shape[1] < 1 or shape[:2] != shapes[0][:2] for shape in shapes)
        or any(shape[:1] != shapes[0][:1] for shape in wanted)
    ):
        raise InputError(
            "inputs must have shape (examples, views, ...) with at least one view, the same of every array, "
            f"and targets (examples, ...), got {_listed(shapes)} and {_listed(wanted)}. "
            "Use inputs.unsqueeze(1) for one view an example."
        )
    return shapes[0][0], shapes[0][1]


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes)) or "no array"


def described(batch: Batch) -> str:
    """Return shapes and dtypes for a message: "(8, 1, 5) float32" or "ids (8, 1, 7) int64, mask ..."."""
    if isinstance(batch, Tensor):
        return f"{tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    return ", ".join(f"{name} {described(array)}" for name, array in batch.items()) or "no array"


def take(batch: Batch, rows: Any) -> Batch:
    """Return the examples that `rows` (a slice, a mask or indices) names."""
    return each(lambda array: array[rows], batch)


def placed(batch: Batch, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
    """Copy a batch to `device`, its floating arrays to `dtype` if given; ids and masks keep their own.

    Of a complex `dtype` they get the precision.

    Always a copy, cut off from any graph: a model or loss that writes into its arguments does not reach the
    caller's data, nor what a second attempt sees.
    """

    def place(array: Tensor) -> Tensor:
        wanted = None if dtype is None or not array.is_floating_point() else dtype.to_real()
        return array.detach().to(device, wanted, copy=True)

    return each(place, batch)


def repeated(targets: Batch, views: int) -> Batch:
    """Return one target a view, (B * K, ...), the views of an example next to each other."""
    return each(lambda array: array.repeat_interleave(views, dim=0), targets)


def shown(show: Callable[[Any, Any], Batch], inputs: Batch, targets: Batch) -> Batch:
    """Return inputs (B, K, ...) as a task shows them to the model.

    Args:
        show: (inputs (n, ...) of n views, their targets (n, ...)) -> what the model is called with, (n, ...).
        inputs, targets: (B, K, ...) and (B, ...).
    """
    views = arrays(inputs)[0].shape[1]
    flat = each(lambda array: array.flatten(0, 1), inputs)
    return each(lambda array: array.unflatten(0, (-1, views)), show(flat, repeated(targets, views)))


def expanded(target: Batch, views: int) -> Batch:
    """Return the target (...) of one example once for each of its views, (K, ...)."""
    return each(lambda array: array.expand(views, *array.shape), target)


def filled(batch: Batch, examples: int) -> Batch:
    """Return a batch (B, ...) with copies of its first example up to so many, in the order of its axes.

    Itself if they are there and it lies in memory like that: who is missing must not change the layout.
    """

    def longer(array: Tensor) -> Tensor:
        count = len(array)
        if count == examples and array.stride() == torch.empty(array.shape, device="meta").stride():
            return array
        whole = array.new_empty((examples, *array.shape[1:]))
        whole[:count] = array
        whole[count:] = array[:1]
        return whole

    return each(longer, batch)


def call(model: nn.Module, views: Batch) -> Any:
    """Call `model` with what it expects; see `arguments`."""
    positional, named = arguments(model, views)
    return model(*positional, **named)


def arguments(model: nn.Module, views: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments to call `model` with: the tensor, or the named arrays as keywords.

    A model whose `forward` has one argument that must be given, and does not have these names, gets the
    mapping itself. An instance's own `forward` and that of a TorchScript module count like a class's.
    """
    if isinstance(views, Tensor) or _takes_mapping(model.forward, set(views)):
        return (views,), {}
    return (), dict(views)


def _takes_mapping(forward: Callable[..., Any], names: set[str]) -> bool:
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):  # a callable without a signature
        return False
    if any(p.kind is p.VAR_KEYWORD for p in parameters) or names <= {p.name for p in parameters}:
        return False
    return len([p for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]) == 1
