"""An index: columns of a table on disk, made once, kept beside other caches, and memory-mapped.

What a table was made of is in its name, by a digest of the sizes and times of all files; so it is never asked
whether it still fits, and a file that changed gets a new one. Whoever asks first makes it; others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedsim.data import cache
from fedsim.validate import InputError

FORMAT = 1
FOLDER = "pictures"
_MARK = b"fedsimix"
_FOOT = struct.Struct("<8sQ")
_ALIGNED = 64

Columns = Mapping[str, NDArray[Any]]
Stamp = tuple[int, int, int]


class Index:
    """A table that is there: `meta` says what it is of, and `column` maps one column of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as handle:
            end = handle.seek(-_FOOT.size, os.SEEK_END)
            mark, length = _FOOT.unpack(handle.read(_FOOT.size))
            if mark != _MARK or length > end:
                raise ValueError("it does not end as an index")
            handle.seek(end - length)
            described = json.loads(handle.read(length))
        self._columns: dict[str, tuple[str, list[int], int]] = described["columns"]
        self.meta: dict[str, Any] = described["meta"]

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def column(self, name: str) -> NDArray[Any]:
        """Return a column, memory-mapped and read-only."""
        dtype, shape, offset = self._columns[name]
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(self.path, np.dtype(dtype), "r", offset, tuple(shape))

    def span(self, name: str) -> tuple[int, int]:
        """Return where the bytes of a column start and how many they are, for who reads and does not map."""
        dtype, shape, offset = self._columns[name]
        return offset, int(np.prod(shape)) * np.dtype(dtype).itemsize


def key_of(parts: Iterable[str | bytes | Stamp]) -> str:
    """Return 32 hexadecimal digits that stand for what an index is made of, in this order."""
    digest = hashlib.blake2b(f"fedsim index {FORMAT}".encode(), digest_size=16)
    for part in parts:
        content = repr(part).encode()
        digest.update(len(content).to_bytes(4, "little") + content)
    return digest.hexdigest()


def stamp_of(status: os.stat_result) -> Stamp:
    """Return what changes when a file does: its size, and when content and anything of it last changed."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def opened(name: str, make: Callable[[], tuple[Columns, dict[str, Any]]]) -> Index:
    """Return the index of this name, made where it is not there or damaged.

    Args:
        name: of the file, with a key (`key_of`) in it.
        make: returns columns and meta, where they are needed.

    Raises:
        InputError: the cache cannot be written.
    """
    path = cache.folder() / FOLDER / name
    if (found := whole(path)) is not None:
        return found
    try:
        with cache.locked(path):
            if (found := whole(path)) is None:  # another process may have been at it
                columns, meta = make()
                with cache.written(path) as handle:
                    write(handle, columns, meta)
                found = Index(path)
            return found
    except OSError as error:
        raise InputError(
            f"{path}: the index of the pictures must be writable: {error}. Set {cache.FOLDER_VARIABLE} to a "
            "folder with room."
        ) from error


def write(
    handle: BinaryIO,
    columns: Columns,
    meta: dict[str, Any],
    at: int = 0,
    there: Mapping[str, tuple[str, list[int], int]] | None = None,
) -> None:
    """Write a table into an open file: columns, and then what they are, whose end ends the file.

    Args:
        handle: of the file.
        columns: name -> values.
        meta: what JSON can say.
        at: byte to start from.
        there: columns that were written before: name -> (dtype, shape, offset).
    """
    places = dict(there or {})
    for name, values in columns.items():
        at = -(-at // _ALIGNED) * _ALIGNED
        places[name] = (values.dtype.str, list(values.shape), at)
        handle.seek(at)
        handle.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        at += values.nbytes
    described = json.dumps({"columns": places, "meta": meta}).encode()
    handle.seek(at)
    handle.write(described + _FOOT.pack(_MARK, len(described)))


def whole(path: Path) -> Index | None:
    """Return the index in a file, or None where there is none or it is damaged."""
    try:
        return Index(path)
    except (OSError, ValueError, KeyError, struct.error):
        return None


def narrow(largest: int) -> np.dtype[Any]:
    """Return the smallest unsigned dtype that holds 0 .. largest."""
    return np.min_scalar_type(max(0, largest))
