"""Where the bytes of pictures are: files of their own, or members of tar files.

A store knows the place of every picture by the columns of an index, and reads one by one system call or two.
What it reads is what the index is of: a file that changed since then is another data set, and stops the run.
Nothing is opened before it is read, and what is open stays so, at most `OPEN` files of a process.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.data.pictures.index import Index, stamp_of
from fedsim.data.pictures.tar import BLOCK
from fedsim.validate import RunError

OPEN = 64


class Store(Protocol):
    """Encoded pictures by place, 0 .. N - 1.

    Attributes:
        index: that they are found by.
    """

    index: Index

    def __len__(self) -> int: ...

    @property
    def fingerprints(self) -> NDArray[np.uint8]:
        """(N, 16) digests of the bytes of every file, memory-mapped."""
        ...

    def read(self, place: int) -> bytes:
        """Return the bytes of one; none where the sample has no picture.

        Raises:
            RunError: the file cannot be read, or is not the one that was indexed. That says nothing of the
                picture, which a repeated step must find as it was.
        """
        ...

    def name(self, place: int) -> str:
        """Return what to call one in a message."""
        ...


class Files:
    """A file a picture.

    Args:
        root: where the names of the index start.
        index: with columns `name_end` (N,), `names` (bytes), `stamp` (N,) and `sum` (N, 16).
    """

    def __init__(self, root: Path, index: Index) -> None:
        self.root, self.index = root, index
        self._end, self._stamp = index.column("name_end"), index.column("stamp")
        self._names, _ = index.span("names")
        self._open = _Open(1)

    def __len__(self) -> int:
        return len(self._end)

    @property
    def fingerprints(self) -> NDArray[np.uint8]:
        """See `Store.fingerprints`."""
        return self.index.column("sum")

    def read(self, place: int) -> bytes:
        """See `Store.read`."""
        path = self.root / self.name(place)
        try:
            with open(path, "rb") as handle:
                found = os.fstat(handle.fileno())
                content = handle.read()
        except OSError as error:
            raise RunError(_unreadable(path, error)) from error
        if short_stamp(found) != self._stamp[place] or len(content) != found.st_size:
            raise RunError(_changed(path))
        return content

    def name(self, place: int) -> str:
        """See `Store.name`: the path below the root. Read and not mapped: names are long."""
        start = int(self._end[place - 1]) if place else 0
        handle = self._open.get(self.index.path)
        name = os.pread(handle.descriptor, int(self._end[place]) - start, self._names + start)
        return os.fsdecode(name)


class Shards:
    """Members of tar files, one after the other in the order of the files.

    Args:
        root: where the names of the tar files start.
        index: with the columns `start` (N,), in blocks of 512 bytes from the start of the tar file, `size`
            (N,) and `sum` (N, 16); meta has `shards`: [name, stamp (`short_stamp`), first place].
        start, size: instead, columns of other members, such as the texts beside pictures.
    """

    def __init__(self, root: Path, index: Index, start: str = "start", size: str = "size") -> None:
        self.root, self.index = root, index
        self._start, self._size = index.column(start), index.column(size)
        self._shards: list[tuple[str, int, int]] = [tuple(row) for row in index.meta["shards"]]
        self._first = np.array([first for *_, first in self._shards], np.int64)
        self._open = _Open(OPEN)

    def __len__(self) -> int:
        return len(self._start)

    @property
    def fingerprints(self) -> NDArray[np.uint8]:
        """See `Store.fingerprints`."""
        return self.index.column("sum")

    def read(self, place: int) -> bytes:
        """See `Store.read`."""
        name, stamp, _ = self._shards[self._shard(place)]
        path, count = self.root / name, int(self._size[place])
        if not count:
            return b""
        try:
            handle = self._open.get(path)
            found = os.fstat(handle.descriptor)
            content = os.pread(handle.descriptor, count, int(self._start[place]) * BLOCK)
        except OSError as error:
            raise RunError(_unreadable(path, error)) from error
        if short_stamp(found) != stamp or len(content) != count:
            raise RunError(_changed(path))
        return content

    def name(self, place: int) -> str:
        """See `Store.name`: tar file and member, as far as its header says it."""
        shard = self._shards[self._shard(place)][0]
        if not self._size[place]:
            return f"{shard}: a sample without a picture"
        handle = self._open.get(self.root / shard)
        head = os.pread(handle.descriptor, 100, (int(self._start[place]) - 1) * BLOCK)
        return f"{shard}: {head.split(bytes(1), 1)[0].decode('utf-8', 'replace')}"

    def _shard(self, place: int) -> int:
        return int(np.searchsorted(self._first, place, side="right")) - 1


class _Handle:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Open:
    """Files that are open, the one used least recently given up first. Threads may ask at the same time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._held: OrderedDict[Path, _Handle] = OrderedDict()

    def get(self, path: Path) -> _Handle:
        with self._lock:
            if path not in self._held:
                self._held[path] = _Handle(path)
                while len(self._held) > self._most:
                    self._held.popitem(last=False)
            self._held.move_to_end(path)
            return self._held[path]


def short_stamp(status: os.stat_result) -> int:
    """Return 32 bits of a file's size and of when its content and anything of it last changed."""
    return zlib.crc32(b"%d %d %d" % stamp_of(status))


def _unreadable(path: Path, error: OSError) -> str:
    why = error.strerror or error
    return f"{path} cannot be read: {why}. Its example would be missing: mend it, and resume."


def _changed(path: Path) -> str:
    return f"{path} changed after its pictures were indexed, so they are not those of this run. Restore it."
