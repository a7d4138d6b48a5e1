"""Who takes part in a step, one way a file; and what of it an event depends on."""

from __future__ import annotations

from fedsim.registry import Registry
from fedsim.samplers.base import Draw, Participation, Sampler

__all__ = ["SAMPLERS", "Draw", "Participation", "Sampler"]

SAMPLERS: Registry[Sampler] = Registry("sampler.name", "fedsim.samplers", Sampler)
