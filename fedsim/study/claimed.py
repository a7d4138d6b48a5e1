"""A folder is of one search, or of one comparison: what it is of is written there before the first run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.report.plain import plain
from fedsim.validate import InputError


@dataclass(frozen=True)
class Kind:
    """What folders are of.

    Attributes:
        what: as sentences call it.
        file: in the folder, which says of what.
        goes_on: the sentence that says what may change in it.
        before: a file in which what is older than `file` tells the same of itself, if any: as much as it
            tells must be the same.
    """

    what: str
    file: str
    goes_on: str
    before: str = ""


SEARCH = Kind(
    "search", "tuning.json", "A search goes on with more --trials and nothing else changed", "trials.json"
)
"""That is not private."""
COMPARISON = Kind("comparison", "comparison.json", "One goes on with other rows, budgets and seeds")


def check(kind: Kind, out: Path, said: Mapping[str, Any]) -> None:
    """Refuse the folder of another one of this kind; write nothing.

    Args:
        kind: of what is to be in the folder.
        out: the folder, or where it will be.
        said: what tells two of this kind apart, by name; nothing that may change in one.

    Raises:
        InputError: the folder is another one's; says in what.
    """
    names = [name for name in (kind.file, kind.before) if name]
    held = next((out / name for name in names if (out / name).exists()), None)
    if held is not None:
        _refuse_other(kind, out, _read(kind, held), plain(dict(said)))


def claim(kind: Kind, out: Path, said: Mapping[str, Any]) -> None:
    """Write what a folder is of, if it has not been written; of two at once the first has it.

    Raises:
        InputError: another one was first.
    """
    mine, path = plain(dict(said)), out / kind.file
    out.mkdir(parents=True, exist_ok=True)
    draft = out / f"{kind.file}.{os.getpid()}"
    draft.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
    try:
        with contextlib.suppress(FileExistsError):  # another process, or an earlier one, was first
            os.link(draft, path)
    finally:
        draft.unlink()
    _refuse_other(kind, out, _read(kind, path), mine)


def _read(kind: Kind, path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}. Choose another --out.") from error
    if not isinstance(held, dict):
        raise InputError(f"{path} is none that a {kind.what} wrote. Choose another --out.")
    return held


def _refuse_other(kind: Kind, out: Path, held: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    differ = [name for name in mine if name in held and held[name] != mine[name]]
    if differ:
        said = "; ".join(f"{name} {_short(held[name])} there, {_short(mine[name])} here" for name in differ)
        raise InputError(
            f"{out} is the folder of another {kind.what}: {said}. {kind.goes_on}; choose another --out for "
            "this one."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:160]}..."
