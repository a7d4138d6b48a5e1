"""Names of variants and budgets: no two may look alike in a table, nor share a file or a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedsim.engine.run_folder import file_name
from fedsim.validate import InputError

_MARKUP = re.compile(r"[|<>\[\]`\x00-\x1f]")


def slug(variant: str) -> str:
    """Return a variant as part of the name of a run's folder."""
    return re.sub(r"[^\w.-]+", "_", variant)


def _looks(variant: str) -> str:
    return " ".join(variant.split())


_WRITTEN: Mapping[str, Callable[[str], str]] = {
    "a table": _looks,
    "names of folders": slug,
    "names of files": lambda variant: file_name(variant, "chosen"),
}
"""Where a variant's name is written, and how; capitals tell none apart, for some file systems ignore them."""


def check(path: Path, title: str, variants: Iterable[str], epsilons: Iterable[float]) -> None:
    """Refuse names and budgets that cannot stand in one table, or one folder, beside each other.

    Args:
        path: the file they are of, for messages.
        title: of it.
        variants: their names.
        epsilons: budgets.

    Raises:
        InputError: names two that are not told apart, or one that breaks a table.
    """
    names = list(variants)
    for name in (title, *names):
        if _MARKUP.search(name):
            raise InputError(
                f"{path}: titles and names of variants stand in tables and on a page: they must hold none of "
                f"| < > [ ] ` and no line break, got {name!r}."
            )
    for where, written in _WRITTEN.items():
        first: dict[str, str] = {}
        for name in names:
            other = first.setdefault(written(name).casefold(), name)
            if other != name:
                raise InputError(
                    f"{path}: variants must have names that are told apart everywhere, but {other!r} and "
                    f"{name!r} look the same in {where}. Rename one."
                )
    printed: dict[str, float] = {}
    for epsilon in epsilons:
        other_budget = printed.setdefault(f"{epsilon:g}", epsilon)
        if other_budget != epsilon:
            raise InputError(
                f"{path}: epsilons must differ in their first six digits, as tables show them, got "
                f"{other_budget!r} and {epsilon!r}. Leave one out."
            )


def check_numbers(path: Path, content: Mapping[Any, Any]) -> None:
    """Refuse seeds that are no whole numbers, and budgets that are no numbers, as a file says them.

    Raises:
        InputError: names the first.
    """
    for key, kinds, what in (("seeds", (int,), "whole numbers"), ("epsilons", (int, float), "numbers")):
        values = content.get(key)
        if values is None:
            continue
        if not isinstance(values, list):
            raise InputError(f"{path}: {key} must be a list of {what}, got {values!r}.")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise InputError(f"{path}: {key} must be {what}, got {value!r}.")


def refuse_shared(places: Iterable[tuple[str, str]], what: str) -> None:
    """Refuse two things that would be kept in one place.

    Args:
        places: (name of the place, whose it is).
        what: the kind of place, for the message.

    Raises:
        InputError: names both.
    """
    whose: dict[str, str] = {}
    for place, owner in places:
        other = whose.setdefault(place.casefold(), owner)
        if other != owner:
            raise InputError(
                f"variants must have names that give each {what} of its own, but that of '{other}' and of "
                f"'{owner}' is {place}. Rename a variant."
            )
