"""What a trust model must define: who is trusted, what is sent, who adds up, and who adds the noise.

The other axes are what a unit adds (fedsim.queries), who is drawn (fedsim.samplers) and how the noise hangs
together over the steps (fedsim.noise); `fedsim.mechanism` composes them. The step loop (fedsim.engine.server)
is the same for all; adding a trust model is adding a file here, or naming a class of your own.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import dp_accounting
import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.clipping.base import ClipRule
from fedsim.config import Config
from fedsim.noise.over_time import NoiseOverTime
from fedsim.privacy import events
from fedsim.privacy.budget import Budget, within_budget
from fedsim.privacy.family import EventFamily
from fedsim.queries import Query, Statistic
from fedsim.queries.base import Arrays, NodeView
from fedsim.queries.statistic import Expected
from fedsim.samplers import Draw, Participation, Sampler
from fedsim.seeds import Root
from fedsim.types import ClippedSum, HolderReply, StepTask
from fedsim.visibility import Public, Tagged

Sums = dict[str, NDArray[np.float64]]
Ask = Callable[[str, Mapping[str, NDArray[Any]]], list[HolderReply]]
"""(stage, arrays to send along) -> one checked reply from every node, sorted by node."""
Split = Callable[[float], tuple[float, ...]]
"""Noise multiplier of a release -> that of each part."""
Noise = Callable[[str], NDArray[np.float64]]
"""Name of a part -> the step's noise on its sum, (length,)."""


@dataclass(frozen=True)
class DataFacts:
    """What a mechanism may know about the data.

    Attributes:
        examples: number N of training examples that are used; treated as public.
        holders: number of holders.
        largest_holder: examples of the largest one: the declared cap, or a sensitive number. What a holder
            may see of the mechanism must follow from `most_of_a_holder` instead.
        parameters: length P of a gradient.
        features: entries of an example's input.
        outputs: of the model, for one example.
    """

    examples: int
    holders: int
    largest_holder: Tagged[int]
    parameters: int
    features: int = 1
    outputs: int = 1

    @property
    def most_of_a_holder(self) -> int:
        """Return what no holder's number of examples exceeds, from public numbers alone: the cap, else N."""
        return self.largest_holder.value if isinstance(self.largest_holder, Public) else self.examples


class Units(NamedTuple):
    """Some of the units that are drawn, examples or holders as the query says.

    Attributes:
        ids: (n,) any of 0 .. population - 1, in any order.
        population: how many there are.
    """

    ids: NDArray[np.int64]
    population: int


@dataclass(frozen=True)
class Setting:
    """What a trust model stands beside: all that a node knows, from the configuration alone."""

    config: Config
    query: Query
    sampler: Sampler
    noise: NoiseOverTime
    clip: ClipRule

    def sums(self, node: NodeView, task: StepTask) -> tuple[Arrays, ClippedSum]:
        """Return the query's sums over all holders of a node; see `Query.sums`.

        Raises:
            InputError: they are not the parts of the step's statistic.
        """
        sums, result = self.query.sums(node, task, self.clip)
        self._statistic(node, task).check(sums, self.config.query.name)
        return sums, result

    def sums_by_holder(
        self, node: NodeView, task: StepTask, here: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], ClippedSum]:
        """Return the sums of each of a node's holders, in the order of the statistic's parts one after the
        other, (H, length of all parts); see `Query.sums_by_holder`.

        Raises:
            InputError: they are not the parts of the step's statistic.
        """
        sums, result = self.query.sums_by_holder(node, task, self.clip, here)
        arrays = {name: values.cpu().numpy() for name, values in sums.items()}
        statistic = self._statistic(node, task)
        statistic.check(arrays, self.config.query.name)
        return np.concatenate([arrays[part.name] for part in statistic.parts], axis=1), result

    def _statistic(self, node: NodeView, task: StepTask) -> Statistic:
        """Return that of the step, as far as nodes know it: bounds may move with the query's state."""
        query = self.query
        return query.statistic(node.shape(query.phase(task.step)), self.clip, query.state(self.config))

    def selected(self, task: StepTask, units: Units) -> NDArray[np.bool_]:
        """Say which of the units a step draws, whoever owns them, (n,)."""
        return self.sampler.selected(
            Draw(task.step, task.sampling_rate, units.population, task.keys), units.ids
        )


