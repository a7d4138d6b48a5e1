"""Memory of one call that the next one takes over, instead of returning and fetching it at every step."""

from __future__ import annotations

import ctypes
import platform
import threading

import torch
from torch import Tensor

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LIMIT = 2**25  # bytes that may stay from call to call: more would raise the peak of the next forward pass


class _Idle(threading.local):
    def __init__(self) -> None:
        self.blocks: dict[tuple[int, torch.dtype], list[Tensor]] = {}


_idle = _Idle()


class Blocks:
    """Large tensors that one call needs until its end, taken over from the last call of the same thread.

    On a CPU only: a CUDA device's memory is kept by torch. Calls of other shapes find nothing that fits, and
    what the last call left is let go before they take more.

    Args:
        budget: bytes; a call that takes more leaves nothing.
    """

    def __init__(self, budget: int = _LIMIT) -> None:
        self._budget = min(budget, _LIMIT)
        self._idle = _idle.blocks  # of this thread; autograd may call `take` in another
        self._taken: list[Tensor] = []

    def take(self, rows: int, width: int, like: Tensor) -> Tensor:
        """Return a matrix (rows, width) of the dtype and device of `like`, with anything in it."""
        if not like.is_cpu:
            return like.new_empty((rows, width))
        fitting = self._idle.get((rows * width, like.dtype))
        if not fitting:
            self._idle.clear()
        block = fitting.pop() if fitting else like.new_empty(rows * width)
        self._taken.append(block)
        return block.view(rows, width)

    def leave(self) -> None:
        """Leave the blocks to the next call. Nothing may use them any more."""
        self._idle.clear()
        if sum(block.nbytes for block in self._taken) <= self._budget:
            for block in self._taken:
                self._idle.setdefault((block.numel(), block.dtype), []).append(block)
        self._taken.clear()


def retain_freed_memory() -> bool:
    """Tell glibc's allocator to keep large freed blocks; returns whether that was possible.

    By default it gives memory back to the system after every step, and each page fetched again costs a
    fault: measured 5 to 10 % of a step on the CPU, with and without per-example gradients. A setting of the
    whole process, for programs to make (the `fedsim` command and Flower's nodes do); the engine itself never
    does. Resident memory then stays at its peak.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def let_go() -> None:
    """Free what the last call of this thread left to the next: before memory is measured."""
    _idle.blocks.clear()


def give_back_freed_memory() -> None:
    """`let_go`, and return what the allocator holds to the system, where it is glibc's."""
    let_go()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
