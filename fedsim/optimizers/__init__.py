"""Update rules of the server, a few a file."""

from __future__ import annotations

from fedsim.optimizers.base import Optimizer
from fedsim.registry import Registry

__all__ = ["OPTIMIZERS", "Optimizer"]

OPTIMIZERS: Registry[Optimizer] = Registry("optimizer.name", "fedsim.optimizers", Optimizer)
