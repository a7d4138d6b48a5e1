"""Work on many pictures by threads: decoders let go of Python's lock. Nothing stays when the work is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 8
"""Pictures that a thread takes at once: enough to share what is computed for several, few enough to even
out."""


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def by_chunks(
    work: Callable[[NDArray[np.int64]], Result], count: int, workers: int, chunk: int = CHUNK
) -> list[Result]:
    """Return `work` of rows 0 .. count - 1, `chunk` of them at a time, in their order.

    Args:
        work: gets ascending rows; what it returns must not depend on which come together.
        count: of rows.
        workers: threads at most; with 1 no other thread is started.
        chunk: rows at a time.
    """
    return each(work, [np.arange(at, min(at + chunk, count)) for at in range(0, count, chunk)], workers)


def each(work: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None) -> list[Result]:
    """Return `work` of every item, in order, one a thread at a time; None: a thread a core."""
    workers = min(cores() if workers is None else workers, len(items))
    if workers <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(workers, thread_name_prefix="pictures") as pool:
        return list(pool.map(work, items))
