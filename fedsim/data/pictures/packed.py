"""Pictures made smaller once, as pixels in one file that is memory-mapped: nothing is decoded again.

The shorter side of each is brought to a given length, bilinearly with antialiasing; smaller ones stay as they
are. Parts and fits are then those of the smaller pictures, so that results are not those of the files. The
file is whole or not there. What cannot be decoded has no pixels in it, and is counted.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedsim.data import cache
from fedsim.data.pictures import index
from fedsim.data.pictures import workers as threads
from fedsim.data.pictures.decode import Encoded, Picture, Pixels, shrunk_to
from fedsim.data.pictures.index import Index, narrow
from fedsim.data.pictures.pictures import InFiles
from fedsim.data.pictures.shown import Undecodable

UNIT = 64
"""Pictures start at multiples of so many bytes."""

AT_ONCE = 256
"""Pictures that are in memory at once while the file is made."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Pictures in a packed file.

    Attributes:
        files: what they were made of: names and fingerprints are theirs.
        table: with columns `at` (N,), where the pixels start in units, and `high` and `wide` (N,), 0 where a
            picture cannot be decoded.
        pixels: (bytes,) uint8, memory-mapped.
    """

    files: InFiles
    table: Index
    at: NDArray[Any]
    high: NDArray[Any]
    wide: NDArray[Any]
    pixels: NDArray[np.uint8]

    @classmethod
    def of(cls, files: InFiles, table: Index) -> Packed:
        """Return the pictures of a file that is there."""
        columns = (table.column(name) for name in ("at", "high", "wide", "pixels"))
        return cls(files, table, *columns)

    def __len__(self) -> int:
        return len(self.at)

    def open(self, place: int) -> Picture:
        """See `Frames.open`."""
        high, wide = int(self.high[place]), int(self.wide[place])
        if not high:
            raise Undecodable("must be a readable image, and was none when pictures were packed")
        start = int(self.at[place]) * UNIT
        return Pixels(self.pixels[start : start + 3 * high * wide].reshape(high, wide, 3))

    def name(self, place: int) -> str:
        """See `Frames.name`."""
        return self.files.name(place)

    @property
    def fingerprints(self) -> NDArray[np.uint8]:
        """See `Frames.fingerprints`."""
        return self.files.fingerprints

    @property
    def how(self) -> str:
        """See `Frames.how`."""
        return f"{self.files.how}, packed with {self.table.meta['short']} along the shorter side"

    @property
    def known(self) -> tuple[int, str]:
        """See `Frames.known`."""
        return int(self.table.meta["refused"]), "when they were packed"


def packed(files: InFiles, short: int) -> Packed:
    """Return pictures with `short` pixels along the shorter side, packed now where they are not.

    Raises:
        InputError: the cache cannot be written, or has no room.
        RunError: a file cannot be read, or changed since it was indexed.
    """
    source = files.store.index.path.stem
    key = index.key_of((source, f"short {short} of at most {files.most_pixels}"))
    return Packed.of(
        files,
        index.opened(
            f"packed-{key}.pixels",
            lambda handle: _pack(handle, files, short),
            ", or data.options.decode=on_demand",
        ),
    )


def _pack(handle: BinaryIO, files: InFiles, short: int) -> None:
    """Write pixels, then the columns that say where they are."""
    count, room = len(files), shutil.disk_usage(cache.folder()).free
    at, sides = np.zeros(count, np.uint64), np.zeros((count, 2), np.uint16)
    end, refused = 0, 0

    def smaller(place: int) -> NDArray[np.uint8] | None:
        try:
            picture = files.open(place)
            assert isinstance(picture, Encoded)
            found = np.asarray(shrunk_to(picture.image(picture.scale_for(short)), short, picture.size))
        except Undecodable:
            return None
        return found if max(found.shape) < 2**16 else None

    for first in range(0, count, AT_ONCE):
        places = range(first, min(first + AT_ONCE, count))
        for place, pixels in zip(places, threads.each(smaller, places), strict=True):
            if pixels is None:
                refused += 1
                continue
            at[place], sides[place] = end // UNIT, pixels.shape[:2]
            cache.put(handle.fileno(), pixels.tobytes(), end)
            end += -(-pixels.nbytes // UNIT) * UNIT
        if first == 0 and (needed := end // len(places) * count) > room:
            raise OSError(f"{needed / 2**20:.0f} MiB are needed, and {room / 2**20:.0f} are free")
    os.truncate(handle.fileno(), end)
    columns = {
        "at": at.astype(narrow(int(at.max(initial=0)))),
        "high": sides[:, 0].astype(narrow(int(sides[:, 0].max(initial=0)))),
        "wide": sides[:, 1].astype(narrow(int(sides[:, 1].max(initial=0)))),
    }
    places_of = {"pixels": (np.dtype(np.uint8).str, [end], 0)}
    index.write(handle, columns, {"refused": refused, "short": short}, end, places_of)
