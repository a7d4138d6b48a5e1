"""Files that can always be computed again: where they are, one writer at a time, whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedsim.validate import InputError

FOLDER_VARIABLE = "FEDSIM_CACHE"


def folder() -> Path:
    """Return $FEDSIM_CACHE, else $XDG_CACHE_HOME/fedsim, else ~/.cache/fedsim.

    Raises:
        InputError: $FEDSIM_CACHE is not absolute; processes in other folders would not find the files.
    """
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        chosen = Path(given).expanduser()
        if not chosen.is_absolute():
            raise InputError(f"{FOLDER_VARIABLE} must be an absolute path, got {given!r}.")
        return chosen
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "fedsim"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the block for `path`; its folder is made when missing.

    The lock is gone with its process, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "wb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write; it becomes `path` when the block ends without an error. Use within `locked`."""
    draft = path.with_suffix(".part")
    try:
        with open(draft, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def put(number: int, content: bytes, offset: int) -> None:
    """Write all of `content` at `offset` of an open file; on a full disk an error, never a signal."""
    view = memoryview(content)
    while view:
        done = os.pwrite(number, view, offset)
        view, offset = view[done:], offset + done


def sync(number: int) -> None:
    """Return when everything written to an open file so far is on disk."""
    os.fsync(number)