@dataclass(frozen=True)
class Release:
    """What one step releases, as the server knows it.

    Attributes:
        statistic: the parts of the sum.
        noise_stds: by part, standard deviation of the noise that the mechanism adds once, in units of the
            sum; empty where nothing is private.
        facts: about the data.
        agreed: what `Trust.agree` returned for the step's phase.
        told_bytes: of what nodes are told of the query's state.
    """

    statistic: Statistic
    noise_stds: Mapping[str, float]
    facts: DataFacts
    agreed: Any = None
    told_bytes: int = 0

    def down_bytes(self, dtype: str) -> int:
        """Return the bytes of a task: parameters of that dtype, and what nodes are told beside them."""
        return self.facts.parameters * np.dtype(dtype).itemsize + self.told_bytes


class Phase(NamedTuple):
    """Steps that release the same statistic with the same noise.

    Attributes:
        statistic: what such a step sums up.
        factor: what multiplies the noise multiplier of the run in it.
    """

    statistic: Statistic
    factor: float


class Agreed(NamedTuple):
    """What is settled before a run.

    Attributes:
        budget: the events of the run.
        multipliers: for each phase, without its factor, that of the noise which makes the events true.
        settings: for each phase, whatever server and nodes must agree on.
    """

    budget: Budget
    multipliers: tuple[float, ...]
    settings: tuple[Any, ...]


@dataclass(frozen=True)
class Collected:
    """The sums over all holders, and what they were made of.

    Attributes:
        sums: by part, float64 (length,).
        replies: those that hold the counts and statistics of the step.
        facts: public facts of the step, for the ledger.
        lacking: noise that the server must still add, as the trust model counts it.
    """

    sums: Sums
    replies: list[HolderReply]
    facts: Mapping[str, Public[Any]] = field(default_factory=dict)
    lacking: int = 0


