"""Which settings are whole numbers: a range of such a setting has no values between them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

from fedsim import axes, models
from fedsim.config import Config
from fedsim.validate import InputError


def is_whole(name: str, config: Callable[[], Config]) -> bool:
    """Return whether a setting takes integers and no other numbers.

    Args:
        name: dotted, such as "train.steps" or "model.options.depth".
        config: gives a configuration with the variants whose options may be meant; asked only for these.

    Returns:
        False where it is not known: a setting that does not exist, an option of a function from outside, or
        of a configuration that is refused, which a trial of it says better.
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
    return typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}


def _whole(hint: Any) -> bool:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    said = typing.get_args(hint) if union else (hint,)
    return int in said and float not in said


def _options(path: str, config: Callable[[], Config]) -> Any:
    """The dataclass whose fields are the options of what is chosen at `path`; None where there is none."""
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
        return None if family is None else family.options
    for registry in axes.registries():
        if registry.options == f"{path}.options":
            try:
                return registry.find(chosen.name)
            except InputError:
                return None
    return None
