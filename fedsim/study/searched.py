"""A folder is of one search: what it searched is written there before the first trial starts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.report.plain import plain
from fedsim.validate import InputError

NAME = "tuning.json"
"""What is in the folder of a search that is not private."""


def check(out: Path, search: Mapping[str, Any], trials: str) -> None:
    """Refuse the folder of another search; write nothing.

    Args:
        out: the folder, or where it will be.
        search: what tells searches apart, by name; not how many trials there are.
        trials: name of the file in which a search before this one tells the same of itself, if `out` has no
            file of ours: as much as it tells must be the same.

    Raises:
        InputError: the folder is another search's; says in what.
    """
    held = next((out / name for name in (NAME, trials) if (out / name).exists()), None)
    if held is not None:
        _refuse_other(out, _read(held), plain(dict(search)))


def claim(out: Path, search: Mapping[str, Any]) -> None:
    """Write which search a folder is of, if it has not been written; of two at once the first has it.

    Raises:
        InputError: another search was first.
    """
    mine, path = plain(dict(search)), out / NAME
    out.mkdir(parents=True, exist_ok=True)
    draft = out / f"{NAME}.{os.getpid()}"
    draft.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
    try:
        with contextlib.suppress(FileExistsError):  # another process, or an earlier one, was first
            os.link(draft, path)
    finally:
        draft.unlink()
    _refuse_other(out, _read(path), mine)


def _read(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}. Choose another --out.") from error
    if not isinstance(held, dict):
        raise InputError(f"{path} is none that a search wrote. Choose another --out.")
    return held


def _refuse_other(out: Path, held: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    differ = [name for name in mine if name in held and held[name] != mine[name]]
    if differ:
        said = "; ".join(f"{name} {_short(held[name])} there, {_short(mine[name])} here" for name in differ)
        raise InputError(
            f"{out} is the folder of another search: {said}. A search goes on with more --trials and nothing "
            "else changed; choose another --out for this one."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:160]}..."
