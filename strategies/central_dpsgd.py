"""Central DP-SGD over data holders: exactly centralized DP-SGD, with the data left where it is.

Who is trusted: the server, with the exact sum of clipped gradients (it adds the noise); holders do not
trust each other. What is sent: one sum of clipped per-example gradients a node and step. Where noise is
added: once, at the server, on the sum over all holders. Unit: example (add or remove one).
Event: Poisson-sampled Gaussian, one a step, of the step's own noise multiplier where
privacy.noise_schedule changes it over the run. Dropout policy: a node that fails is asked once more with
the same keys; then the run stops, because a sum without it would not be the mechanism that was accounted.
Holders that are offline by the availability model are ordinary: they contribute nothing to that step, the
noise stays full, and accounting them as present is an upper bound (fedsim.sampling).

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedsim.noise.gaussian import GaussianNoise
from fedsim.privacy.budget import within_budget
from fedsim.privacy.family import EventFamily
from fedsim.privacy.levels import NoiseLevels
from fedsim.sampling import sampling_rate
from fedsim.seeds import Root
from fedsim.strategies.base import DataFacts, Plan, Strategy


@dataclass(frozen=True)
class Options:
    """central_dpsgd has no options of its own."""


class CentralDPSGD(Strategy[Options]):
    Options = Options
    private = True
    trusted = "server (sees the exact sum)"
    sent = "sum of clipped per-example gradients"
    noise_added = "server, once, on the sum"
    dropout_policy = "ask once more with the same keys, then stop"

    def plan(self, facts: DataFacts) -> Plan:
        train, federation = self.config.train, self.config.federation
        rate = sampling_rate(train.expected_batch_size, facts.examples, federation.availability)
        schedule = self.config.privacy.noise_schedule
        levels = NoiseLevels(tuple(schedule), train.steps) if schedule else None
        budget = within_budget(self.config.privacy, EventFamily.gaussian(rate, levels), train.steps)
        clip = self.clip_rule()
        return Plan(
            unit="example",
            sampling_rate=rate,
            divisor=train.expected_batch_size,
            clip=clip,
            noise=GaussianNoise(budget.noise_multiplier, clip.sensitivity),
            budget=budget,
        )

    def noise(self, plan: Plan, root: Root, step: int, count: int) -> NDArray[np.float64] | None:
        assert plan.noise is not None
        factor = plan.noise_factor(step)
        noise = (
            plan.noise
            if factor == 1.0
            else replace(plan.noise, noise_multiplier=plan.noise.noise_multiplier * factor)
        )
        return noise.sample(root, step, count)


STRATEGY = CentralDPSGD
