"""What a result file holds: a key that is looked for and not there is an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedsim.validate import InputError

_SHOWN = 8


class Held(dict[str, Any]):
    """A mapping of a result file, at any depth of it.

    Raises:
        InputError: `held[key]` of a key that is not there; names the file and the key.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> Any:
        """Say which file lacks what, instead of a KeyError."""
        there = ", ".join(list(self)[:_SHOWN]) + (", ..." if len(self) > _SHOWN else "")
        raise InputError(
            f"{self._path}: a result of this kind must hold {key!r}"
            + (f" beside {there}" if there else "")
            + ", and does not. Make it again, or move it out of the folder."
        )


def loaded(path: Path) -> Any:
    """Return the content of a JSON file, its mappings as `Held`.

    Raises:
        InputError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_hook=lambda found: Held(path, found))
    except ValueError as error:
        raise InputError(f"{path}: expected a JSON file. {error}") from error
