"""What a trust model must define: who is trusted, what is sent, where noise is added, what is released.

A strategy yields everything privacy-relevant together in one `Plan`: sampler, clip, noise, divisor, events.
Calibration, budget stop, dry run, ledger and reports read the plan's events and nothing else states epsilon,
so they cannot disagree. The step loop (fedsim.engine.server) is the same for all strategies; adding one is
adding a file here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import dp_accounting
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.config import Config
from fedsim.grads.clip import ClipRule, clip_rule
from fedsim.grads.local_training import LocalTraining
from fedsim.noise.gaussian import GaussianNoise
from fedsim.privacy.budget import Budget
from fedsim.sampling import PoissonSampler
from fedsim.seeds import Root, derive
from fedsim.types import ClippedSum, HolderReply, StepTask
from fedsim.visibility import Public, Tagged

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class DataFacts:
    """What a plan may know about the data.

    Attributes:
        examples: number N of training examples that are used; treated as public.
        holders: number of holders.
        largest_holder: examples of the largest one: the declared cap, or a sensitive number. What a holder
            may see of the mechanism must follow from `most_of_a_holder` instead.
        parameters: length P of a gradient.
    """

    examples: int
    holders: int
    largest_holder: Tagged[int]
    parameters: int

    @property
    def most_of_a_holder(self) -> int:
        """Return what no holder's number of examples exceeds, from public numbers alone: the cap, else N."""
        return self.largest_holder.value if isinstance(self.largest_holder, Public) else self.examples


@dataclass(frozen=True)
class Plan:
    """One run's mechanism.

    Attributes:
        unit: "example" or "holder": whose presence the events protect.
        sampling_rate: probability q of a unit to be drawn in a step.
        divisor: public constant by which the noisy sum is divided.
        clip: bound on one unit's contribution; knows its sensitivity.
        noise: Gaussian noise that reaches the sum in one step, or None; that of factor 1 where
            privacy.noise_schedule sets factors.
        budget: the events of the run, their noise multiplier, and the steps made; from
            fedsim.privacy.budget.within_budget.
        holder_noise_factor: what the noise multiplier is to be multiplied with for a holder of several
            examples, where events bound single examples only because of their places in a period.
        example_noise_factor: the same for an example, where the unit is the holder; None: not bounded apart.
    """

    unit: str
    sampling_rate: float
    divisor: float
    clip: ClipRule
    noise: GaussianNoise | None
    budget: Budget
    holder_noise_factor: float = 1.0
    example_noise_factor: float | None = None

    @property
    def steps(self) -> int:
        """Return the server updates to make; already cut at the budget."""
        return self.budget.steps

    @property
    def stopped_by_budget(self) -> bool:
        """Return whether `steps` is below the configured number because of stop_at_epsilon."""
        return self.budget.stopped

    def noise_factor(self, step: int) -> float:
        """Return what multiplies the noise in one step."""
        return self.budget.family.factor(step)

    def event_at(self, step: int) -> dp_accounting.DpEvent:
        """Return what the ledger records for one step."""
        return self.budget.family.event_at(self.budget.noise_multiplier, step)

    def total_event(self, steps: int) -> dp_accounting.DpEvent:
        """Return what `steps` steps release together."""
        return self.budget.event(steps)

    def total_event_for_holder(self, steps: int, examples: int) -> dp_accounting.DpEvent:
        """Return the example-level event of `steps` steps that bounds a holder with that many examples,
        for `accountant.holder_epsilon_of_event`."""
        return self.budget.event(steps, self.holder_noise_factor if examples > 1 else 1.0)

    def total_event_for_example(self, steps: int) -> dp_accounting.DpEvent | None:
        """Return the event of `steps` steps that bounds one example where the unit is the holder, or None."""
        factor = self.example_noise_factor
        return None if factor is None else self.budget.event(steps, factor)


