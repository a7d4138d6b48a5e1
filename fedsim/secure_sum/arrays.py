"""Messages of the secure sum as arrays with one row a holder, as they travel between nodes and server."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedsim.secure_sum import shamir
from fedsim.secure_sum.protocol import Advert, Reveal

Bytes = NDArray[np.uint8]
Ids = NDArray[np.int64]


def pack_adverts(adverts: Mapping[int, Advert], rows: Sequence[int]) -> Bytes:
    """Return (rows, 3, 32) uint8; zeros for holders that are silent."""
    out = np.zeros((len(rows), 3, 32), dtype=np.uint8)
    for row, holder in enumerate(rows):
        if holder in adverts:
            said = adverts[holder]
            text = said.channel + said.mask + said.seed
            out[row] = np.frombuffer(text, dtype=np.uint8).reshape(3, 32)
    return out


def unpack_adverts(packed: Bytes, here: NDArray[np.bool_], rows: Ids) -> dict[int, Advert]:
    """Return the adverts of the holders `rows` that are `here`."""
    return {
        int(rows[i]): Advert(*(packed[i, part].tobytes() for part in range(3))) for i in np.flatnonzero(here)
    }


def pack_pairs(
    sent: Mapping[int, Mapping[int, bytes]],
    neighbours: Mapping[int, Ids],
    rows: Sequence[int],
    width: int,
    size: int,
) -> Bytes:
    """Return what holders say to single neighbours, `size` bytes each, as (rows, width, size) uint8: a column
    a neighbour in ascending order, zeros where nothing is said."""
    out = np.zeros((len(rows), width, size), dtype=np.uint8)
    for row, holder in enumerate(rows):
        said = sent.get(holder, {})
        for column, other in enumerate(neighbours[holder].tolist() if said else ()):
            if other in said:
                out[row, column] = np.frombuffer(said[other], dtype=np.uint8)
    return out


def unpack_pairs(
    packed: Bytes,
    here: NDArray[np.bool_],
    rows: Ids,
    neighbours: Mapping[int, Ids],
    to: Collection[int] | None = None,
) -> dict[int, dict[int, bytes]]:
    """Return sender -> receiver -> message of the holders `rows` that are `here`, to all neighbours or to
    those among `to`."""
    return {
        int(rows[i]): {
            other: packed[i, column].tobytes()
            for column, other in enumerate(neighbours[int(rows[i])].tolist())
            if to is None or other in to
        }
        for i in np.flatnonzero(here)
    }


def by_receiver(sent: Mapping[int, Mapping[int, bytes]]) -> dict[int, dict[int, bytes]]:
    """Return receiver -> sender -> message of sender -> receiver -> message."""
    out: dict[int, dict[int, bytes]] = {}
    for sender, messages in sent.items():
        for receiver, text in messages.items():
            out.setdefault(receiver, {})[sender] = text
    return out


def pack_reveals(
    reveals: Mapping[int, Reveal], neighbours: Mapping[int, Ids], rows: Sequence[int], width: int
) -> NDArray[np.uint32]:
    """Return (rows, width, LIMBS) uint32: the one share revealed a neighbour; zeros elsewhere."""
    out = np.zeros((len(rows), width, shamir.LIMBS), dtype=np.uint32)
    for row, holder in enumerate(rows):
        if holder in reveals:
            both = {**reveals[holder].seeds, **reveals[holder].keys}
            for column, other in enumerate(neighbours[holder].tolist()):
                if other in both:
                    out[row, column] = both[other]
    return out


def unpack_reveals(
    packed: NDArray[np.uint32],
    here: NDArray[np.bool_],
    rows: Ids,
    neighbours: Mapping[int, Ids],
    shared: set[int],
    arrived: set[int],
) -> dict[int, Reveal]:
    """Return what the holders `rows` that are `here` revealed; which kind a share is follows from the ids."""
    out: dict[int, Reveal] = {}
    for i in np.flatnonzero(here):
        holder = int(rows[i])
        columns = {o: packed[i, c] for c, o in enumerate(neighbours[holder].tolist()) if o in shared}
        seeds = {other: share for other, share in columns.items() if other in arrived}
        gone = {other: share for other, share in columns.items() if other not in arrived}
        out[holder] = Reveal(seeds, gone)
    return out
