"""What binds a run to its data: a keyed digest of the examples of every holder.

The key derives from the run's root. Under secure noise the digests therefore tell nothing, not even whether
two holders or two runs have the same examples, and once the root is destroyed nobody can test a guess. Under
seeded noise whoever knows the seed can, as he can remove the noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds


def holder_digests(
    root: seeds.Root, holder_of: NDArray[Any], holders: int, arrays: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return one digest a holder, 32 hexadecimal digits, over its example ids and their values.

    Args:
        root: of the run; the digests are keyed by it.
        holder_of: (N,) the holder of every example.
        holders: number of holders.
        arrays: name -> (N, ...) values of every example: targets, and inputs or what stands for them
            (`fedsim.data.pictures`: digests of files). Names, dtypes and shapes count.
    """
    key = seeds.derive(root, "data")
    order = np.argsort(holder_of, kind="stable")
    ends = np.cumsum(np.bincount(holder_of, minlength=holders))
    out = []
    for holder, ids in enumerate(np.split(order.astype("<i8", copy=False), ends[:-1])):
        digest = hashlib.blake2b(key=key, digest_size=16, person=b"fedsim-holder-1")
        digest.update(f"{holder} {len(ids)}\n".encode() + ids.tobytes())
        for name in sorted(arrays):
            values = arrays[name]
            digest.update(f"{name} {values.dtype.str} {values.shape[1:]}\n".encode())
            digest.update(np.ascontiguousarray(values[ids]).data)
        out.append(digest.hexdigest())
    return tuple(out)
