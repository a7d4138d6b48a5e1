"""Watching the forward pass: every torch function that brings a trainable weight together with examples.

A `TorchFunctionMode` is local to the thread and to the `with` block; the model is not touched. Of a tensor it
is enough to know two things, neither of which is guessed: whether it carries examples (`Level.carries`) and
whether its autograd graph leads to trainable parameters, which makes it a weight. An operation on both is the
place where per-example gradients arise. It is handed to the rule of its kind, or else gets a copy of the
weight for every example (`repeat`), of which autograd then forms the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedsim.grads.bookkeeping.level import Level
from fedsim.grads.bookkeeping.tape import Tape, Unsupported

Rule = Callable[..., Any]
"""(watch, func, *args, **kwargs of the torch function) -> its result, recorded on the tape."""

# Nodes of autograd whose every entry is another entry of the one tensor they were made from.
_NAMES = (
    "Alias Clone Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T Transpose Unbind Unsqueeze "
    "UnsafeSplit UnsafeView View"
)
_SELECTING = {f"{name}Backward0" for name in _NAMES.split()}


# What a tensor with examples says of itself is not what holds below: a model must not be misled by it.
_tensor: Any = Tensor
_TOLD: dict[Any, Callable[[Tensor], Any]] = {
    _tensor.requires_grad.__get__: lambda tensor: tensor.requires_grad,
    _tensor.is_leaf.__get__: lambda tensor: tensor.is_leaf,
}


# Hooks act on gradients that this engine never forms, or forms after they were measured.
_HOOKING = {
    _tensor.register_hook,
    _tensor.register_post_accumulate_grad_hook,
    _tensor.retain_grad,
    _tensor.grad_fn.__get__,
}


class Watch(TorchFunctionMode):
    """Records on `tape` while it is entered; see the module.

    Args:
        tape: where uses go.
        level: the running level.
        rules: by torch function, of operations on weights and examples.
        fallback: rule of every other such operation.
        derivations: rules of operations on weights alone; others take their course.
        shortcuts: rules of operations on examples that vmap would do more slowly.

    """

    def __init__(
        self,
        tape: Tape,
        level: Level,
        rules: dict[Any, Rule],
        fallback: Rule,
        derivations: dict[Any, Rule],
        shortcuts: dict[Any, Rule],
    ) -> None:
        super().__init__()
        self.tape = tape
        self.level = level
        self._notes: dict[int, tuple[Tensor, int, Any]] = {}
        self._rules = rules
        self._fallback = fallback
        self._derivations = derivations
        self._shortcuts = shortcuts

    def fallback(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Record an operation no rule fits."""
        return self._fallback(self, func, *args, **kwargs)

    def is_rows(self, value: object) -> bool:
        """Whether `value` carries examples."""
        return isinstance(value, Tensor) and self.level.carries(value)

    def is_weight(self, value: object) -> bool:
        """Whether `value` is a trainable parameter, or computed from such and from no example."""
        if not isinstance(value, Tensor) or not value.requires_grad or self.level.carries(value):
            return False
        return id(value) in self.tape.parameters or bool(self.tape.parameters_of(value))

    def note(self, weight: Tensor, origin: Any) -> None:
        """Remember what a derivation knows of its result."""
        self._notes[id(weight)] = weight, weight._version, origin

    def origin(self, weight: Tensor) -> Any:
        """What was noted of `weight`; None if nothing was, or if it was changed in place since."""
        noted, version, origin = self._notes.get(id(weight), (None, 0, None))
        return origin if noted is weight and weight._version == version else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weights = rows = False
        for value in tensors_in((*args, *kwargs.values())):
            if self.level.carries(value):
                rows = True
            elif value.requires_grad and not weights:
                weights = self.is_weight(value)
        if func in _HOOKING and (rows or weights):
            raise Unsupported("the forward pass hangs a hook on a tensor, or looks into its graph")
        if rows and func in _TOLD:
            return _TOLD[func](self.level.lower(args[0]))
        if not torch.is_grad_enabled() or not self.level.innermost:
            return func(*args, **kwargs)
        if rows and weights:
            return self._rules.get(func, self._fallback)(self, func, *args, **kwargs)
        if rows and func in self._shortcuts:
            return self._shortcuts[func](self, func, *args, **kwargs)
        if weights and func in self._derivations:
            return self._derivations[func](self, func, *args, **kwargs)
        return func(*args, **kwargs)


def is_selection(weight: Tensor) -> bool:
    """Whether every entry of `weight` is another entry of one parameter, by its autograd graph."""
    node = weight.grad_fn
    while node is not None and node.name() in _SELECTING:
        node = node.next_functions[0][0]
    return isinstance(weight, nn.Parameter) or (node is not None and hasattr(node, "variable"))


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among `values`, and in tuples, lists and dicts among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found
