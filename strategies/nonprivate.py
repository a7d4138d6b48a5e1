"""What privacy costs, measured: the path of `central_dpsgd` (or of `dp_fedavg`) without clipping and noise.

Who is trusted: everyone. What is sent: the sum of per-example gradients, or of holder updates, a node and
step. Noise: none. Event: non-private, so no epsilon is claimed. Dropout policy: as `central_dpsgd`. Same
draws as the private strategies; nothing else differs.

Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
FedSGD and FedAvg, with Poisson-sampled examples or holders and without weighting by size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.config import Config
from fedsim.grads import clip as clips
from fedsim.grads.local_training import LocalTraining
from fedsim.privacy.budget import without_privacy
from fedsim.rules import read_with
from fedsim.sampling import sampling_rate
from fedsim.seeds import Root
from fedsim.strategies.base import (
    ENGINE_SETTINGS,
    DataFacts,
    NodeView,
    Plan,
    Strategy,
    drawn_holders,
    sum_of_updates,
)
from fedsim.types import ClippedSum, StepTask


@dataclass(frozen=True)
class BaselineOptions:
    """fedsgd: per-example gradients of drawn examples. fedavg: local training at drawn holders.

    `local_epochs`, `local_batch_size` and `local_learning_rate` are those of fedavg, see `LocalTraining`.
    """

    algorithm: str = "fedsgd"
    local_epochs: int = field(default=1, metadata=read_with(algorithm=("fedavg",)))
    local_batch_size: int = field(default=32, metadata=read_with(algorithm=("fedavg",)))
    local_learning_rate: float = field(default=0.1, metadata=read_with(algorithm=("fedavg",)))


class NonPrivate(Strategy[BaselineOptions]):
    Options = BaselineOptions
    private = False
    trusted = "everyone"
    sent = "sum of per-example gradients"
    noise_added = "none"
    dropout_policy = "ask once more with the same keys, then stop"

    def unread(self) -> tuple[str, ...]:
        clipping = ("privacy.clip_norm", "privacy.clipping", "privacy.clip_groups")
        if self.options.algorithm == "fedsgd":
            return clipping
        return *clipping, *ENGINE_SETTINGS, "train.augment_multiplicity", "train.augmentations"

    def clip_rule(self) -> clips.ClipRule:
        return clips.NoClip()

    def __init__(self, config: Config, options: BaselineOptions) -> None:
        super().__init__(config, options)
        self.local = LocalTraining(
            options.local_epochs, options.local_batch_size, options.local_learning_rate
        )

    def answer(self, node: NodeView, task: StepTask) -> tuple[dict[str, NDArray[Any]], ClippedSum]:
        if self.options.algorithm == "fedsgd":
            return super().answer(node, task)
        result = sum_of_updates(node, task, self.clip_rule(), self.local)
        return {"sum": result.sum.cpu().numpy()}, result

    def counted_at_most(self, task: StepTask, holders: NDArray[np.int64], ids: NDArray[np.int64]) -> int:
        if self.options.algorithm == "fedsgd":
            return super().counted_at_most(task, holders, ids)
        return drawn_holders(task, holders)

    def plan(self, facts: DataFacts) -> Plan:
        privacy, train, federation = self.config.privacy, self.config.train, self.config.federation
        validate.one_of(self.options.algorithm, ("fedsgd", "fedavg"), "strategy.options.algorithm")
        self.local.check("strategy.options")
        for value, name in (
            (privacy.target_epsilon, "target_epsilon"),
            (privacy.noise_multiplier, "noise_multiplier"),
            (privacy.stop_at_epsilon, "stop_at_epsilon"),
        ):
            if value is not None:
                validate.conflicts(
                    f"strategy nonprivate has no noise, but privacy.{name} is {value}.",
                    f"Set privacy.{name}=null, or use strategy.name=central_dpsgd.",
                )
        if privacy.noise_schedule:
            validate.conflicts(
                "strategy nonprivate has no noise, but privacy.noise_schedule is set.",
                "Set privacy.noise_schedule=[], or use strategy.name=central_dpsgd.",
            )
        rate = sampling_rate(train.expected_batch_size, facts.examples, federation.availability)
        by_holder = self.options.algorithm == "fedavg"
        return Plan(
            unit="holder" if by_holder else "example",
            sampling_rate=rate,
            divisor=rate * facts.holders * federation.availability
            if by_holder
            else train.expected_batch_size,
            clip=self.clip_rule(),
            noise=None,
            budget=without_privacy(train.steps),
        )

    def noise(self, plan: Plan, root: Root, step: int, count: int) -> NDArray[np.float64] | None:
        return None


STRATEGY = NonPrivate
