"""Public or sensitive, as a type: a number is public only by what it depends on.

Every number a run writes is wrapped where it is made, and what is computed from it by `map` keeps the tag.
Writers take wrapped values alone, so a number whose maker did not say which it is never leaves; in
public-only mode `shown` drops the sensitive ones before anything is written. docs/public.md lists which is
which, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Public(Generic[T]):
    """A value that follows from the configuration, public data, the ledger and released parameters alone."""

    value: T

    def map(self, function: Callable[[T], U]) -> Public[U]:
        """Return the function of the value, as public as the value."""
        return Public(function(self.value))


@dataclass(frozen=True, repr=False)
class Sensitive(Generic[T]):
    """A value that depends on private data other than through what the mechanism released."""

    value: T

    def map(self, function: Callable[[T], U]) -> Sensitive[U]:
        """Return the function of the value, as sensitive as the value."""
        return Sensitive(function(self.value))

    def __repr__(self) -> str:
        """Hide the value: messages and logs may go anywhere."""
        return "Sensitive(...)"


Tagged = Public[T] | Sensitive[T]
Numbers = Mapping[str, Tagged[Any]]


def shown(tree: Mapping[str, Any], *, public_only: bool) -> dict[str, Any]:
    """Return a mapping of tagged values (nested as deep as it likes) without the tags.

    In public-only mode sensitive entries are left out, as if they had never been made.

    Raises:
        TypeError: an entry is not tagged; names it and keeps its value to itself.
    """
    out: dict[str, Any] = {}
    for name, entry in tree.items():
        if isinstance(entry, Mapping):
            out[name] = shown(entry, public_only=public_only)
        elif isinstance(entry, Public | Sensitive):
            if isinstance(entry, Public) or not public_only:
                out[name] = entry.value
        else:
            raise TypeError(
                f"'{name}' must be Public or Sensitive where it is made, got a bare {type(entry).__name__}."
            )
    return out


def sensitive_names(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of the sensitive entries of a mapping of tagged values, sorted."""
    out: list[str] = []
    for name, entry in tree.items():
        if isinstance(entry, Mapping):
            out += sensitive_names(entry, f"{prefix}{name}.")
        elif isinstance(entry, Sensitive):
            out.append(f"{prefix}{name}")
    return sorted(out)
