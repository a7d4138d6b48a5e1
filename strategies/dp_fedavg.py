"""DP-FedAvg: holders train locally, send a clipped update, and a whole holder is what is protected.

Who is trusted: the server, with the exact sum of clipped updates. What is sent: one sum of clipped updates
a node and step. Where noise is added: once, at the server, on the sum; with adaptive clipping also on the
count of updates below the clip norm. Unit: holder (add or remove one with all of its examples).
Event: Poisson-sampled Gaussian over holders, one a step. Dropout policy: as central_dpsgd.

Each holder takes part with probability q = expected_batch_size / N, trains `local_epochs` passes, and its
update counts once whatever its size: weighting by examples would multiply its sensitivity. The sum is
divided by the expected number of holders, q x holders. Server optimizers make FedAvg (sgd, learning rate
1), FedAvgM (momentum) and FedAdam (adam) of it.

Adaptive clipping moves the clip norm towards a quantile of the update norms by a noisy count, b of n below
it (geometric update). Its privacy is inside the stated noise multiplier z: the sum gets multiplier
(z^-2 - (2 s)^-2)^(-1/2) for count noise s, and both together are one Gaussian release of multiplier z.

An example's own epsilon is bounded through its holder: changing it changes one clipped update, by at most
twice the clip norm, so it is that of half the noise multiplier at the same sampling.

Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", Algorithm 1;
Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", Algorithm 1 and Theorem 1;
Reddi et al. 2021, "Adaptive Federated Optimization".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import validate
from fedsim.config import Config
from fedsim.grads import clip as clips
from fedsim.grads.local_training import LocalTraining
from fedsim.noise.gaussian import GaussianNoise, standard_normal
from fedsim.privacy.budget import within_budget
from fedsim.privacy.family import EventFamily
from fedsim.rules import SET, read_with
from fedsim.sampling import sampling_rate
from fedsim.seeds import Root, derive
from fedsim.strategies.base import (
    ENGINE_SETTINGS,
    Ask,
    DataFacts,
    NodeView,
    Plan,
    Strategy,
    drawn_holders,
    sum_of_updates,
)
from fedsim.types import ClippedSum, HolderReply, StepTask


@dataclass(frozen=True)
class FedAvgOptions:
    """Local training, and adaptive clipping when `target_quantile` is set.

    Attributes:
        local_epochs, local_batch_size, local_learning_rate: see `LocalTraining`.
        target_quantile: share of updates that the clip norm should leave unclipped; None: fixed clip norm.
        quantile_learning_rate: step of the geometric update of the clip norm.
        count_noise: standard deviation s of the noise on the count; None: a twentieth of the expected
            number of holders, at least 1.
        weighting: "equal"; "examples", the weights of non-private FedAvg, is refused with the reason.
    """

    local_epochs: int = 1
    local_batch_size: int = 32
    local_learning_rate: float = 0.1
    target_quantile: float | None = None
    quantile_learning_rate: float = field(default=0.2, metadata=read_with(target_quantile=SET))
    count_noise: float | None = None
    weighting: str = "equal"


class DPFedAvg(Strategy[FedAvgOptions]):
    Options = FedAvgOptions
    private = True
    trusted = "server (sees the exact sum)"
    sent = "sum of clipped holder updates"
    noise_added = "server, once, on the sum"
    dropout_policy = "ask once more with the same keys, then stop"

    def __init__(self, config: Config, options: FedAvgOptions) -> None:
        super().__init__(config, options)
        self._clip_norm = float(config.privacy.clip_norm)
        self._centred_count = 0.0
        self.local = LocalTraining(
            options.local_epochs, options.local_batch_size, options.local_learning_rate
        )

    def unread(self) -> tuple[str, ...]:
        return ENGINE_SETTINGS

    def clip_rule(self) -> clips.ClipRule:
        return clips.FlatClip(self._clip_norm)

    def plan(self, facts: DataFacts) -> Plan:
        train, privacy = self.config.train, self.config.privacy
        self.local.check("strategy.options")
        self._check_options()
        if train.augment_multiplicity > 1 or train.augmentations:
            validate.conflicts(
                "dp_fedavg trains on plain examples, but views or augmentations are set.",
                "Set train.augment_multiplicity=1 and train.augmentations=[].",
            )
        if privacy.clipping != "flat":
            validate.conflicts(
                f"dp_fedavg clips updates flat, got privacy.clipping={privacy.clipping}: what it clips is a "
                "holder's whole update, one vector, whose norm the adaptive clip norm follows.",
                "Use flat.",
            )
        rate = sampling_rate(train.expected_batch_size, facts.examples, self.config.federation.availability)
        budget = within_budget(privacy, EventFamily.gaussian(rate), train.steps)
        expected_holders = rate * facts.holders * self.config.federation.availability
        noise = GaussianNoise(
            self._sum_multiplier(budget.noise_multiplier, expected_holders), self._clip_norm
        )
        return Plan(
            unit="holder",
            sampling_rate=rate,
            divisor=expected_holders,
            clip=self.clip_rule(),
            noise=noise,
            budget=budget,
            example_noise_factor=0.5,
        )

    def _check_options(self) -> None:
        """Refuse what would have no event, or no effect."""
        options = self.options
        if options.weighting == "examples":
            validate.conflicts(
                "strategy.options.weighting=examples: weighting updates by example count multiplies the "
                "sensitivity by the largest holder's size, and the weights themselves are private.",
                "Use equal; a holder then counts once whatever its size.",
            )
        validate.one_of(options.weighting, ("equal",), "strategy.options.weighting")
        if options.count_noise is None:
            return
        if options.target_quantile is None:
            validate.conflicts(
                "strategy.options.count_noise is the noise of adaptive clipping, which is off.",
                "Set target_quantile too, or count_noise to null.",
            )
        if options.count_noise == 0.0:
            validate.conflicts(
                "strategy.options.count_noise is 0: adaptive clipping would release an exact count, which no "
                "event covers.",
                "Raise it, or leave it null.",
            )

    def _sum_multiplier(self, total: float, expected_holders: float) -> float:
        """Return the multiplier of the sum's noise, so that sum and count together are one of `total`."""
        if self.options.target_quantile is None:
            return total
        validate.in_range(self.options.target_quantile, 0.0, 1.0, "strategy.options.target_quantile")
        validate.positive(self.options.quantile_learning_rate, "strategy.options.quantile_learning_rate")
        count_noise = self._count_noise(expected_holders)
        validate.positive(count_noise, "strategy.options.count_noise")
        left = total**-2 - (2 * count_noise) ** -2
        if left <= 0:
            validate.conflicts(
                f"strategy.options.count_noise {count_noise:g} alone spends more than the noise multiplier "
                f"{total:.4g} allows.",
                f"Raise count_noise above {total / 2:.4g}.",
            )
        return left**-0.5

    def _count_noise(self, expected_holders: float) -> float:
        given = self.options.count_noise
        return max(1.0, expected_holders / 20) if given is None else given

    def answer(self, node: NodeView, task: StepTask) -> tuple[dict[str, NDArray[Any]], ClippedSum]:
        """Train at every drawn holder of the node, clip each update, add them up."""
        clip = clips.FlatClip(float(task.arrays["clip_norm"][0]))
        result = sum_of_updates(node, task, clip, self.local)
        below = float((result.norms <= clip.clip_norm).sum())
        return {"sum": result.sum.cpu().numpy(), "below": np.array([below])}, result

    def reply_arrays(
        self, reply: HolderReply, parameters: int, dtype: np.dtype[Any]
    ) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        return {"sum": ((parameters,), dtype), "below": ((1,), np.dtype(np.float64))}

    def counted_at_most(self, task: StepTask, holders: NDArray[np.int64], ids: NDArray[np.int64]) -> int:
        return drawn_holders(task, holders)

    def problem_with(self, reply: HolderReply) -> str:
        below = float(reply.arrays["below"][0])
        if below.is_integer() and 0 <= below <= reply.count:
            return ""
        return f"{below:g} of {reply.count} updates are said to be below the clip norm"

    def norm_bound(self, plan: Plan, reply: HolderReply) -> float:
        return reply.count * self._clip_norm

    def collect(self, plan: Plan, ask: Ask) -> tuple[NDArray[np.float64], list[HolderReply]]:
        replies = ask("", {"clip_norm": np.array([self._clip_norm])})
        self._centred_count = float(sum(r.arrays["below"][0] - r.count / 2 for r in replies))
        total = np.zeros_like(replies[0].arrays["sum"], dtype=np.float64)
        for reply in replies:
            total += reply.arrays["sum"]
        return total, replies

    def noise(self, plan: Plan, root: Root, step: int, count: int) -> NDArray[np.float64] | None:
        """Return the noise at the step's clip norm, and move the clip norm for the next step."""
        assert plan.noise is not None
        noise = GaussianNoise(plan.noise.noise_multiplier, self._clip_norm).sample(root, step, count)
        if self.options.target_quantile is not None:
            # The count is centred, which halves its sensitivity to 1/2 (Andrew et al. 2021, Algorithm 1); the
            # expected number of holders, which is public, stands for the drawn one in the division.
            drawn = float(standard_normal(derive(root, "quantile", step), 1)[0])
            share = 0.5 + (self._centred_count + self._count_noise(plan.divisor) * drawn) / plan.divisor
            share = min(max(share, 0.0), 1.0)  # what a share can be: noise alone then moves it a step at most
            step_size = self.options.quantile_learning_rate
            self._clip_norm *= math.exp(-step_size * (share - self.options.target_quantile))
        return noise

    def noiseless_form(self) -> list[str]:
        options = {"algorithm": "fedavg"} | {
            f"local_{name}": value for name, value in dataclasses.asdict(self.local).items()
        }
        return [*super().noiseless_form(), *(f"strategy.options.{k}={v}" for k, v in options.items())]

    def state_dict(self) -> dict[str, Tensor]:
        return {"clip_norm": torch.tensor([self._clip_norm], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._clip_norm = float(state["clip_norm"][0])


STRATEGY = DPFedAvg
