"""An index: columns of a table on disk, made once, kept beside other caches, and memory-mapped.

What a table was made of is in its name, by a digest of the sizes and times of all files; so it is never asked
whether it still fits, and a file that changed gets a new one. Whoever asks first makes it; others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedsim.data import cache
from fedsim.validate import InputError

FORMAT = 2
FOLDER = "pictures"
_MARK = b"fedsimix"
_FOOT = struct.Struct("<8sQ")
_ALIGNED = 64

BLOCK = 2**16
"""Numbers of a column that are in memory at once while it is made."""

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


class Growing:
    """A column that is made number by number: what is there lies in a file without a name, so that memory
    does not grow with it, and its dtype is known at the end.

    Args:
        width: bytes of a row; 0: a row is a number of 0 or above, kept in the smallest unsigned dtype.
    """

    def __init__(self, width: int = 0) -> None:
        self._file = tempfile.TemporaryFile(dir=cache.folder())  # noqa: SIM115 - gone with the object
        self._numbers, self._bytes = array("Q"), bytearray()
        self._width, self._largest, self._count = width, 0, 0

    def __len__(self) -> int:
        return self._count

    def add(self, value: int) -> None:
        """Add a row that is a number."""
        self._numbers.append(value)
        self._largest = max(self._largest, value)
        self._count += 1
        if len(self._numbers) == BLOCK:
            self._spill()

    def put(self, content: bytes) -> None:
        """Add as many rows of bytes as there are in `content`."""
        self._bytes += content
        self._count += len(content) // self._width
        if len(self._bytes) >= 8 * BLOCK:
            self._spill()

    def _spill(self) -> None:
        try:
            self._file.write(self._bytes if self._width else self._numbers.tobytes())
        except OSError as error:
            raise InputError(_no_room(cache.folder(), error)) from error
        self._numbers, self._bytes = array("Q"), bytearray()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the column."""
        return np.dtype(np.uint8) if self._width else narrow(self._largest)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N,), or (N, width) for rows of several bytes."""
        return (self._count, self._width) if self._width > 1 else (self._count,)

    @property
    def nbytes(self) -> int:
        """Of the column."""
        return self._count * (self._width or self.dtype.itemsize)

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield the column in parts; nothing can be added after."""
        self._spill()
        self._file.seek(0)
        kind = np.dtype(np.uint8 if self._width else np.uint64)
        while content := self._file.read(8 * BLOCK):
            yield np.frombuffer(content, kind).astype(self.dtype, copy=False)


Columns = Mapping[str, NDArray[Any] | Growing]


def opened(name: str, make: Callable[[BinaryIO], None], remedy: str = "") -> Index:
    """Return the index of this name, made where it is not there or damaged.

    Args:
        name: of the file, with a key (`key_of`) in it.
        make: writes it (`write`) into an open file, where it is needed.
        remedy: what else helps where the cache has no room.

    Raises:
        InputError: the cache cannot be written.
    """
    path = cache.folder() / FOLDER / name
    if (found := whole(path)) is not None:
        return found
    try:
        with cache.locked(path):
            if (found := whole(path)) is None:  # another process may have been at it
                with cache.written(path) as handle:
                    make(handle)
                found = Index(path)
            return found
    except OSError as error:
        raise InputError(_no_room(path, error, remedy)) from error


def _no_room(path: Path, error: OSError, remedy: str = "") -> str:
    return (
        f"{path}: what is kept of pictures and captions must be writable: {error}. Set "
        f"{cache.FOLDER_VARIABLE} to a folder with room{remedy}."
    )


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
        for block in values.blocks() if isinstance(values, Growing) else (values,):
            handle.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
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
