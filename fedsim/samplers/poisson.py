"""Poisson sampling: every unit in every step with the same probability, independently of all else.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", section 3; accounted as in Mironov,
Talwar, Zhang 2019, "Renyi Differential Privacy of the Sampled Gaussian Mechanism".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.samplers import SAMPLERS
from fedsim.samplers.base import Draw, Participation, Sampler
from fedsim.samplers.keyed import PoissonSampler


@SAMPLERS.register("poisson")
@dataclass(frozen=True)
class Poisson(Sampler):
    """Every unit with the same probability, whatever else is drawn; at probability 1 the full batch."""

    def participation(self, share: float, batch: float, units: int) -> Participation:
        """See `Sampler.participation`."""
        return Participation(period=1, rate=share, separation=1, share=share)

    def selected(self, draw: Draw, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """See `Sampler.selected`."""
        return PoissonSampler(draw.share, max(1, len(ids))).included(ids, draw.keys["draw"])
