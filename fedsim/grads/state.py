"""Nothing is left on a model: a block after which it is as it came."""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import chain, compress
from logging import Logger
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.validate import InputError

_PLAIN = frozenset((dict, OrderedDict, list, set))  # collections, most of them empty
_COLLECTIONS = (dict, list, set, deque, tuple)
_MOST = 20_000  # objects in objects that are looked into
_running: list[tuple[int, frozenset[int]]] = []  # thread, and ids of the modules it is in a block of
_changed = threading.Condition()


class ChangesState(InputError):
    """The forward pass writes into the model."""


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Put back whatever the block changes on `model` but what it writes into parameters.

    Back come: every attribute of every module, modes, hooks, buffers and submodules among them, with the
    content of collections and the attributes of objects in it; attributes, hooks, flags, memory and `.grad`
    of parameters; values of buffers and of other tensors. Not what closures, classes, globals, slots and
    arrays of numpy hold. Also when an exception leaves the block, which then goes on. One thread at a time is
    in a block of one module: it would put back for good what another left half done.

    Raises:
        ChangesState: the block changed the value of a buffer, or wrote into a parameter or another tensor of
            the model. Through it examples would reach one another, and later batches, past clip and noise.
    """
    modules = _modules(model)
    with _alone(modules):
        attributes = _Attributes(modules)
        parameters = [_Parameter(p) for p in _all(module._parameters for module in modules)]
        buffers = _Buffers(modules)
        try:
            yield
        except BaseException:
            buffers.put_back()
            attributes.put_back()
            for parameter in parameters:
                parameter.put_back()
            raise
        changed = buffers.put_back()
        kept = attributes.put_back()
        written = {id(parameter.own) for parameter in parameters if parameter.put_back()}
    if written:
        names = [name for name, parameter in model.named_parameters() if id(parameter) in written]
        raise writes_parameters(names)
    if changed:
        names = [name for name, buffer in model.named_buffers() if id(buffer) in changed]
        raise ChangesState(
            f"the forward pass must leave the model's buffers alone, but it changes {', '.join(names)}: "
            "through it examples would reach one another, past clipping and noise. Put layers with running "
            "statistics into eval mode, or use ones without (GroupNorm, LayerNorm)."
        )
    if kept:
        raise ChangesState(
            "the forward pass must leave what the model keeps alone, but it writes into a tensor among its "
            "attributes: through it examples would reach one another, past clipping and noise. "
            "Keep counters, averages and caches out of the model."
        )


@contextmanager
def _alone(modules: list[nn.Module]) -> Iterator[None]:
    """Wait until no other thread is in a block of one of `modules`: models may share some."""
    own = threading.get_ident(), frozenset(map(id, modules))
    with _changed:
        _changed.wait_for(lambda: all(who == own[0] or own[1].isdisjoint(ids) for who, ids in _running))
        _running.append(own)
    try:
        yield
    finally:
        with _changed:
            _running.remove(own)
            _changed.notify_all()


def writes_parameters(names: Iterable[str]) -> ChangesState:
    """What to raise of a forward pass that changes the values of parameters."""
    return ChangesState(
        f"the forward pass must leave the model's parameters alone, but it writes to {', '.join(names)}: "
        "through them examples would reach one another, past clipping and noise. "
        "Remove max_norm of embeddings, and keep averages of activations out of the model."
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are the same, bit for bit: a NaN equals itself."""
    return _equal(one.reshape(-1), other.reshape(-1))


def _modules(model: nn.Module) -> list[nn.Module]:
    """As `model.modules()`, in any order and three times as fast."""
    found, waiting = {id(model): model}, [model]
    while waiting:
        for module in waiting.pop()._modules.values():
            if module is not None and id(module) not in found:
                found[id(module)] = module
                waiting.append(module)
    return list(found.values())


def _all(named: Iterable[Any]) -> list[Any]:
    """Return the tensors of several dictionaries, each once."""
    return list({id(value): value for own in named for value in own.values() if value is not None}.values())


class _Keeps(dict[type, bool]):
    """Whether an object of a class, none of `_PLAIN`, can be a forward pass's memory: a collection, an object
    with attributes, or a tensor."""

    def __missing__(self, kind: type) -> bool:
        if kind in _PLAIN:
            keeps = False
        elif issubclass(kind, (*_COLLECTIONS, Tensor)):
            keeps = True
        else:  # classes, functions and modules of a program have attributes, but are nobody's memory
            keeps = kind.__dictoffset__ != 0 and not issubclass(
                kind, type | Enum | ModuleType | FunctionType | MethodType | Logger
            )
        self[kind] = keeps
        return keeps


_keeps = _Keeps()