@dataclass(frozen=True)
class Trust(ABC):
    """Who adds up, and who adds noise. The fields are the options; what a method needs it is given.

    Class attributes:
        private: whether anything is protected.
        trusted, sent, noise_added, dropout_policy: what tables say; {what} in `sent` is the query's.
        stages: of a step, in order: what `collect` asks.
        simulates_secrets: whether keys of holders come from the server: simulation only.
        by_holder: whether nodes form a sum for each holder: more memory.
        adapts: whether the server sees exact sums and adds all noise, so that the bound on a contribution may
            follow what was released, and noise may be correlated over the steps.
        takes_fixed_size: whether its event is known for draws of a fixed size, too.
        unread: settings that this trust model does not read; set, they are refused.
        tiny: options of a small example, for tests over all combinations.
    """

    private: ClassVar[bool] = True
    trusted: ClassVar[str]
    sent: ClassVar[str]
    noise_added: ClassVar[str]
    dropout_policy: ClassVar[str]
    stages: ClassVar[tuple[str, ...]] = ("",)
    simulates_secrets: ClassVar[bool] = False
    by_holder: ClassVar[bool] = False
    adapts: ClassVar[bool] = True
    takes_fixed_size: ClassVar[bool] = True
    unread: ClassVar[tuple[str, ...]] = ()
    tiny: ClassVar[Mapping[str, Any]] = {}

    def check(self, at: Setting) -> None:
        """Refuse what does not go with this trust model.

        Raises:
            InputError: says why, and what to change.
        """
        if self.adapts:
            return
        chosen = f"strategy={at.config.strategy.name}"
        if at.noise.correlated or at.noise.levels(at.config.train.steps):
            validate.conflicts(
                f"noise={at.config.noise.name} does not go with {chosen}: the noise of a step is made where "
                "nobody knows that of other steps, all of one scale.",
                "Use noise=independent, or strategy=central.",
            )
        if at.query.adaptive:
            validate.conflicts(
                f"query.options.target_quantile does not go with {chosen}: the bound would follow a count "
                "that needs a server which sees it exactly and adds the noise.",
                "Leave it null, or use strategy=central.",
            )

    def event(self, at: Setting, noise_multiplier: float, taking: Participation) -> dp_accounting.DpEvent:
        """Return the event of one release, a cycle of the sampler, in which units take part like that."""
        if taking.sample is not None:
            return events.fixed_size_step(noise_multiplier, *taking.sample)
        return events.gaussian_step(noise_multiplier, taking.rate)

    def agree(
        self, at: Setting, family: EventFamily, phases: Sequence[Phase], split: Split, facts: DataFacts
    ) -> Agreed:
        """Return the budget of the run, its noise, and whatever server and nodes must agree on beforehand.

        Args:
            at: what this stands beside.
            family: the events of the run.
            phases: of the run; most have one.
            split: of a release's noise multiplier over the parts of a statistic.
            facts: about the data.

        Raises:
            InputError: as `within_budget`.
        """
        budget = within_budget(at.config.privacy, family, at.config.train.steps)
        return Agreed(budget, (budget.noise_multiplier,) * len(phases), (None,) * len(phases))

    def keys(self, at: Setting, root: Root, step: int) -> dict[str, bytes]:
        """Return the keys that nodes need of a step beside the sampler's, by purpose; none by default."""
        return {}

    def answer(self, at: Setting, node: NodeView, task: StepTask) -> tuple[Arrays, ClippedSum]:
        """Do one node's part: return the named arrays to send, and the sum they come from for statistics.

        By default the sums over the drawn units of all holders of the node.
        """
        return at.sums(node, task)

    def collect(self, at: Setting, release: Release, along: Arrays, ask: Ask) -> Collected:
        """Return the sums over all holders.

        By default one stage, added in node order: the order is fixed, so the sum is reproducible.

        Args:
            at, release: the mechanism.
            along: what the query tells nodes.
            ask: asks every node.
        """
        replies = ask("", along)
        sums: Sums = {}
        for part in release.statistic.parts:
            total = replies[0].arrays[part.name].astype(np.float64)
            for reply in replies[1:]:
                total += reply.arrays[part.name]
            sums[part.name] = total
        return Collected(sums, replies)

    def added(
        self, at: Setting, release: Release, got: Collected, noise: Noise, root: Root, step: int
    ) -> Sums:
        """Return what the server adds to the sums, by part: by default the mechanism's noise, once.

        Args:
            at, release: the mechanism.
            got: the sums of the step.
            noise: the mechanism's noise of the step.
            root, step: what noise of the trust model's own derives from.
        """
        return {part.name: noise(part.name) for part in release.statistic.parts}

    def reply_arrays(self, at: Setting, release: Release, reply: HolderReply) -> Expected:
        """Return name -> (shape, dtype) of the arrays this reply must hold: by default one sum a part."""
        return release.statistic.arrays()

    def counted_at_most(self, at: Setting, task: StepTask, units: Units) -> int:
        """Return the largest count an honest reply can have: by default the drawn units of the node.

        Args:
            at: what this stands beside.
            task: what the reply answers.
            units: that the node has.
        """
        return int(np.count_nonzero(at.selected(task, units)))

    def problem_with(self, at: Setting, reply: HolderReply) -> str:
        """Return what is wrong with the arrays of a reply beyond shape, dtype, finiteness and norm, or ""."""
        return at.query.problem_with(reply)

    def norm_bounds(self, at: Setting, release: Release, reply: HolderReply) -> dict[str, float]:
        """Return the largest L2 norm that an honest reply's arrays can have, by name."""
        return release.statistic.bounds(reply.count)

    def traffic(self, at: Setting, release: Release) -> tuple[float, int]:
        """Return (bytes a holder of its own would send and receive in a step, messages of a step).

        By default the parameters down and one sum a part up, and a task and a reply for each node.
        """
        down = release.down_bytes(at.config.model.dtype)
        return float(down + release.statistic.nbytes), 2 * at.config.federation.nodes

    def node_traffic(self, at: Setting, release: Release, holders: int) -> tuple[int, int]:
        """Return the bytes of arrays that a node of so many holders receives and sends in a step.

        Every stage sends the parameters with its task; the answers are what `reply_arrays` demands.
        """
        down = release.down_bytes(at.config.model.dtype)
        return len(self.stages) * down, sum(
            self.reply_bytes(at, release, stage, holders) for stage in self.stages
        )

    def reply_bytes(self, at: Setting, release: Release, stage: str, holders: int) -> int:
        """Return the bytes of the arrays that a node of so many holders answers at a stage."""
        reply = HolderReply(0, 0, 0, np.arange(holders), "", {}, 0, {}, {}, stage)
        arrays = self.reply_arrays(at, release, reply).values()
        return sum(math.prod(shape) * kind.itemsize for shape, kind in arrays)

    def survivors_needed(self, at: Setting) -> str:
        """Return how many holders must stay to the end of a step for its privacy statement to hold."""
        return "any"

    def stds_of_sums(self, at: Setting, release: Release) -> dict[str, float]:
        """Return, by part, the standard deviation of all noise in one step's sum when as many holders take
        part as are online on average; empty where nothing is private."""
        return dict(release.noise_stds)
