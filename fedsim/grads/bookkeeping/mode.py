"""Watching the forward pass: every torch function that mixes a trainable weight with examples.

A `TorchFunctionMode` is local to the thread and to the `with` block; the model is not touched. Tensors are
told apart by where they come from: weights (trainable parameters, and what is computed from them alone),
rows (the model's input, and what is computed from it) and constants (everything else). An operation on
weights and rows is the place where per-example gradients arise; it is handed to the rule of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedsim.grads.bookkeeping.tape import Tape, Unsupported

Rule = Callable[..., Any]
"""(watch, func, *args, **kwargs of the torch function) -> its result, recorded on the tape."""

_SELECTING = (
    "view reshape flatten unflatten squeeze unsqueeze transpose permute t movedim swapaxes chunk split "
    "unbind select narrow contiguous clone __getitem__ view_as reshape_as"
)
# Every entry of the result is another entry of the one tensor argument.
_SELECTIONS = {
    getattr(home, name) for home in (torch, Tensor) for name in _SELECTING.split() if hasattr(home, name)
}
_EXPANSIONS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to}


class _Seen:
    """Tensors by identity, not kept alive: an address may pass to another one, which is not in the set."""

    def __init__(self) -> None:
        self._references: dict[int, ref[Tensor]] = {}

    def __contains__(self, tensor: object) -> bool:
        reference = self._references.get(id(tensor))
        return reference is not None and reference() is tensor

    def add(self, tensor: Tensor) -> None:
        self._references[id(tensor)] = ref(tensor)

    def discard(self, tensor: Tensor) -> None:
        self._references.pop(id(tensor), None)


class Watch(TorchFunctionMode):
    """Records on `tape` while it is entered; see the module.

    Args:
        tape: where uses go.
        inputs: the tensor the model will be called with, (B * K, ...).
        rules: by torch function.
        fallback: rule for every other operation on weights and rows.
        derivations: rules of operations on weights alone; others take their course.

    """

    def __init__(
        self,
        tape: Tape,
        inputs: Tensor,
        rules: dict[Any, Rule],
        fallback: Rule,
        derivations: dict[Any, Rule],
    ) -> None:
        super().__init__()
        self.tape = tape
        self._notes: dict[int, tuple[Tensor, int, Any]] = {}
        self._rules = rules
        self._fallback = fallback
        self._derivations = derivations
        self._rows = _Seen()
        self._weights = _Seen()
        self._selected = _Seen()
        self._base: dict[int, Tensor] = {}
        self._rows.add(inputs)

    def fallback(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Record an operation no rule fits."""
        return self._fallback(self, func, *args, **kwargs)

    def is_weight(self, value: object) -> bool:
        """Whether `value` is a trainable parameter or computed from such alone."""
        return id(value) in self.tape.parameters or value in self._weights

    def is_rows(self, value: object) -> bool:
        """Whether `value` carries examples."""
        if not isinstance(value, Tensor):
            return False
        if value in self._rows:
            return True
        # What a custom autograd.Function returned was not seen here, but leads back to some recorded use.
        return value.requires_grad and not self.is_weight(value)

    def is_selection(self, weight: Tensor) -> bool:
        """Whether every entry of `weight` is another entry of one parameter."""
        return id(weight) in self.tape.parameters or weight in self._selected

    def base(self, weight: Tensor) -> Tensor | None:
        """The tensor with a leading axis of length 1 that `weight` repeats for every row, if there is one."""
        return self._base.get(id(weight)) if weight in self._weights else None

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
            if self.is_weight(value):
                weights = True
            elif self.is_rows(value):
                rows = True
        written = args[0] if func is Tensor.__setitem__ else None
        if weights and rows and torch.is_grad_enabled():
            if written is not None:
                raise Unsupported("a weight is written into a tensor of examples, or the other way round")
            result = self._rules.get(func, self._fallback)(self, func, *args, **kwargs)
        elif weights and not rows and func in self._derivations:
            result = self._derivations[func](self, func, *args, **kwargs)
            self._mark_weights(func, args, result)
        else:
            result = func(*args, **kwargs)
            if weights and not rows:
                self._mark_weights(func, args, result if written is None else written)
        if rows:
            self.mark_rows(result if written is None else written)
        return result

    def mark_rows(self, result: object) -> None:
        """Note that `result`, or the tensors in it, carry examples."""
        for value in tensors_in((result,)):
            self._rows.add(value)

    def _mark_weights(self, func: Any, args: tuple[Any, ...], result: object) -> None:
        source = args[0] if args else None
        selection = isinstance(source, Tensor) and func in _SELECTIONS and self.is_selection(source)
        for value in tensors_in((result,)):
            if not value.requires_grad or id(value) in self.tape.parameters:
                continue
            self._weights.add(value)
            self._base.pop(id(value), None)
            self._selected.discard(value)
            if selection and not (func is Tensor.__getitem__ and _advanced(args[1])):
                self._selected.add(value)
            if func in _EXPANSIONS and isinstance(source, Tensor) and _repeats_rows(source, value):
                self._base[id(value)] = source


def _repeats_rows(source: Tensor, result: Tensor) -> bool:
    """Whether only the leading axis, 1 or missing in `source`, was made longer."""
    shape = (1,) * (result.dim() - source.dim()) + tuple(source.shape)
    return shape[0] == 1 and shape[1:] == tuple(result.shape[1:])


def _advanced(index: object) -> bool:
    """Whether an index may name the same entry twice: anything beyond integers, slices, None and `...`."""
    parts = index if isinstance(index, tuple) else (index,)
    return not all(isinstance(part, int | slice | type(None) | type(...)) for part in parts)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among `values`, and in tuples and lists among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors_in(value)
    return found
