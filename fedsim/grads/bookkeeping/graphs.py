"""CUDA graphs: what a call launches, recorded once and replayed on other values.

A call asks a GPU for some two thousand operations, each by way of Python. Where the operations are short the
GPU waits for Python; a recording is one launch. It reads the values of parameters and buffers where they are
at every replay, while no code of the model runs again. So it serves only calls that would launch the same, of
models and losses of which that can be known: made of torch's and fedsim's own classes and functions with
attributes of known kinds, or of such whose author says by an attribute `same_in_every_call = True` that what
they compute follows from inputs, parameters, buffers and plain attributes alone. All others are computed.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsim.grads.batch import Batch, arrays, each

Tensors = tuple[Tensor, ...]
CALLS = 2  # of one kind that are computed before it is recorded: libraries set themselves up in them
CHANGES = 8  # kinds in turn after which it is said that nothing is recorded
DECLARED = "same_in_every_call"
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_OF_MODULES = frozenset(vars(nn.Module()))  # what every module has: hooks and the like
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
_log = logging.getLogger(__name__)
_lock = threading.Lock()


class Unknown(Exception):
    """It cannot be known whether a call would launch what another one did; says why."""


@dataclass
class _Last:
    """Of one model: the kind of its last call, how many of that kind were in turn, and their recording."""

    kind: object = None
    calls: int = 0
    changes: int = 0
    recording: _Recording | None = None
    told: bool = False

    def tell(self, model: nn.Module, why: str) -> None:
        """Write one log line a model."""
        if not self.told:
            _log.warning("gradients of %s are not recorded as a CUDA graph: %s.", type(model).__name__, why)
        self.told = True


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
    memory. What cannot be recorded is computed as ever, and the log says once why.

    Args:
        compute: gives tensors, asks the device nothing, and keeps nothing.
        inputs, targets: in the order of their axes in memory (`batch.filled`).
        rest: hashable.

    Raises:
        torch.OutOfMemoryError: also where there is no memory for the recording.
    """
    with _lock:
        last = _known.setdefault(model, _Last())
    try:
        kind = _kind(model, inputs, targets, loss, (compute, *rest))
    except Unknown as why:
        last.tell(model, str(why))
        return compute(model, inputs, targets, present, loss, *rest)
    if last.kind != kind:
        last.kind, last.calls, last.recording = kind, 0, None
        last.changes += 1
        if last.changes >= CHANGES:
            last.tell(model, "calls in turn differ, in shapes, loss, rule, or what the model is")
    if last.calls == CALLS or last.recording is not None:
        try:
            if last.recording is None:
                last.calls += 1  # tried once
                last.recording = _Recording(compute, model, inputs, targets, present, loss, *rest)
                last.changes = 0
            return last.recording(inputs, targets, present)
        except torch.OutOfMemoryError:
            last.recording, last.calls = None, 0
            raise
        except RuntimeError as problem:
            last.recording = None
            last.tell(model, (str(problem).strip().splitlines() or [""])[0])
    elif last.calls < CALLS:
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
        self._graph, read = torch.cuda.CUDAGraph(), _Read()
        with _recording(self._graph, present.device), read:
            self._made = compute(model, *self._given, *rest)
        self._kept = read.storages

    def __call__(self, inputs: Batch, targets: Batch, present: Tensor) -> Tensors:
        for given, own in zip(self._given, (inputs, targets, present), strict=True):
            for place, array in zip(arrays(given), arrays(own), strict=True):
                place.copy_(array)
        self._graph.replay()
        return tuple(made.clone() for made in self._made)


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Record the block: one at a time in a process, and back on the stream as it was, come what may."""
    with _lock, torch.cuda.device(device):
        before = torch.cuda.current_stream(device)
        stream: Any = torch.cuda.Stream(device)  # torch's own would be on the first device it was used on
        try:
            # Other threads may go on asking CUDA for memory: one prepares the next piece.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                yield
        finally:
            torch.cuda.set_stream(before)


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
    model: nn.Module, inputs: Batch, targets: Batch, loss: Callable[..., Any], rest: tuple[Any, ...]
) -> object:
    """Return what calls have in common that launch the same operations on the same memory.

    Raises:
        Unknown: there may be more to it.
    """
    if any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS):
        raise Unknown("there are hooks for all modules")
    modules = [*model.modules()]
    if isinstance(loss, nn.Module):
        modules += loss.modules()
    elif not (_known_code(loss) or getattr(loss, DECLARED, False)):
        raise Unknown(f"what the loss {_named(loss)} reads is not known ({DECLARED})")
    for part in rest:
        if not (_known_code(part if isinstance(part, types.FunctionType) else type(part))):
            raise Unknown(f"what {type(part).__name__} computes is not known")
    tensors: dict[int, int] = {}  # a tensor's number: one may be in several places
    return (
        rest,
        tuple(_form(batch) for batch in (inputs, targets)),
        _Same(loss),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        tuple(_state(module, tensors) for module in modules),
    )


def _known_code(made: Any) -> bool:
    """Whether a class, or a function without values of its own, is of torch or fedsim."""
    if isinstance(made, types.BuiltinFunctionType):
        return True
    if isinstance(made, types.FunctionType):
        return made.__closure__ is None and not vars(made) and _ours(made)
    return isinstance(made, type) and _ours(made)


def _ours(made: Any) -> bool:
    return str(getattr(made, "__module__", "")).partition(".")[0] in ("torch", "fedsim")


def _named(made: Any) -> str:
    return getattr(made, "__qualname__", None) or type(made).__qualname__


def _form(batch: Batch) -> object:
    if isinstance(batch, Tensor):
        return batch.shape, batch.dtype
    return tuple((name, array.shape, array.dtype) for name, array in batch.items())


class _Same:
    """Equal to one of the very same object, which it does not keep alive; not hashable."""

    def __init__(self, made: Any) -> None:
        try:
            self._made = weakref.ref(made)
        except TypeError:
            raise Unknown(f"{_named(made)} cannot be told from others") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (mine := self._made()) is not None and mine is other._made()


def _state(module: nn.Module, tensors: dict[int, int]) -> object:
    """Return what a module's operations depend on: its class, plain attributes, hooks, and where tensors are.

    Raises:
        Unknown: it has more.
    """
    kind, own = type(module), vars(module)
    declared = getattr(kind, DECLARED, False)
    if not (_known_code(kind) or declared):
        raise Unknown(f"what {kind.__qualname__} reads is not known ({DECLARED})")
    if any(own[name] for name in _HOOKS):
        raise Unknown(f"a {kind.__qualname__} has hooks")
    found: list[object] = [kind, kind.forward, module.training, tuple(own["_modules"])]
    for held in (own["_parameters"], own["_buffers"], own):
        for name, value in held.items():
            if held is not own or name not in _OF_MODULES:
                try:
                    found.append((name, _value(value, tensors, f"{kind.__qualname__}.{name}")))
                except Unknown:
                    if not declared:
                        raise
    return tuple(found)


def _value(value: Any, tensors: dict[int, int], where: str) -> object:
    """Return an attribute as a key, with all that is in it.

    Raises:
        Unknown: it is neither plain, nor a tensor, nor a function of torch, nor a collection of such.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or vars(value):
            raise Unknown(f"{where} is a tensor with attributes, or not strided")
        number = tensors.setdefault(id(value), len(tensors))
        return number, value.data_ptr(), value.shape, value.stride(), value.dtype, value.requires_grad
    if type(value) in (tuple, list):
        return type(value), tuple(_value(part, tensors, where) for part in value)
    if type(value) in (dict, OrderedDict) or (dataclasses.is_dataclass(value) and _ours(type(value))):
        held = value if isinstance(value, dict) else vars(value)
        return type(value), tuple((repr(k), _value(part, tensors, where)) for k, part in held.items())
    if type(value) in _PLAIN:
        return type(value), repr(value)  # 1, 1.0 and True are three, and a NaN is itself
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType) and _known_code(value):
        return value
    raise Unknown(f"{where} is {type(value).__name__}, in which anything may change")
