"""Fixed-size sampling: every step takes exactly so many units, all subsets equally likely.

The units with the smallest words of the step's key stream are drawn: who they are depends on the key and the
number of units alone, so every node finds its own part. Neighbouring data sets have the same number of units,
one of them replaced, and replacing one moves a sum by twice the bound on a contribution: at equal noise this
is weaker than Poisson sampling, and what batches of one size are worth.

Source: Wang, Balle, Kasiviswanathan 2019, "Subsampled Renyi Differential Privacy and Analytical Moments
Accountant"; why no tighter accountant answers: Lebeda et al. 2024 (fedsim.privacy.events).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds, validate
from fedsim.config import Config
from fedsim.samplers import SAMPLERS
from fedsim.samplers.base import Draw, Participation, Sampler


@SAMPLERS.register("fixed_size")
@dataclass(frozen=True)
class FixedSize(Sampler):
    """Exactly so many units in every step, without replacement; what is protected is which unit it is."""

    def check(self, config: Config) -> None:
        """See `Sampler.check`: who is offline would make the draw smaller."""
        if config.federation.availability < 1.0:
            validate.conflicts(
                "sampler=fixed_size takes exactly so many units in a step, but with federation.availability "
                f"{config.federation.availability:g} some of them are offline.",
                "Use sampler=poisson, or federation.availability=1.",
            )

    def participation(self, share: float, batch: float, units: int) -> Participation:
        """See `Sampler.participation`."""
        sample = round(share * units)
        if sample < 1 or abs(sample - share * units) > 1e-6:
            validate.conflicts(
                f"sampler=fixed_size must take a whole number of the {units} units in a step, but "
                f"train.expected_batch_size {batch:g} stands for {share * units:g} of them.",
                f"Set train.expected_batch_size to {batch * max(1, sample) / (share * units):g}.",
            )
        rate = sample / units
        return Participation(period=1, rate=rate, separation=1, share=rate, sample=(units, sample))

    def selected(self, draw: Draw, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """See `Sampler.selected`."""
        sample = round(draw.share * draw.population)
        return _taken(draw.keys["draw"], draw.population, sample)[ids]


@functools.lru_cache(maxsize=4)
def _taken(key: bytes, population: int, sample: int) -> NDArray[np.bool_]:
    """Say of every unit whether it is among the `sample` with the smallest words, (population,)."""
    words = seeds.words(key, 0, population)
    taken = np.zeros(population, dtype=np.bool_)
    taken[np.argsort(words, kind="stable")[:sample]] = True
    taken.flags.writeable = False
    return taken
