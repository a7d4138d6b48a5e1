"""Holder updates: every drawn holder trains locally, and its clipped update counts once whatever its size.

Weighting by examples would multiply the sensitivity by the largest holder's size, and the weights themselves
are private. The protected unit is the holder with all of its examples. An example's own epsilon is bounded
through its holder: changing it changes one clipped update, by at most twice the clip norm, and is stated as
the event at half the noise multiplier: exact where all holders take part in every step; with sampled holders
each direction of a step is bounded so, and the composition of both is not proved to be.

With `target_quantile` the clip norm moves towards a quantile of the update norms, by a noised count of the
updates below it. The count is centred, each update adding 1/2 or -1/2, which halves its sensitivity to 1/2.
Sum and count are one Gaussian release of noise multiplier z: for noise of standard deviation s on the count,
the sum gets multiplier (z^-2 - (2 s)^-2)^(-1/2).

Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", Algorithm 1;
Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", Algorithm 1 and Theorem 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from fedsim import validate
from fedsim.clipping.base import ClipRule
from fedsim.clipping.flat import FlatClip
from fedsim.config import Config
from fedsim.grads.local_training import LocalTraining
from fedsim.queries import QUERIES
from fedsim.queries.base import Arrays, NodeView, Query, Shape, State
from fedsim.queries.statistic import Means, Part, Statistic
from fedsim.rules import ENGINE_SETTINGS, SET, read_with
from fedsim.types import ClippedSum, HolderReply, StepTask


@QUERIES.register("holder_update")
@dataclass(frozen=True)
class HolderUpdate(Query):
    """How far a holder's model moves by training on all of its examples, clipped; a holder is protected.

    Attributes:
        local_epochs: passes over the holder's examples.
        local_batch_size: examples of one local SGD step.
        local_learning_rate: of local SGD.
        target_quantile: share of updates that the clip norm should leave unclipped; None: fixed clip norm.
        quantile_learning_rate: step of the geometric update of the clip norm.
        count_noise: standard deviation s of the noise on the count; None: a twentieth of the expected
            number of holders, at least 1.
    """

    local_epochs: int = 1
    local_batch_size: int = 32
    local_learning_rate: float = 0.1
    target_quantile: float | None = None
    quantile_learning_rate: float = field(default=0.2, metadata=read_with(target_quantile=SET))
    count_noise: float | None = field(default=None, metadata=read_with(target_quantile=SET))

    unit = "holder"
    what = "holder updates"
    unread = (*ENGINE_SETTINGS, "train.augment_multiplicity", "train.augmentations")

    def __post_init__(self) -> None:
        self.local.check("query.options")
        if self.target_quantile is None:
            return
        validate.in_range(self.target_quantile, 0.0, 1.0, "query.options.target_quantile")
        validate.positive(self.quantile_learning_rate, "query.options.quantile_learning_rate")
        if self.count_noise is not None:
            validate.positive(self.count_noise, "query.options.count_noise (an exact count has no event)")

    @property
    def local(self) -> LocalTraining:
        """Return how a holder trains."""
        return LocalTraining(self.local_epochs, self.local_batch_size, self.local_learning_rate)

    @property
    def adaptive(self) -> bool:
        """See `Query.adaptive`."""
        return self.target_quantile is not None

    def check(self, config: Config) -> None:
        """See `Query.check`."""
        if (clipping := config.privacy.clipping.name) != "flat":
            validate.conflicts(
                f"query holder_update clips updates flat, got privacy.clipping={clipping}: "
                "what it clips is a holder's whole update, one vector, whose norm the clip norm may follow.",
                "Use flat.",
            )

    def statistic(self, shape: Shape, clip: ClipRule, state: State) -> Statistic:
        """See `Query.statistic`."""
        if not self.adaptive or not isinstance(clip, FlatClip):
            return Statistic((Part("sum", shape.parameters, shape.dtype, clip.sensitivity),))
        bound = float(state["clip_norm"][0])
        count = Part("below", 1, np.dtype(np.float64), 0.5, purpose="quantile")
        return Statistic((Part("sum", shape.parameters, shape.dtype, bound), count))

    def multipliers(self, noise_multiplier: float, expected_units: float) -> tuple[float, ...]:
        """See `Query.multipliers`.

        Raises:
            InputError: the count's noise leaves nothing of the budget.
        """
        if not self.adaptive:
            return (noise_multiplier,)
        noise = max(1.0, expected_units / 20) if self.count_noise is None else self.count_noise
        left = noise_multiplier**-2 - (2 * noise) ** -2
        if left <= 0:
            validate.conflicts(
                f"query.options.count_noise {noise:g} alone spends more than the noise multiplier "
                f"{noise_multiplier:.4g} allows.",
                f"Raise count_noise above {noise_multiplier / 2:.4g}.",
            )
        return left**-0.5, 2 * noise

    def sums(self, node: NodeView, task: StepTask, clip: ClipRule) -> tuple[Arrays, ClippedSum]:
        """See `Query.sums`: train at every drawn holder of the node, clip each update, add them up.

        An update that is not finite adds zero; count, norms and losses are over holders, ascending.
        """
        clip, drawn, total = _in_force(clip, task), node.drawn_holders(task), node.zero_sum()
        norms = torch.zeros(len(drawn), dtype=torch.float64)
        losses = torch.zeros(len(drawn), dtype=torch.float64)
        for place, holder in enumerate(drawn):
            update, losses[place] = node.local_update(int(holder), task, self.local)
            norms[place] = torch.linalg.vector_norm(update.double())
            if torch.isfinite(norms[place]):
                total += update * float(clip.coefficients(norms[place : place + 1]))
        result = ClippedSum(total, len(drawn), clip.sensitivity, norms, losses)
        arrays: Arrays = {"sum": result.sum.cpu().numpy()}
        if "clip_norm" in task.arrays:
            below = float((result.norms <= clip.sensitivity).sum())
            arrays["below"] = np.array([below - result.count / 2])
        return arrays, result

    def problem_with(self, reply: HolderReply) -> str:
        """See `Query.problem_with`."""
        if "below" not in reply.arrays:
            return ""
        below = float(reply.arrays["below"][0]) + reply.count / 2
        if below.is_integer() and 0 <= below <= reply.count:
            return ""
        return f"{below:g} of {reply.count} updates are said to be below the clip norm"

    def state(self, config: Config) -> State:
        """See `Query.state`: the clip norm, where it moves."""
        if not self.adaptive:
            return {}
        return {"clip_norm": torch.tensor([config.privacy.clip_norm], dtype=torch.float64)}

    def arrays(self, state: State) -> Arrays:
        """See `Query.arrays`."""
        return {name: value.numpy() for name, value in state.items()}

    def told_bytes(self, shape: Shape) -> int:
        """See `Query.told_bytes`."""
        return 8 if self.adaptive else 0

    def updated(self, state: State, means: Means) -> State:
        """See `Query.updated`: the expected number of holders, which is public, stands for the drawn one."""
        if "below" not in means.values:
            return state
        assert self.target_quantile is not None
        # A share is between 0 and 1: what noise makes of it moves the clip norm by one step at most.
        share = min(max(0.5 + float(means.values["below"][0]), 0.0), 1.0)
        factor = math.exp(-self.quantile_learning_rate * (share - self.target_quantile))
        return {"clip_norm": state["clip_norm"] * factor}


def _in_force(clip: ClipRule, task: StepTask) -> ClipRule:
    """Return the rule at the clip norm that the task states, where it moves."""
    if "clip_norm" not in task.arrays or not isinstance(clip, FlatClip):
        return clip
    return FlatClip(float(task.arrays["clip_norm"][0]))
