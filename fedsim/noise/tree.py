"""Tree aggregation: noisy sums over dyadic intervals of a cycle, for a guarantee without sampling.

One release a cycle, of noise over bound * sqrt(levels), the sensitivity of the whole tree. Under `passes`
that is DP-FTRL: one Gaussian release a pass, without amplification. A cycle that the run cuts short counts as
a whole one. A holder with m examples moves a tree by at most m times as much, in whichever steps they fall,
so the same event bounds it.

Source: Kairouz, McMahan, Song, Thakkar, Thakurta, Xu 2021, "Practical and private (deep) learning without
sampling or shuffling", Algorithm 1 and Appendix D (restarts); Honaker 2015 (estimates by inverse variance).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from fedsim import seeds, validate
from fedsim.noise import NOISE
from fedsim.noise.gaussian import standard_normal
from fedsim.noise.over_time import NoiseOverTime
from fedsim.noise.stream import Array
from fedsim.samplers import Participation


@NOISE.register("tree")
@dataclass(frozen=True)
class Tree(NoiseOverTime):
    """Increments of a binary tree's noisy prefix sums, with a new tree for every cycle of the sampler."""

    correlated = True
    said = "correlated over the steps of a pass"

    def check(self, participation: Participation, steps: int) -> None:
        """See `NoiseOverTime.check`: a unit must be in one step of a tree at most."""
        if participation.period == 1 and participation.rate < 1.0:
            validate.conflicts(
                "noise.name=tree correlates the noise of the steps of a cycle, in which a unit may take part "
                "once; with this sampler it can take part in every step.",
                "Use sampler=passes or cyclic, or noise=independent.",
            )

    def factorisation(self, participation: Participation, steps: int) -> TreeAggregation:
        """See `NoiseOverTime.factorisation`."""
        return TreeAggregation(participation.period)


@dataclass(frozen=True)
class TreeAggregation:
    """Noisy sums over the dyadic intervals of a pass; prefix sums are put together from them.

    With every step, all intervals of 2**level steps that end there are noised (level 0 is the step
    itself). An interval's estimate combines its own noise with that of its two halves, by inverse variance
    (Honaker 2015, the part that can be done online). The prefix sum up to step t adds one estimate for
    every binary digit of t + 1.

    Attributes:
        restart_every: steps of a pass, after which a new tree begins.
    """

    restart_every: int

    def __post_init__(self) -> None:
        validate.positive(self.restart_every, "restart_every")

    def column_norm(self, steps: int) -> float:
        """Return sqrt(levels), the column norm of a step that lies in one interval of every level.

        Holds for one participation in every pass of `restart_every` steps; `steps` is the whole run, of
        which a pass may be cut short.
        """
        return math.sqrt(min(self.restart_every, steps).bit_length())

    def factors(self, steps: int) -> tuple[Array, Array]:
        """Return (C, M); rows of C and columns of M are intervals, by last step, then by level."""
        intervals = [(t, level) for t in range(steps) for level in range(self._levels_ending(t))]
        index = {interval: i for i, interval in enumerate(intervals)}
        encoder = np.zeros((len(intervals), steps))
        estimates = np.zeros((len(intervals), len(intervals)))
        for i, (t, level) in enumerate(intervals):
            encoder[i, t - (1 << level) + 1 : t + 1] = 1.0
            own, halves = _weights(level)
            estimates[i, i] = own
            if level:
                left, right = index[(t - (1 << level - 1), level - 1)], index[(t, level - 1)]
                estimates[i] += halves * (estimates[left] + estimates[right])
        prefixes = np.zeros((steps, len(intervals)))
        increments = np.zeros((steps, len(intervals)))
        for t in range(steps):
            local = t % self.restart_every
            top = self._levels_ending(t) - 1
            prefixes[t] = estimates[index[(t, top)]]
            before = local + 1 - (1 << top)  # steps of the pass before that interval
            if before:
                prefixes[t] += prefixes[t - (1 << top)]
            increments[t] = prefixes[t] - (prefixes[t - 1] if local else 0.0)
        return encoder, increments

    def first_needed(self, step: int) -> int:
        """Return the first step of the pass: a new tree forgets the one before."""
        return step - step % self.restart_every

    def rows(self, step: int) -> int:
        """Return the number of intervals that make up the steps done: at most log2(restart_every) + 1."""
        return (step % self.restart_every).bit_count()

    def advance(
        self, memory: list[Array], root: seeds.Root, step: int, count: int
    ) -> tuple[Array, list[Array]]:
        """Return the step's noise and the estimates of the intervals of the steps so far, longest first.

        The prefix noise is the sum of these estimates, so its increment is the new one minus those it
        replaces. Two normal vectors a step on average.
        """
        top = self._levels_ending(step) - 1
        kept, replaced = memory[: len(memory) - top], memory[len(memory) - top :]
        estimate = standard_normal(seeds.derive(root, "noise", step, 0), count)
        for level, left in enumerate(reversed(replaced), start=1):
            own, halves = _weights(level)
            estimate += left
            estimate *= halves
            estimate += own * standard_normal(seeds.derive(root, "noise", step, level), count)
        noise = estimate.copy()
        for left in replaced:
            noise -= left
        ended = (step + 1) % self.restart_every == 0
        return noise, [] if ended else [*kept, estimate]

    def _levels_ending(self, step: int) -> int:
        """Return how many intervals end with this step: one and one for every factor 2 of its number."""
        number = step % self.restart_every + 1
        return (number & -number).bit_length()


@functools.lru_cache(maxsize=64)
def _weights(level: int) -> tuple[float, float]:
    """Return the weights of an interval's own noise and of the sum of its halves' estimates.

    With v the variance of a half's estimate, inverse-variance weighting gives v' = 1 / (1 + 1 / (2 v)),
    weight v' for the own value and v' / (2 v) for the halves.
    """
    variance = 1.0
    own, halves = 1.0, 0.0
    for _ in range(level):
        own = 2.0 * variance / (2.0 * variance + 1.0)
        halves = own / (2.0 * variance)
        variance = own
    return own, halves
