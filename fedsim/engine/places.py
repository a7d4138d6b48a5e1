"""Whether a run will be able to write where it is told to: asked before anything starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fedsim.validate import InputError


def writable(folder: Path, what: str, remedy: str) -> None:
    """Refuse a folder that cannot be made, or in which no file can be made.

    Asks by making a file without a name in the nearest folder that exists: permissions alone do not tell
    about disks that are full or read-only, nor about the administrator.

    Raises:
        InputError: with `what` it is and the `remedy`.
    """
    try:
        os.fsencode(folder).decode()
        nearest = folder
        while not _exists(nearest):
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except UnicodeError as error:
        raise InputError(f"{what} must be a path in UTF-8, got {str(folder)!r}. {remedy}.") from error
    except OSError as error:
        raise InputError(
            f"{what} must be a folder that can be written, got {folder}: {error}. {remedy}."
        ) from error


def _exists(path: Path) -> bool:
    """Whether something is there, be it a link to nowhere; raises OSError where that cannot be said."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True
