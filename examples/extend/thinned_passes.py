"""A sampler: passes in a fresh order, in which a unit takes its one turn only with a certain chance.

A pass has `turns` steps. A key of the pass gives every unit one of them, and in that step the unit is drawn
with probability share * turns. `passes` draws everybody (no amplification), `cyclic` keeps the groups of a
pass for the whole run.

Guarantee: whose turn is when depends on no data and may be known to all. Given the turns, a unit moves one
sum of a pass at most, and there it is a Poisson draw: one Poisson-sampled Gaussian release a pass, at the
rate share * turns (add or remove one). Turns and draws of different passes have keys of their own, so passes
compose.
Source: Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization", section 4, with new groups a
pass.
"""

from dataclasses import dataclass

import fedsim
from fedsim.samplers import Participation, Sampler
from fedsim.samplers.keyed import PoissonSampler, in_bin
from fedsim.seeds import derive


@dataclass(frozen=True)
class ThinnedPasses(Sampler):
    """Every unit has one turn in a pass, and takes it with a chance.

    Attributes:
        turns: steps of a pass.
    """

    turns: int = 4

    def participation(self, share, batch, units):
        """What the event follows from: at most one participation in `turns` steps, with a chance."""
        rate = share * self.turns
        if not 1 <= self.turns <= 1 / share + 1e-9:
            raise fedsim.InputError(f"sampler.options.turns must be 1 .. {int(1 / share)}, got {self.turns}.")
        return Participation(period=self.turns, rate=min(1.0, rate), separation=1, share=share)

    def keys(self, root, step):
        """The draw's key, new in every step, and that of the turns, new in every pass."""
        return super().keys(root, step) | {"turns": derive(root, "turns", step // self.turns)}

    def selected(self, draw, ids):
        """Whose turn it is, and who of them is drawn: by keys and ids alone."""
        turn = in_bin(ids, draw.keys["turns"], draw.step % self.turns, self.turns)
        drawn = PoissonSampler(min(1.0, draw.share * self.turns), draw.population)
        return turn & drawn.included(ids, draw.keys["draw"])