class _Attributes:
    """What the `__dict__` of each module held; in loops of C, for modules have thirty attributes each."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._live = [vars(module) for module in modules]
        self._saved = [live.copy() for live in self._live]
        self._held: list[Any] = []
        self._tensors: list[tuple[Tensor, Tensor, Tensor]] = []  # each, where it was, and a copy
        known = [modules, *(m._parameters.values() for m in modules), *(m._buffers.values() for m in modules)]
        seen = set(map(id, chain.from_iterable(known)))
        level = list(chain.from_iterable(map(dict.values, self._saved)))
        while level and len(seen) < _MOST:
            kinds = list(map(type, level))
            plain = list(compress(level, map(_PLAIN.__contains__, kinds)))
            others = [v for v in compress(level, map(_keeps.__getitem__, kinds)) if id(v) not in seen]
            held = [v for v in others if isinstance(v, _COLLECTIONS)]
            held += [vars(v) for v in others if not isinstance(v, (*_COLLECTIONS, Tensor))]
            self._held += plain + [v for v in held if not isinstance(v, tuple)]
            self._tensors += [(v, v.data, v.detach().clone()) for v in others if _has_values(v)]
            inner = [v for v in filter(None, plain + held) if id(v) not in seen]
            seen.update(map(id, inner))
            seen.update(map(id, others))
            level = [v for own in inner for v in (own.values() if isinstance(own, dict) else own)]
        self._filled = [(held, _content(held)) for held in filter(None, self._held)]

    def put_back(self) -> bool:
        """Put everything back; returns whether a tensor was written into."""
        for live, saved in zip(self._live, self._saved, strict=True):
            if not _same(live, saved):
                live.update(saved)
                for name in live.keys() - saved.keys():
                    del live[name]
        filled = list(filter(None, self._held))
        if len(filled) != len(self._filled) or not all(map(_kept, filled, self._filled)):
            before = {id(held): content for held, content in self._filled}
            for held in self._held:
                content = before.get(id(held), {} if isinstance(held, dict) else [])
                if not _kept(held, (held, content)):
                    held.clear()
                    held.extend(content) if isinstance(held, list | deque) else held.update(content)
        written = False
        for tensor, place, copy in self._tensors:
            if not _same_memory(tensor, place):
                tensor.data = place
                written = True
            if not same_bits(tensor.detach(), copy):
                with torch.no_grad():
                    tensor.data.copy_(copy)
                written = True
        return written


def _has_values(value: Any) -> bool:
    """Whether a value is a tensor that can be copied and compared."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(value)


def _content(held: Any) -> Any:
    """A copy of a collection, in a plain one."""
    return dict(held) if isinstance(held, dict) else list(held)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two dictionaries of attributes are equal; what cannot be compared counts as different."""
    try:
        return one == other
    except Exception:
        return False


def _kept(held: Any, before: tuple[Any, Any]) -> bool:
    """Whether a collection is the one of `before` and holds the same objects in the same order."""
    whose, content = before
    if held is not whose or len(held) != len(content):
        return False
    if isinstance(held, dict) and not all(map(operator.is_, held.values(), content.values())):
        return False
    return all(map(operator.is_, held, content))


class _Parameter:
    """What a parameter held beside its values, and whether something was written into them."""

    def __init__(self, own: nn.Parameter) -> None:
        self.own = own
        self._names, self._gradient = set(vars(own)), own.grad
        self._hooks = None if own._backward_hooks is None else dict(own._backward_hooks)
        self._data, self._version, self._trained = own.data, own._version, own.requires_grad

    def put_back(self) -> bool:
        """Put back all but values that were overwritten in place; returns whether any were written."""
        own = self.own
        for name in vars(own).keys() - self._names:
            delattr(own, name)
        moved = not _same_memory(own, self._data)
        written = moved or own._version != self._version
        if moved:
            own.data = self._data
        if own.requires_grad != self._trained:
            own.requires_grad_(self._trained)
        if own.grad is not self._gradient:
            own.grad = self._gradient
        hooks = own._backward_hooks
        if hooks and dict(hooks) != (self._hooks or {}):
            hooks.clear()
            hooks.update(self._hooks or {})
        return written


def _same_memory(own: Tensor, before: Tensor) -> bool:
    """Whether a tensor still is where it was; a transform that ended may have left it nowhere."""
    if torch._C._functorch.is_functorch_wrapped_tensor(own):
        return False
    return own.dtype == before.dtype and own.data_ptr() == before.data_ptr()


class _Buffers:
    """Copies of a model's buffers, those of one dtype and device in one piece: many are small."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._owners = [(module, dict(module._buffers.items())) for module in modules if len(module._buffers)]
        self._kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        self._sparse: list[tuple[Tensor, Tensor]] = []
        for buffer in _all(own for _, own in self._owners):
            if buffer.layout is torch.strided:
                self._kinds.setdefault((buffer.dtype, buffer.device), []).append(buffer)
            else:
                self._sparse.append((buffer, buffer.clone()))
        self._copies = {kind: _joined(buffers) for kind, buffers in self._kinds.items()}

    def put_back(self) -> set[int]:
        """Give every buffer its old value; returns the ids of those that had another.

        A new tensor in the place of a buffer counts by its value too; the caller puts the old one back.
        """
        changed: set[int] = set()
        for sparse, before in self._sparse:
            if not torch.equal(sparse.to_dense(), before.to_dense()):
                changed.add(id(sparse))
                sparse.copy_(before)
        for module, own in self._owners:
            present = dict(module._buffers.items())
            for name, buffer in own.items():
                now = present.get(name)
                if now is not buffer and buffer is not None and not _same_value(now, buffer):
                    changed.add(id(buffer))
        for kind, buffers in self._kinds.items():
            copy = self._copies[kind]
            if _equal(_joined(buffers), copy):
                continue
            sizes = [buffer.numel() for buffer in buffers]
            for buffer, old in zip(buffers, copy.split(sizes), strict=True):
                if not _equal(buffer.detach().reshape(-1), old):
                    changed.add(id(buffer))
                    with torch.no_grad():
                        buffer.copy_(old.view(buffer.shape))
        return changed


def _joined(buffers: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([buffer if buffer.dim() == 1 else buffer.reshape(-1) for buffer in buffers])


def _same_value(now: Tensor | None, before: Tensor) -> bool:
    if now is None or now.shape != before.shape or now.dtype != before.dtype:
        return False
    try:
        return _equal(now.detach().reshape(-1), before.detach().reshape(-1))
    except RuntimeError:  # it belongs to a function transform that has ended
        return False


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors (n,) are the same, bit for bit: a NaN equals itself."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
