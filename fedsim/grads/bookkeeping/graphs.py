"""CUDA graphs: what a call launches, recorded once and replayed on other values.

A call asks a GPU for some two thousand operations, each by way of Python. Where the operations are short the
GPU waits for Python; a recording is one launch. It reads the values of parameters and buffers where they are
at every replay, while no code of the model runs again: so it serves only calls that would launch the same
(`_kind`), and a model that is changed in a way that cannot be seen there (a number in a list) must not be
recorded.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsim.grads.batch import Batch, arrays, each

Tensors = tuple[Tensor, ...]
CALLS = 2  # of one kind that are computed before it is recorded: libraries set themselves up in them
_PLAIN = (bool, int, float, str, bytes, tuple, type(None), torch.dtype, torch.device)
_log = logging.getLogger(__name__)
_lock = threading.Lock()


@dataclass
class _Last:
    """Of one model: the kind of its last call, how many of that kind were in turn, and their recording."""

    kind: Hashable
    calls: int = 0
    recording: _Recording | None = None
    failed: bool = False


_known: weakref.WeakKeyDictionary[nn.Module, _Last] = weakref.WeakKeyDictionary()


def computed(
    compute: Callable[..., Tensors],
    model: nn.Module,
    inputs: Batch,
    targets: Batch,
    present: Tensor,
    loss: Callable[..., Any],
    *rest: object,
) -> Tensors:
    """Return what `compute(model, inputs, targets, present, loss, *rest)` gives, replayed where it can be.

    The third call in turn of one kind is recorded, and from then on one recording a model is kept, with its
    memory. What cannot be recorded (a forward pass that asks the GPU for values) is said once in the log and
    computed as ever.

    Args:
        compute: gives tensors, asks the device nothing, and keeps nothing.
        rest: hashable; what compares equal must compute the same.
    """
    kind = _kind(compute, model, inputs, targets, loss, rest)
    with _lock:
        last = _known.get(model)
        if last is None or last.kind != kind:
            last = _known[model] = _Last(kind)
    if last.calls >= CALLS and not last.failed:
        try:
            if last.recording is None:
                last.recording = _Recording(compute, model, inputs, targets, present, loss, *rest)
            return last.recording(inputs, targets, present)
        except RuntimeError as problem:
            last.recording, last.failed = None, True
            said = str(problem).strip().splitlines()[:1]
            _log.warning(
                "gradients of %s are not recorded as a CUDA graph: %s.", type(model).__name__, *said or [""]
            )
    last.calls += 1
    return compute(model, inputs, targets, present, loss, *rest)


class _Recording:
    """One call, with the places its values are put into and come from."""

    def __init__(
        self,
        compute: Callable[..., Tensors],
        model: nn.Module,
        inputs: Batch,
        targets: Batch,
        present: Tensor,
        *rest: Any,
    ) -> None:
        self._given = each(torch.clone, inputs), each(torch.clone, targets), present.clone()
        self._graph = torch.cuda.CUDAGraph()
        read = _Read()
        # Other threads may go on asking CUDA for memory: one prepares the next piece.
        with (
            torch.cuda.device(present.device),
            torch.cuda.graph(self._graph, capture_error_mode="thread_local"),
            read,
        ):
            self._made = compute(model, *self._given, *rest)
        self._kept = read.storages

    def __call__(self, inputs: Batch, targets: Batch, present: Tensor) -> Tensors:
        for given, own in zip(self._given, (inputs, targets, present), strict=True):
            for place, array in zip(arrays(given), arrays(own), strict=True):
                place.copy_(array)
        self._graph.replay()
        return tuple(made.clone() for made in self._made)


class _Read(TorchDispatchMode):
    """Holds the memory that a recording reads and has not made itself: constants must outlive their cache."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._made:
                    self.storages[storage._cdata] = storage
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (key := value.untyped_storage()._cdata) not in self.storages:
                self._made.add(key)
        return result


def _kind(
    compute: Callable[..., Any],
    model: nn.Module,
    inputs: Batch,
    targets: Batch,
    loss: Callable[..., Any],
    rest: tuple[object, ...],
) -> Hashable:
    """Return what calls have in common that launch the same operations on the same memory."""
    return (
        compute,
        tuple(map(_place_free, (*_named(inputs), *_named(targets)))),
        weakref.WeakMethod(loss) if inspect.ismethod(loss) else weakref.ref(loss),
        rest,
        torch.are_deterministic_algorithms_enabled(),
        tuple(_state(module) for module in model.modules()),
    )


def _named(batch: Batch) -> list[tuple[str, Tensor]]:
    return [("", batch)] if isinstance(batch, Tensor) else list(batch.items())


def _place_free(named: tuple[str, Tensor]) -> Hashable:
    name, array = named
    return name, array.shape, array.dtype


def _state(module: nn.Module) -> Hashable:
    """Return what a module's operations depend on: its kind, plain attributes, hooks, and where tensors are.

    By identity: of two modules alike, each has its own.
    """
    own = vars(module)
    tensors = {**own["_parameters"], **own["_buffers"]}
    tensors |= {name: value for name, value in own.items() if isinstance(value, Tensor)}
    return (
        id(module),
        type(module),
        tuple((name, _plain(value)) for name, value in own.items() if isinstance(value, _PLAIN)),
        tuple(module._forward_hooks),
        tuple(module._forward_pre_hooks),
        tuple((name, _where(value)) for name, value in tensors.items()),
    )


def _plain(value: Any) -> Hashable:
    """`value`, or its text where it cannot be a key; 1, 1.0 and True are three."""
    return type(value), repr(value)


def _where(tensor: Tensor | None) -> Hashable:
    if tensor is None or tensor.layout is not torch.strided:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad
