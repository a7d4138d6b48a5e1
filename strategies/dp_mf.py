"""Banded matrix factorisation with cyclic Poisson sampling: correlated noise, amplified.

Who is trusted: the server, with the exact sum of clipped gradients. What is sent: one sum of clipped
per-example gradients a node and step. Where noise is added: at the server, on the sum; the noise of a step
takes back part of the noise of the `bands` - 1 steps before, so that the running sum of gradients is less
noisy than with independent noise (fedsim.noise.correlated.BandedToeplitz). Dropout policy: as
`central_dpsgd`: ask once more with the same keys, then stop.

Sampling: a keyed hash puts every example into one of `bands` groups for the whole run; step t draws from
group t mod bands only, each example with probability q * bands. The expected batch is that of
`central_dpsgd`; the hash looks at no data, and knowing it gives nothing away.

Unit: example (add or remove one). Event: an example can take part in every `bands`-th step only, where its
columns of the factor share no row: each cycle of `bands` steps is one Poisson-sampled Gaussian release at
rate q * bands (Choquette-Choo et al. 2023, amplification of banded matrices). Fewer, less amplified
releases: more bands cost amplification and buy correlation. With one band this is `central_dpsgd`, bit for
bit.

A holder with several examples takes part in several steps of a cycle, and columns of neighbouring cycles do
overlap. Split the noise into two independent halves of the variance, one for even and one for odd cycles:
cycles of one parity share no row, so each cycle is a release at noise multiplier sigma / sqrt(2) whose
shift, whatever its direction, is at most the number of the holder's examples that were drawn. That event
bounds the holder; adding the two halves is post-processing.

Source: Choquette-Choo, Ganesh, McKenna, McMahan, Rush, Thakurta, Xu 2023, "(Amplified) banded matrix
factorization: a unified approach to private training"; coefficients: McKenna 2024, "Scaling up the banded
matrix factorization mechanism for large scale differentially private ML".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim import validate
from fedsim.config import Config
from fedsim.noise.correlated import BandedToeplitz, Stream, in_bin, optimal_coefficients
from fedsim.noise.gaussian import GaussianNoise
from fedsim.privacy import events
from fedsim.privacy.budget import within_budget
from fedsim.privacy.family import EventFamily
from fedsim.sampling import PoissonSampler, sampling_rate
from fedsim.seeds import Root, derive
from fedsim.strategies.base import DataFacts, Plan, Strategy
from fedsim.types import StepTask


@dataclass(frozen=True)
class BandOptions:
    """Options of dp_mf.

    Attributes:
        bands: non-zero diagonals of the factor, groups of examples and steps of a cycle; 1 is central_dpsgd.
    """

    bands: int = 4


class DPMF(Strategy[BandOptions]):
    Options = BandOptions
    private = True
    trusted = "server (sees the exact sum)"
    sent = "sum of clipped per-example gradients"
    noise_added = "server, once, on the sum; correlated over steps"
    dropout_policy = "ask once more with the same keys, then stop"

    def __init__(self, config: Config, options: BandOptions) -> None:
        super().__init__(config, options)
        validate.positive(options.bands, "strategy.options.bands")
        self._stream = Stream()

    def mechanism(self) -> BandedToeplitz:
        """Return the factorisation; it depends on the number of configured steps and on bands alone."""
        return BandedToeplitz(optimal_coefficients(self.options.bands, self.config.train.steps))

    def plan(self, facts: DataFacts) -> Plan:
        train, bands = self.config.train, self.options.bands
        rate = sampling_rate(train.expected_batch_size, facts.examples, self.config.federation.availability)
        in_group = self._rate_in_group(rate)
        if rate * bands > 1.0 + 1e-12:
            validate.conflicts(
                f"strategy.options.bands {bands} with sampling rate {rate:.4g}: a step draws from one of "
                f"{bands} groups of the examples, each with probability {rate * bands:.4g}, above 1.",
                f"Lower strategy.options.bands to {math.floor(1.0 / rate)}, or train.expected_batch_size to "
                f"{train.expected_batch_size / (rate * bands):g} or less.",
            )
        family = EventFamily(lambda sigma: events.gaussian_step(sigma, in_group), bands)
        budget = within_budget(self.config.privacy, family, train.steps)
        clip = self.clip_rule()
        column_norm = self.mechanism().column_norm(train.steps)
        overlapping = bands > 1 and budget.steps > bands
        return Plan(
            unit="example",
            sampling_rate=rate,
            divisor=train.expected_batch_size,
            clip=clip,
            noise=GaussianNoise(budget.noise_multiplier, clip.sensitivity * column_norm),
            budget=budget,
            holder_noise_factor=math.sqrt(0.5) if overlapping else 1.0,
        )

    def keys(self, root: Root, step: int) -> dict[str, bytes]:
        return super().keys(root, step) | {"groups": derive(root, "groups")}

    def selected(self, task: StepTask, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        bands = self.options.bands
        drawn = PoissonSampler(self._rate_in_group(task.sampling_rate), max(1, len(ids)))
        return drawn.included(ids, task.keys["draw"]) & in_bin(
            ids, task.keys["groups"], task.step % bands, bands
        )

    def noise(self, plan: Plan, root: Root, step: int, count: int) -> NDArray[np.float64] | None:
        assert plan.noise is not None
        values = self._stream.sample(self.mechanism(), root, step, count)
        values *= plan.noise.noise_std
        return values

    def state_dict(self) -> dict[str, Tensor]:
        """Return the last noise vectors; nothing under secure noise, where a resumed run makes them again
        from its secret: a checkpoint must not hold noise that was added to a released sum."""
        return {} if self.config.privacy.noise_source == "secure" else self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._stream.load_state_dict(state)

    def _rate_in_group(self, rate: float) -> float:
        return min(1.0, rate * self.options.bands)


STRATEGY = DPMF
