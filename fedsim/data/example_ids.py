"""How examples are named: by one int64, from which every draw, view and shuffle of the example follows.

Two rules give the number, and nothing that uses it asks which:

* A data set that was one before it was partitioned: the example's place in it. The name survives
  partitioning, so the federation draws what the centralized run draws.
* Data that lies at its holders: holder * 2**40 + number, the example's number at its holder. A holder names
  its examples without knowing how many others have, and a new one, of a stream say, changes no other's name.

Draws take word `id` of a key stream with random access (fedsim.samplers.keyed, fedsim.data.augment), so names
need not be dense. Only fixed-size and shuffled draws rank a whole population, and need the first rule.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim import validate

Ints = NDArray[np.int64]

_BITS = 40  # of the number: 10**12 examples a holder, and 2**23 holders
HOLDERS = 2 ** (63 - _BITS)


def local(holder: int, count: int) -> Ints:
    """Return the names (count,) of a holder's examples 0 .. count - 1.

    Raises:
        InputError: a holder outside 0 .. 2**23 - 1, or a count outside 0 .. 2**40.
    """
    validate.in_range(holder, 0, HOLDERS - 1, "holder")
    validate.in_range(count, 0, 2**_BITS, "number of a holder's examples")
    return (holder << _BITS) + np.arange(count, dtype=np.int64)


def split(ids: Ints) -> tuple[Ints, Ints]:
    """Return holder and number, both of the shape of `ids`, of names that `local` gave."""
    return ids >> _BITS, ids & (2**_BITS - 1)
