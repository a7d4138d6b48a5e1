"""Numbers of the host as tensors on a device, kept: a GPU is waited for when it is sent one."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=128)
def spread(
    values: tuple[float, ...], counts: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a tensor (sum of `counts`,) with each of `values` so many times. Nobody may write into it."""
    each = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
    return torch.tensor(each, dtype=dtype, device=device)
