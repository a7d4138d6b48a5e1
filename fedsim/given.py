"""Objects handed in from Python: models, data, tasks and partitions that exist in this process alone.

A configuration names one as "given:KIND_DIGEST". The digest is of what the object holds, so that a run is
resumed with an equal one only, as far as Python shows; another process cannot have it, and says so.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedsim import digest
from fedsim.validate import InputError

MODULE = "given"
BY_NAME = frozenset({"fedsim", "torch", "builtins", "abc", "typing"})
"""Packages whose classes a digest knows by name."""
_PLAIN = (int, float, complex, str, bytes, list, tuple, dict, set, frozenset, np.ndarray)
_TORCHS_OWN = frozenset(
    {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_buffers",
        "_forward_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_is_full_backward_hook",
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_modules",
        "_non_persistent_buffers_set",
        "_parameters",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "training",
    }
)
"""Attributes of every torch module, whose values count by themselves."""
_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")
"""Of every torch module: what its hooks are says what it computes, their numbers say nothing."""
_held: dict[str, Any] = {}


def hold(kind: str, digest: str, thing: Any) -> str:
    """Keep an object and return the name by which a configuration can name it."""
    name = f"{kind}_{digest[:16]}"
    _held[name] = thing
    return f"{MODULE}:{name}"


def is_given(reference: str) -> bool:
    """Whether a reference names an object of this process."""
    return reference.partition(":")[0] == MODULE


def kind_of(reference: str) -> str:
    """Return what an object was handed in as, such as "model"."""
    return reference.partition(":")[2].rpartition("_")[0]


def get(reference: str, setting: str) -> Any:
    """Return the object.

    Raises:
        InputError: this process was not given it.
    """
    name = reference.partition(":")[2]
    if name not in _held:
        raise InputError(
            f"{setting} names {reference!r}, an object that was handed in from Python, and this process does "
            "not have it. Hand it in again, or name it as package.module:Object, which every process finds."
        )
    return _held[name]


def structure_of(module: Any) -> str:
    """Return a sha256 of a module's tree, classes and attributes, but for the values of its parameters and
    buffers, which are kept beside it."""
    return hashlib.sha256(_module(module, frozenset(), values=False).encode()).hexdigest()


def digest_of(thing: Any) -> str:
    """Return a sha256 of what an object does and holds, as far as Python shows it; equal in another process.

    Of functions and classes the source, defaults and what they close over; of instances the class and the
    attributes; of modules and arrays the values. fedsim's own code and torch's count by name.
    """
    return hashlib.sha256(_said(thing, frozenset()).encode()).hexdigest()


def _said(thing: Any, above: frozenset[int]) -> str:
    if id(thing) in above:
        return "above"
    above |= {id(thing)}
    if isinstance(thing, np.ndarray) and thing.dtype.kind == "O":
        return _said(thing.tolist(), above)
    if isinstance(thing, np.ndarray):
        return f"{thing.dtype}{thing.shape}{digest.of_array(thing).hex()}"
    if isinstance(thing, Mapping):
        return f"{{{','.join(f'{_said(k, above)}:{_said(v, above)}' for k, v in thing.items())}}}"
    if isinstance(thing, set | frozenset):
        return _said(sorted(thing, key=repr), above)
    if isinstance(thing, list | tuple):
        return f"[{','.join(_said(part, above) for part in thing)}]"
    if isinstance(thing, functools.partial):
        return f"partial{_said((thing.func, thing.args, thing.keywords), above)}"
    if inspect.ismethod(thing):
        return f"method{_said((thing.__self__, thing.__func__), above)}"
    if inspect.isfunction(thing):
        return f"function{_source(thing)}{_said(_beside(thing), above)}"
    if isinstance(thing, type):
        if thing.__module__.partition(".")[0] in BY_NAME:
            return f"{thing.__module__}.{thing.__qualname__}"
        made = {
            name: value
            for name, value in vars(thing).items()
            if not name.startswith("__") or inspect.isfunction(value)
        }
        return f"class{_source(thing)}{_said([list(thing.__bases__), made], above)}"
    if hasattr(thing, "state_dict") and hasattr(thing, "modules"):
        return _module(thing, above)
    if callable(getattr(thing, "detach", None)):
        return _said(_values(thing), above)
    if hasattr(thing, "__dict__") and not inspect.ismodule(thing):
        return f"{_said(type(thing), above)}{_said(vars(thing), above)}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def _module(module: Any, above: frozenset[int], values: bool = True) -> str:
    """A module's tree, its classes and their attributes, and every value it holds."""
    parts = [repr(module)]
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        parts.append(f"{name}{_said(_values(value), above) if values else value.shape}{value.requires_grad}")
    for name, part in module.named_modules():
        held = {key: value for key, value in vars(part).items() if key not in _TORCHS_OWN}
        hooks = [list(getattr(part, key, {}).values()) for key in _HOOKS]
        parts.append(f"{name}{_said(type(part), above)}{_said([held, hooks], above | {id(module)})}")
    return "".join(parts)


def _values(tensor: Any) -> Any:
    held = tensor.detach().cpu()
    try:
        return held.numpy()
    except TypeError:  # bfloat16
        return [str(held.dtype), held.float().numpy()]


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (TypeError, OSError):  # typed at the prompt, or made by a program
        code = getattr(thing, "__code__", None)
        return thing.__qualname__ if code is None else f"{code.co_code!r}{code.co_names}{_constants(code)}"


def _constants(code: Any) -> str:
    return str([_constants(c) + repr(c.co_code) if inspect.iscode(c) else repr(c) for c in code.co_consts])


def _beside(function: Any) -> list[Any]:
    """What a function closes over, its defaults, and the plain values among the globals it reads."""
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            cells.append(cell.cell_contents)
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    plain = {name: value for name, value in named.items() if isinstance(value, _PLAIN)}
    return [cells, function.__defaults__, function.__kwdefaults__, plain]
