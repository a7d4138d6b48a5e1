"""Products in the precision that was asked for, whatever the process is set to.

torch multiplies float32 with fewer bits where it is told to: by an autocast that is on, by
`torch.set_float32_matmul_precision`, and for convolutions on CUDA by default (TF32). The clip bound knows
only the roundings of the precision that was configured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_backends: Any = torch.backends  # its switches are not in torch's type stubs
_ON_CUDA = (_backends.cuda.matmul, _backends.cudnn.conv, _backends.cudnn.rnn)
_ON_CPU = (_backends.mkldnn.matmul, _backends.mkldnn.conv, _backends.mkldnn.rnn)


@contextmanager
def products(cuda: str) -> Iterator[None]:
    """Multiply float32 on CUDA in "ieee" or "tf32", and on the CPU in full.

    These are settings of the process: another thread that multiplies meanwhile is affected. Each has its old
    value afterwards.
    """
    wanted = [(switch, cuda) for switch in _ON_CUDA] + [(switch, "ieee") for switch in _ON_CPU]
    held = [(switch, switch.fp32_precision) for switch, _ in wanted]
    try:
        for switch, value in wanted:
            switch.fp32_precision = value
        yield
    finally:
        for switch, value in held:
            switch.fp32_precision = value


def off(device: str) -> torch.autocast:
    """No autocast on `device`."""
    return torch.autocast(device, enabled=False)


@contextmanager
def float32() -> Iterator[None]:
    """Multiply float32 in full, and let no autocast that happens to be on change a dtype."""
    with off("cpu"), off("cuda"), products("ieee"):
        yield
