"""A file of features that is filled by example, a block at a time, and never holds a row it cannot vouch for.

It is a .npy array (N, *shape) with room for every example, and after it a journal: one record a block, with
the ids of its rows, a digest of each row's image and a checksum of the features. A row is there once a record
says so. The rows of a block reach the disk before its record does, so whatever ends the process leaves whole
blocks, and whoever comes next goes on after them. Rows are never written again: readers map the file while
others fill it.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedsim.data import cache
from fedsim.data.pictures.pictures import Pictures
from fedsim.validate import InputError

DTYPE = np.dtype("<f2")  # 11 significant bits: a relative error of at most 4.9e-4 above 6e-5
Ids = NDArray[np.int64]
Digests = NDArray[np.uint64]  # (n, 2): 16 bytes an image; zero: the row is not there

_HEAD = struct.Struct("<8sII")  # mark, rows, checksum of their features
_MARK = b"fedsim1\n"
_SEAL = 16  # bytes of digest that end a record


def digests(images: NDArray[np.uint8] | Pictures, ids: Ids) -> Digests:
    """Return a digest of each of these rows of `images`, of its own bytes alone: its pixels, or its file."""
    if isinstance(images, Pictures):
        return np.ascontiguousarray(images.fingerprints[ids]).view("<u8").reshape(len(ids), 2)
    found = b"".join(
        hashlib.blake2b(np.ascontiguousarray(images[i]).data, digest_size=16).digest() for i in ids
    )
    return np.frombuffer(found, "<u8").reshape(len(ids), 2)


class FeatureFile:
    """The features of N examples, as far as they are there.

    Args:
        path: the file; made when missing by `writing`.
        shape: (N, *features of one example).
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self._row = int(np.prod(shape[1:])) * DTYPE.itemsize

    def held(self) -> Digests:
        """Return (N, 2) the digest of the image whose features stand in each row, zero where none do.

        Raises:
            InputError: the file is there and is none of these examples.
        """
        found = np.zeros((self.shape[0], 2), "<u8")
        if self.path.exists():
            with open(self.path, "rb") as handle:
                for ids, images, _, _ in self._records(handle):
                    found[ids] = images
        return found

    def writing(self) -> Writing:
        """Return a writer; use within `cache.locked`. What a process left half written is dropped."""
        if not self.path.exists():
            with cache.written(self.path) as handle:
                header = {"descr": DTYPE.str, "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_1_0(handle, header)
        handle = open(self.path, "r+b")  # noqa: SIM115  (closed by Writing)
        end = self._start(handle) + self.shape[0] * self._row
        for _, _, _, end in self._records(handle):  # noqa: B007
            pass
        handle.truncate(end)
        return Writing(handle, self._start(handle), self._row, end)

    def array(self) -> NDArray[np.float16]:
        """Return all rows, memory-mapped and read-only; those that are not there are zero."""
        with open(self.path, "rb") as handle:
            start = self._start(handle)
        return np.memmap(self.path, DTYPE, "r", start, self.shape)

    def check(self) -> None:
        """Read every block and compare it with its checksum.

        Raises:
            InputError: a block is not what was written.
        """
        rows = self.array()
        with open(self.path, "rb") as handle:
            for ids, _, checksum, _ in self._records(handle):
                if zlib.crc32(rows[ids].tobytes()) != checksum:
                    raise InputError(
                        f"{self.path} is damaged: a block is not what was written. Delete the file; it is "
                        "computed again."
                    )

    def _start(self, handle: BinaryIO) -> int:
        """Return where the rows start."""
        handle.seek(0)
        try:
            assert np.lib.format.read_magic(handle) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(handle)
        except (ValueError, AssertionError) as error:
            raise InputError(f"{self.path} is damaged: {error}. Delete it; it is computed again.") from error
        if (shape, fortran, dtype) != (self.shape, False, DTYPE):
            raise InputError(
                f"{self.path} is damaged: it must hold {DTYPE} of shape {self.shape}, got {dtype} of shape "
                f"{shape}. Delete it; it is computed again."
            )
        return handle.tell()

    def _records(self, handle: BinaryIO) -> Iterator[tuple[Ids, Digests, int, int]]:
        """Yield ids, digests, checksum and end of every whole record; a torn one ends the journal.

        What cuts the file short cuts the journal first, so rows that are lost are not said to be there.
        """
        place = self._start(handle) + self.shape[0] * self._row
        handle.seek(place)
        journal = handle.read()
        at = 0
        while len(journal) - at >= _HEAD.size:
            mark, rows, checksum = _HEAD.unpack_from(journal, at)
            end = at + _HEAD.size + rows * 24
            seal = hashlib.blake2b(journal[at:end], digest_size=_SEAL).digest()
            if mark != _MARK or journal[end : end + _SEAL] != seal:
                return
            ids = np.frombuffer(journal, "<i8", rows, at + _HEAD.size)
            images = np.frombuffer(journal, "<u8", 2 * rows, at + _HEAD.size + 8 * rows).reshape(rows, 2)
            at = end + _SEAL
            yield ids, images, checksum, place + at


class Writing:
    """Adds blocks to a file, each on disk for good before `add` returns."""

    def __init__(self, handle: BinaryIO, start: int, row: int, end: int) -> None:
        self._handle, self._start, self._row, self._end = handle, start, row, end

    def __enter__(self) -> Writing:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._handle.close()

    def add(self, ids: Ids, images: Digests, features: NDArray[np.float16]) -> None:
        """Put rows (n, ...) in their places and say so, with the digests (n, 2) of their images."""
        number = self._handle.fileno()
        content = features.tobytes()
        first = 0
        for run in np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1):
            last = first + len(run) * self._row
            cache.put(number, content[first:last], self._start + int(run[0]) * self._row)
            first = last
        cache.sync(number)
        record = _HEAD.pack(_MARK, len(ids), zlib.crc32(content)) + ids.astype("<i8").tobytes()
        record += images.astype("<u8").tobytes()
        record += hashlib.blake2b(record, digest_size=_SEAL).digest()
        cache.put(number, record, self._end)
        cache.sync(number)
        self._end += len(record)
