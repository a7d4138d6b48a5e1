"""DP-FTRL: tree-aggregated noise, private without any sampling assumption.

Who is trusted: the server, with the exact sum of clipped gradients. What is sent: one sum of clipped
per-example gradients a node and step. Where noise is added: at the server, on the sum: the increments of a
binary tree's noisy prefix sums, with a new tree for every pass (fedsim.noise.correlated.TreeAggregation).
Dropout policy: as `central_dpsgd`: ask once more with the same keys, then stop. Holders that are offline by
the availability model miss their examples' step of the pass; that loses data, never privacy.

Participation: a pass has round(N / expected_batch_size) steps, and a key of the pass throws every example
into exactly one of them. That an example takes part at most once a pass is all the guarantee needs; who
takes part when may be known to everybody. The size of a batch is random, the divisor is public.

Unit: example (add or remove one; nobody else's step changes with it). Event: one Gaussian release a pass,
without amplification; the noise multiplier is the noise over clip norm * sqrt(levels), the sensitivity of
the whole tree. A pass that the run cuts short counts as a whole one. Momentum and adaptive steps come from
the server optimizer and are post-processing. A holder with m examples moves a tree by at most m times as
much, in whichever steps they fall, so the same event bounds it.

Source: Kairouz, McMahan, Song, Thakkar, Thakurta, Xu 2021, "Practical and private (deep) learning without
sampling or shuffling", Algorithm 1 and Appendix D (restarts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim import validate
from fedsim.config import Config
from fedsim.noise.correlated import Stream, TreeAggregation, in_bin
from fedsim.noise.gaussian import GaussianNoise
from fedsim.privacy import events
from fedsim.privacy.budget import within_budget
from fedsim.privacy.family import EventFamily
from fedsim.sampling import sampling_rate
from fedsim.seeds import Root, derive
from fedsim.strategies.base import DataFacts, Plan, Strategy
from fedsim.types import StepTask

MISMATCH = 0.1  # largest relative difference between expected_batch_size and the mean batch of whole passes


@dataclass(frozen=True)
class TreeOptions:
    """dp_ftrl has no options of its own: the batch determines the pass."""


class DPFTRL(Strategy[TreeOptions]):
    Options = TreeOptions
    private = True
    trusted = "server (sees the exact sum)"
    sent = "sum of clipped per-example gradients"
    noise_added = "server, once, on the sum; correlated over the steps of a pass"
    dropout_policy = "ask once more with the same keys, then stop"

    def __init__(self, config: Config, options: TreeOptions) -> None:
        super().__init__(config, options)
        self._stream = Stream()

    def plan(self, facts: DataFacts) -> Plan:
        train, availability = self.config.train, self.config.federation.availability
        rate = sampling_rate(train.expected_batch_size, facts.examples, availability)
        restart_every = round(1.0 / rate)
        whole = facts.examples * availability / restart_every
        if abs(whole / train.expected_batch_size - 1.0) > MISMATCH:
            validate.conflicts(
                f"train.expected_batch_size {train.expected_batch_size:g} does not divide the "
                f"{facts.examples * availability:g} examples of a pass: {restart_every} steps have "
                f"{whole:g} each on average.",
                f"Set train.expected_batch_size to {whole:g}.",
            )
        family = EventFamily(lambda sigma: events.gaussian_step(sigma, 1.0), restart_every)
        budget = within_budget(self.config.privacy, family, train.steps)
        clip = self.clip_rule()
        column_norm = TreeAggregation(restart_every).column_norm(train.steps)
        return Plan(
            unit="example",
            sampling_rate=1.0 / restart_every,
            divisor=train.expected_batch_size,
            clip=clip,
            noise=GaussianNoise(budget.noise_multiplier, clip.sensitivity * column_norm),
            budget=budget,
        )

    def keys(self, root: Root, step: int) -> dict[str, bytes]:
        of_step = super().keys(root, step)
        del of_step["draw"]  # nothing is drawn: the passes' key says who takes part when
        return of_step | {"passes": derive(root, "passes")}

    def selected(self, task: StepTask, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        restart_every = round(1.0 / task.sampling_rate)
        number, place = divmod(task.step, restart_every)
        return in_bin(ids, derive(task.keys["passes"], "pass", number), place, restart_every)

    def noise(self, plan: Plan, root: Root, step: int, count: int) -> NDArray[np.float64] | None:
        assert plan.noise is not None
        values = self._stream.sample(TreeAggregation(plan.budget.family.period), root, step, count)
        values *= plan.noise.noise_std
        return values

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tree's current noise vectors; nothing under secure noise, where a resumed run makes
        them again from its secret: a checkpoint must not hold noise that was added to a released sum."""
        return {} if self.config.privacy.noise_source == "secure" else self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._stream.load_state_dict(state)


STRATEGY = DPFTRL
