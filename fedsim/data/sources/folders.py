"""Files below a folder, for every source that reads some."""

from __future__ import annotations

import os
from pathlib import Path

from fedsim.validate import InputError


def files(folder: Path, source: str) -> list[Path]:
    """Return all files below a folder, of any depth, sorted by path; none where there is no such folder.

    Links are followed, and one that leads nowhere is a file that cannot be read. Hidden files and folders
    (.NAME) are left out.

    Args:
        folder: where they are.
        source: its name, for messages.

    Raises:
        InputError: a folder that cannot be read, or that links lead to twice.
    """
    found: list[Path] = []
    seen = {os.path.realpath(folder)}

    def refuse(error: OSError) -> None:
        raise InputError(f"{source}: {error.filename} must be readable. {error}.") from error

    if not folder.is_dir():
        return []
    for here, below, names in os.walk(folder, followlinks=True, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in below:
            real = os.path.realpath(os.path.join(here, name))
            if real in seen:
                raise InputError(
                    f"{source}: {os.path.join(here, name)} leads to a folder that was there already, so its "
                    "examples would count twice. Remove the link."
                )
            seen.add(real)
        found += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(found)
