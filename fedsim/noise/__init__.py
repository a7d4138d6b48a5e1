"""How the noise of the steps of a run hangs together, one way a file; and the noise itself."""

from __future__ import annotations

from fedsim.noise.over_time import NoiseOverTime
from fedsim.registry import Registry

__all__ = ["NOISE", "NoiseOverTime"]

NOISE: Registry[NoiseOverTime] = Registry("noise.name", "fedsim.noise", NoiseOverTime)
