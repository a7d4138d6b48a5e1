"""The trainable parameters of a model as one flat vector, and back.

The order is that of `named_parameters`, trainable ones only, a parameter that has two names once. Every
flat vector in fedsim (sums, noise, updates, messages) is in this order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedsim.validate import InputError


@dataclass(frozen=True)
class FlatSpec:
    """How a flat vector is laid out.

    Attributes:
        names: parameter names, in order.
        shapes: shape of each.
        sizes: number of entries of each.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """P, the length of the flat vector."""
        return sum(self.sizes)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return the parts of `vector` (P,) in their parameters' shapes, as views.

        Raises:
            InputError: `vector` does not have the shape (P,).
        """
        if vector.shape != (self.total,):
            raise InputError(f"flat vector must have shape ({self.total},), got {tuple(vector.shape)}.")
        parts = vector.split(list(self.sizes))
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, in order.

    Raises:
        InputError: there is none, one has no shape yet, or they differ in dtype or device, so that no flat
            vector exists.
    """
    every: dict[int, tuple[str, nn.Parameter]] = {}
    _walk(model, "", set(), every)
    parameters = {name: p for name, p in every.values() if p.requires_grad}
    lazy = [name for name, p in parameters.items() if is_lazy(p)]
    if lazy:
        raise InputError(
            f"parameters must have their shapes, but {', '.join(lazy)} of a lazy layer have none yet. "
            "Run the model once on an input of the size it is made for."
        )
    kinds = {(p.dtype, p.device) for p in parameters.values()}
    if len(kinds) != 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
        raise InputError(
            f"trainable parameters must share one dtype and one device, got {found}. "
            "Convert the model with model.to(dtype, device), or set requires_grad."
        )
    return parameters


def _walk(module: nn.Module, prefix: str, seen: set[int], found: dict[int, tuple[str, nn.Parameter]]) -> None:
    """Collect what `named_parameters` gives, in its order, in a third of its time: calls ask often."""
    if id(module) in seen:
        return
    seen.add(id(module))
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found.setdefault(id(parameter), (prefix + name, parameter))
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, f"{prefix}{name}.", seen, found)


def trainable_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the trainable parameters, in order."""
    return tuple(trainable_parameters(model))


def spec(model: nn.Module) -> FlatSpec:
    """Return the layout of the model's flat vector."""
    parameters = trainable_parameters(model)
    shapes = tuple(tuple(p.shape) for p in parameters.values())
    return FlatSpec(tuple(parameters), shapes, tuple(math.prod(shape) for shape in shapes))


def get_flat(model: nn.Module) -> Tensor:
    """Return a copy of the trainable parameters, shape (P,), in their dtype and on their device."""
    return torch.cat([p.detach().reshape(-1) for p in trainable_parameters(model).values()])


def set_flat(model: nn.Module, vector: Tensor) -> None:
    """Copy `vector` (P,) into the trainable parameters, in place.

    Raises:
        InputError: wrong shape, or a dtype other than the parameters'. The model is then unchanged.
    """
    parameters = trainable_parameters(model)
    dtype = next(iter(parameters.values())).dtype
    if vector.dtype != dtype:
        raise InputError(f"flat vector must have the model's dtype {dtype}, got {vector.dtype}.")
    parts = spec(model).split(vector.detach().to(next(iter(parameters.values())).device))  # in one copy
    with torch.no_grad():
        for parameter, part in zip(parameters.values(), parts, strict=True):
            parameter.copy_(part)
