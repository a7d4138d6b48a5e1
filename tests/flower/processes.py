"""The processes of a launch of Flower's simulation."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil

from fedsim.flower.launch import ADOPTED


def adopted() -> list[tuple[str, psutil.Process]]:
    """Every process of any launch, with the launch's mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if (mark := process.environ().get(ADOPTED)) and process.pid != os.getpid():
                found.append((mark, process))
        except psutil.Error:
            continue
    return found


def strays() -> list[str]:
    """Processes of any launch that are still there."""
    found = []
    for _, process in adopted():
        with suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found