class NodeView(Protocol):
    """What a strategy sees of the node it runs on, at the task's parameters."""

    holders: NDArray[np.int64]

    def online(self, holders: NDArray[np.int64], task: StepTask) -> NDArray[np.int64]:
        """Return those of the holders that the availability model has online in this step."""
        ...

    def zero_sum(self) -> Tensor:
        """Return a zero vector (P,) in the model's dtype, on its device."""
        ...

    def moved(self, update: Tensor) -> AbstractContextManager[None]:
        """Within the block, take gradients at the task's parameters minus `update` (P,)."""
        ...

    def local_update(self, holder: int, task: StepTask, how: LocalTraining) -> tuple[Tensor, float]:
        """Train on all examples of one holder; return start minus end (P,) and the mean loss."""
        ...

    def drawn(self, task: StepTask) -> NDArray[np.int64]:
        """Return the global ids of the node's examples that are in this step's virtual batch, ascending."""
        ...

    def owners(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the holder of each of these examples."""
        ...

    def clipped_sums(
        self, ids: NDArray[np.int64], task: StepTask, clip: ClipRule
    ) -> tuple[Tensor, ClippedSum]:
        """Return a clipped gradient sum for each of `holders`, (H, P), and the statistics of all together."""
        ...

    def clipped_sum(self, ids: NDArray[np.int64], task: StepTask, clip: ClipRule) -> ClippedSum:
        """Return the clipped gradient sum of these examples at the task's parameters."""
        ...


Ask = Callable[[str, Mapping[str, NDArray[Any]]], list[HolderReply]]
"""(stage, arrays to send along) -> one checked reply from every node, sorted by node."""


ENGINE_SETTINGS = (
    "engine.gradients",
    "engine.gradient_memory",
    "engine.precision",
    "engine.channels_last",
    "engine.cuda_graphs",
)
"""What only `NodeView.clipped_sum` reads."""


class Strategy(ABC, Generic[OptionsT]):
    """Base of all trust models. Class attributes are what the comparison tables say about it."""

    Options: ClassVar[type[Any]]
    private: ClassVar[bool]
    trusted: ClassVar[str]
    sent: ClassVar[str]
    noise_added: ClassVar[str]
    dropout_policy: ClassVar[str]
    stages: ClassVar[tuple[str, ...]] = ("",)  # of a step, in order: what `collect` asks
    simulates_secrets: ClassVar[bool] = False  # whether keys of holders come from the server: simulation only
    sums_by_holder: ClassVar[bool] = False  # whether `answer` takes `NodeView.clipped_sums`: more memory

    def __init__(self, config: Config, options: OptionsT) -> None:
        self.config = config
        self.options = options

    @abstractmethod
    def plan(self, facts: DataFacts) -> Plan:
        """Return the mechanism of this run; raises InputError for settings that cannot be private."""

    def clip_rule(self) -> ClipRule:
        """Return the clip rule, known from the configuration alone, so that nodes need no plan."""
        privacy = self.config.privacy
        return clip_rule(privacy)

    def unread(self) -> tuple[str, ...]:
        """Return the settings that this strategy does not read; set to anything but their default, they are
        refused."""
        return ()

    def keys(self, root: Root, step: int) -> dict[str, bytes]:
        """Return the keys nodes need for a step, by purpose."""
        return {purpose: derive(root, purpose, step) for purpose in ("draw", "availability", "augment")}

    def selected(self, task: StepTask, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which of `ids` the step draws, whoever owns them: Poisson with the task's rate by default."""
        return PoissonSampler(task.sampling_rate, max(1, len(ids))).included(ids, task.keys["draw"])

    def answer(self, node: NodeView, task: StepTask) -> tuple[dict[str, NDArray[Any]], ClippedSum]:
        """Do one node's part: return the named arrays to send, and the sum they come from for statistics.

        By default one sum over the drawn examples of all holders of the node: it does not matter whose
        example is next to whose, so they share full physical batches.
        """
        result = node.clipped_sum(node.drawn(task), task, self.clip_rule())
        return {"sum": result.sum.cpu().numpy()}, result

    def collect(self, plan: Plan, ask: Ask) -> tuple[NDArray[np.float64], list[HolderReply]]:
        """Return the sum over all holders, float64 (P,), and the replies it was made of.

        By default one stage, added in node order: the order is fixed, so the sum is reproducible.
        """
        replies = ask("", {})
        total = replies[0].arrays["sum"].astype(np.float64)
        for reply in replies[1:]:
            total += reply.arrays["sum"]
        return total, replies

    @abstractmethod
    def noise(self, plan: Plan, root: Root, step: int, count: int) -> NDArray[np.float64] | None:
        """Return the noise the server adds to the sum of this step, float64 (P,), or None."""

    def reply_arrays(
        self, reply: HolderReply, parameters: int, dtype: np.dtype[Any]
    ) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Return name -> (shape, dtype) of the arrays this reply must hold."""
        return {"sum": ((parameters,), dtype)}

    def counted_at_most(self, task: StepTask, holders: NDArray[np.int64], ids: NDArray[np.int64]) -> int:
        """Return the largest count an honest reply can have: by default the drawn examples of the node.

        Args:
            task: what the reply answers.
            holders: (H,) the node's holders.
            ids: (n,) ids of their examples.
        """
        return int(np.count_nonzero(self.selected(task, ids)))

    def problem_with(self, reply: HolderReply) -> str:
        """Return what is wrong with the arrays of a reply beyond shape, dtype, finiteness and norm, or ""."""
        return ""

    def norm_bound(self, plan: Plan, reply: HolderReply) -> float:
        """Return the largest L2 norm an honest reply can have."""
        return reply.count * plan.clip.sensitivity if reply.count else 0.0

    def noiseless_form(self) -> list[str]:
        """Return the overrides that make `nonprivate` what this strategy is without clipping and noise."""
        return ["privacy.clip_norm=1.0", "privacy.clipping=flat", "privacy.clip_groups={}"]

    def traffic(self, facts: DataFacts, itemsize: int) -> tuple[float, int]:
        """Return (bytes a holder of its own would send and receive in a step, messages of a step).

        By default the parameters down and one sum up, numbers of `itemsize` bytes, and a task and a reply
        for each node.
        """
        return 2.0 * facts.parameters * itemsize, 2 * self.config.federation.nodes

    def node_traffic(self, parameters: int, dtype: np.dtype[Any], holders: int) -> tuple[int, int]:
        """Return the bytes of arrays that a node of so many holders receives and sends in a step.

        Every stage sends the parameters with its task; the answers are what `reply_arrays` demands.
        """
        received = len(self.stages) * parameters * dtype.itemsize
        return received, sum(self._reply_bytes(stage, parameters, dtype, holders) for stage in self.stages)

    def _reply_bytes(self, stage: str, parameters: int, dtype: np.dtype[Any], holders: int) -> int:
        reply = HolderReply(0, 0, 0, np.arange(holders), "", {}, 0, {}, {}, stage)
        arrays = self.reply_arrays(reply, parameters, dtype).values()
        return sum(math.prod(shape) * kind.itemsize for shape, kind in arrays)

    def survivors_needed(self) -> str:
        """Return how many holders must stay to the end of a step for its privacy statement to hold."""
        return "any"

    def noise_std_of_sum(self, plan: Plan) -> float:
        """Return the standard deviation of all noise in one step's sum when every holder takes part."""
        return 0.0 if plan.noise is None else plan.noise.noise_std

    def step_facts(self) -> dict[str, Public[Any]]:
        """Return public facts of the step just collected, for the ledger; none by default."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return server-side state that a resumed run needs (correlated noise); none by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


def drawn_holders(task: StepTask, holders: NDArray[np.int64]) -> int:
    """Return how many of these holders a step draws."""
    return int(np.count_nonzero(_holder_sampler(task, holders).included(holders, task.keys["draw"])))


def _holder_sampler(task: StepTask, holders: NDArray[np.int64]) -> PoissonSampler:
    return PoissonSampler(task.sampling_rate, max(1, len(holders)))


def sum_of_updates(node: NodeView, task: StepTask, clip: ClipRule, how: LocalTraining) -> ClippedSum:
    """Draw holders of the node, train at each, and return the sum of their clipped updates.

    Every holder counts once whatever its size. An update that is not finite adds zero; `count`, `norms` and
    `losses` are over holders, in ascending order.
    """
    sampler = _holder_sampler(task, node.holders)
    drawn = node.online(node.holders[sampler.included(node.holders, task.keys["draw"])], task)
    total = node.zero_sum()
    norms = torch.zeros(len(drawn), dtype=torch.float64)
    losses = torch.zeros(len(drawn), dtype=torch.float64)
    for place, holder in enumerate(drawn):
        update, losses[place] = node.local_update(int(holder), task, how)
        norms[place] = torch.linalg.vector_norm(update.double())
        if torch.isfinite(norms[place]):
            total += update * float(clip.coefficients(norms[place : place + 1]))
    return ClippedSum(total, len(drawn), clip.sensitivity, norms, losses)
