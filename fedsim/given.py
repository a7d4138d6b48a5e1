"""Objects handed in from Python: models, data, tasks and partitions that exist in this process alone.

A configuration names one as "given:KIND_DIGEST". The digest is of what the object holds, so that a run is
resumed with an equal one only; another process cannot have it, and says so.
"""

from __future__ import annotations

from typing import Any

from fedsim.validate import InputError

MODULE = "given"
_held: dict[str, Any] = {}


def hold(kind: str, digest: str, thing: Any) -> str:
    """Keep an object and return the name by which a configuration can name it."""
    name = f"{kind}_{digest[:16]}"
    _held[name] = thing
    return f"{MODULE}:{name}"


def is_given(reference: str) -> bool:
    """Whether a reference names an object of this process."""
    return reference.partition(":")[0] == MODULE


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
