"""Which settings are whole numbers: a range of such a setting has no values between them."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from fedsim import axes, models, references
from fedsim.config import Config
from fedsim.validate import InputError

_NAMED = {"int": int, "int | None": int}
"""Annotations of modules that postpone them, and that may name what only they know."""


def is_whole(name: str, config: Callable[[], Config]) -> bool:
    """Return whether a setting takes integers and no other numbers.

    Args:
        name: dotted, such as "train.steps" or "model.options.depth".
        config: gives a configuration with the variants whose options may be meant; asked only for these.

    Returns:
        False where it is not known: a setting that does not exist, a parameter from outside with neither a
        type nor a default, or an option of a configuration that is refused, which a trial of it says better.
    """
    kind: Any = Config
    *sections, last = name.split(".")
    for number, section in enumerate(sections):
        found = _hints(kind).get(section)
        parts = [part for part in (found, *typing.get_args(found)) if dataclasses.is_dataclass(part)]
        if parts:
            kind = parts[0]
        else:
            options = section == "options" and number == len(sections) - 1
            kind = _options(".".join(sections[:number]), config) if options else None
            break
    return _whole(_hints(kind).get(last))


def _hints(kind: Any) -> dict[str, Any]:
    """Types of what `kind` is made of, by name: as annotated, else those of the defaults."""
    if dataclasses.is_dataclass(kind):
        return typing.get_type_hints(kind)
    if not callable(kind):
        return {}
    try:
        signature = inspect.signature(kind)
    except (TypeError, ValueError):  # some of what is written in C says nothing
        return {}
    found = {}
    for name, parameter in signature.parameters.items():
        said, default = parameter.annotation, parameter.default
        if said is not parameter.empty:
            found[name] = _NAMED.get(said, said)
        elif default is not parameter.empty:
            found[name] = type(default)
    return found


def _whole(hint: Any) -> bool:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    said = typing.get_args(hint) if union else (hint,)
    return int in said and float not in said


def _options(path: str, config: Callable[[], Config]) -> Any:
    """What takes the options of what is chosen at `path`: a dataclass of ours, or a class or function from
    outside; None where there is none."""
    try:
        chosen: Any = config()
    except InputError:
        return None
    for part in path.split("."):
        chosen = getattr(chosen, part)
    if chosen is None:
        return None
    if path == "model":
        family = models.FAMILIES.get(chosen.name)
        if family is None and references.is_reference(chosen.name):
            return _from_outside(chosen.name)
        return None if family is None else family.options
    for registry in axes.registries():
        if registry.options == f"{path}.options":
            try:
                return registry.find(chosen.name)
            except InputError:
                return None
    return None


def _from_outside(name: str) -> Any:
    try:
        return references.resolve(name, "model.name")
    except InputError:
        return None
