"""Trust models, one file each: who adds up, and who adds the noise."""

from __future__ import annotations

from fedsim.registry import Registry
from fedsim.strategies.base import Trust

__all__ = ["STRATEGIES", "Trust"]

STRATEGIES: Registry[Trust] = Registry("strategy.name", "fedsim.strategies", Trust)
