"""Which tensors carry examples, by construction: the model runs under one level of `torch.func.vmap`.

What the level has seen of the inputs is batched there, whatever operations came between; everything else is
the same for all examples and cannot have come from one. No operation can mix examples, because none sees the
axis. The rules of this package look below the level, at the tensor of all examples with their axis first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_functorch: Any = torch._C._functorch


class Level:
    """The level of vmap that is running when this is made."""

    def __init__(self) -> None:
        self.number: int = _functorch.current_level()
        self._stack: Any = None

    @property
    def innermost(self) -> bool:
        """Whether no transform of the model's own (vmap, grad, ...) is running within the level."""
        return bool(_functorch.maybe_current_level() == self.number)

    def carries(self, tensor: Tensor) -> bool:
        """Whether `tensor` has an entry, or some, for every example."""
        return _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) == self.number

    def lower(self, tensor: Tensor) -> Tensor:
        """Return what is below: (B, *shape) for a tensor that carries examples, others as they are."""
        if not self.carries(tensor):
            return tensor
        inner: Tensor = _functorch.get_unwrapped(tensor)
        axis = _functorch.maybe_get_bdim(tensor)
        return inner if axis == 0 else inner.movedim(axis, 0)

    def lift(self, tensor: Tensor) -> Tensor:
        """Return the tensor (*shape) that carries the examples of `tensor`, (B, *shape)."""
        lifted: Tensor = _functorch._add_batch_dim(tensor, 0, self.number)
        return lifted

    def __enter__(self) -> Level:
        """Within the block, work below the level."""
        self._stack = _functorch.pop_dynamic_layer_stack()
        return self

    def __exit__(self, *problem: object) -> None:
        _functorch.push_dynamic_layer_stack(self._stack)
