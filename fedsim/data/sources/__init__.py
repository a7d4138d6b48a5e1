"""Where examples come from, one file a source."""

from __future__ import annotations

from fedsim.data.sources.base import Source, adapted
from fedsim.registry import Registry

__all__ = ["SOURCES", "Source"]

SOURCES: Registry[Source] = Registry("data.name", "fedsim.data.sources", Source, adapted)
