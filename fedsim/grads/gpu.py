"""Where the engine works differently on a GPU.

There, launches and waiting for the device cost, and products of many small matrices do not. What differs asks
`on`, so that a machine without a GPU can go the same ways (tests/equivalence/test_gpu_ways.py).
"""

from __future__ import annotations

from torch import Tensor


def on(tensor: Tensor) -> bool:
    """Whether `tensor` is to be worked on as GPUs want it."""
    return tensor.is_cuda
