"""Passes over the data: every unit in exactly one step of each pass; nothing is left to chance but which.

A pass has round(1 / share) steps, and a key of the pass throws every unit into one of them. That a unit takes
part at most once a pass is all a guarantee needs; who takes part when may be known to everybody. The size of
a batch is random, the divisor of the sum is public.

Source: Kairouz, McMahan, Song, Thakkar, Thakurta, Xu 2021, "Practical and private (deep) learning without
sampling or shuffling", whose batches are consecutive; a keyed throw needs no order of the units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.samplers import SAMPLERS
from fedsim.samplers.base import Draw, Participation, Sampler
from fedsim.samplers.keyed import in_bin
from fedsim.seeds import Root, derive

MISMATCH = 0.1  # largest relative difference between the batch asked for and the mean batch of whole passes


@SAMPLERS.register("passes")
@dataclass(frozen=True)
class Passes(Sampler):
    """Every unit once in every pass over the data, without amplification by sampling."""

    def participation(self, share: float, batch: float, units: int) -> Participation:
        """See `Sampler.participation`."""
        steps = round(1.0 / share)
        whole = 1.0 / (steps * share)  # mean batch of whole passes / batch asked for
        if abs(whole - 1.0) > MISMATCH:
            validate.conflicts(
                f"train.expected_batch_size {batch:g} does not divide the {batch / share:g} examples of a "
                f"pass: {steps} steps have {batch * whole:g} each on average.",
                f"Set train.expected_batch_size to {batch * whole:g}.",
            )
        return Participation(period=steps, rate=1.0, separation=1, share=1.0 / steps)

    def keys(self, root: Root, step: int) -> dict[str, bytes]:
        """See `Sampler.keys`: nothing is drawn; the passes' key says who takes part when."""
        return {"passes": derive(root, "passes")}

    def selected(self, draw: Draw, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """See `Sampler.selected`."""
        steps = round(1.0 / draw.share)
        number, place = divmod(draw.step, steps)
        return in_bin(ids, derive(draw.keys["passes"], "pass", number), place, steps)
