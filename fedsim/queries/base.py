"""A query: what one unit adds to the sum of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.clipping import ClipRule, clip_rule
from fedsim.config import Config
from fedsim.grads.local_training import LocalTraining
from fedsim.queries.statistic import Means, Statistic
from fedsim.types import ClippedSum, HolderReply, StepTask

Kept = TypeVar("Kept")
Arrays = dict[str, NDArray[Any]]
State = Mapping[str, Tensor]
"""What a query carries from step to step; what a checkpoint holds of it."""


class NodeView(Protocol):
    """What a query and a trust model see of the node they run on, at the task's parameters."""

    holders: NDArray[np.int64]
    outputs: int

    @property
    def ids(self) -> NDArray[np.int64]:
        """The global ids of the node's examples, ascending."""
        ...

    def parameters(self) -> Tensor:
        """Return the task's parameters (P,), on the model's device."""
        ...

    def plain(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return inputs (n, ...) and targets (n, ...) of these examples, as the model takes them."""
        ...

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

    def shape(self, phase: int) -> Shape:
        """Return the sizes a statistic follows from, in a phase of the query."""
        ...

    def kept(self, name: str, key: bytes, make: Callable[[], Kept]) -> Kept:
        """Return `make()`, or what it gave when it was last asked for under this name and key.

        It saves time and decides nothing: a node that forgot makes it again.
        """
        ...

    def drawn(self, task: StepTask) -> NDArray[np.int64]:
        """Return the global ids of the node's examples that are in this step's virtual batch, ascending."""
        ...

    def drawn_holders(self, task: StepTask) -> NDArray[np.int64]:
        """Return the node's holders that are drawn in this step and online, ascending."""
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


@dataclass(frozen=True)
class Shape:
    """The public sizes a statistic follows from.

    Attributes:
        parameters: length P of a gradient.
        features: entries of an example's input.
        outputs: of the model, for one example.
        dtype: of the model.
        phase: of the step; see `Query.phase`.
    """

    parameters: int
    features: int
    outputs: int
    dtype: np.dtype[Any]
    phase: int = 0


@dataclass(frozen=True)
class Query(ABC):
    """What one unit adds, and its bound; the fields are the options.

    Class attributes:
        unit: "example" or "holder": who contributes, is drawn, and is protected.
        what: the contributions before anything bounds them, in the words of tables.
        unread: settings that this query does not read; set to anything but their default they are refused.
        learner: the one that takes it where a configuration names none.
        measures_loss: whether its statistics hold the loss of every example.
        tiny: options of a small example, for tests over all combinations.
    """

    unit: ClassVar[str] = "example"
    what: ClassVar[str]
    unread: ClassVar[tuple[str, ...]] = ()
    learner: ClassVar[str] = "optimizer"
    measures_loss: ClassVar[bool] = True
    tiny: ClassVar[Mapping[str, Any]] = {}

    def check(self, config: Config) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse settings that do not go with this query.

        Raises:
            InputError: says which, and what to change.
        """

    def check_model(self, model: nn.Module, example_shape: tuple[int, ...], outputs: int) -> None:  # noqa: B027
        """Refuse a model that does not go with this query.

        Args:
            model: as it starts; its parameters are public.
            example_shape: of the inputs of one example.
            outputs: of the model, for one example.

        Raises:
            InputError: says which, and what to change.
        """

    def clip(self, config: Config) -> ClipRule:
        """Return the rule that bounds a contribution, from the configuration alone: nodes need no plan."""
        return clip_rule(config.privacy)

    @abstractmethod
    def statistic(self, shape: Shape, clip: ClipRule, state: State) -> Statistic:
        """Return the parts of the sum.

        Args:
            shape: of model and data.
            clip: the rule in force, of this query or none.
            state: of this query.
        """

    def multipliers(self, noise_multiplier: float, expected_units: float) -> tuple[float, ...]:
        """Return the noise multiplier of each part, so that all together are a release of `noise_multiplier`
        (`fedsim.queries.statistic`). For a query of one part: that one.

        Args:
            noise_multiplier: of the whole release.
            expected_units: units that a step takes on average.
        """
        return (noise_multiplier,)

    def phase(self, step: int) -> int:
        """Return which of its statistics a query sums in a step: 0, 1, ...; 0 in the first one.

        Args:
            step: counted from 0.
        """
        return 0

    def factors(self, steps: int) -> tuple[float, ...]:
        """Return for each phase what multiplies the noise multiplier of the run in its steps.

        Args:
            steps: of the whole run, as planned.
        """
        return (1.0,)

    @property
    def adaptive(self) -> bool:
        """Return whether a bound moves with what was released: then only noise that the server adds goes."""
        return False

    @abstractmethod
    def sums(self, node: NodeView, task: StepTask, clip: ClipRule) -> tuple[Arrays, ClippedSum]:
        """Return the sums over the drawn units of all holders of a node, and the statistics of what they are
        made of.

        Sums are arrays (length,) by name, of names, lengths and dtypes of the parts of the step's statistic:
        what differs is refused before it is sent.
        """

    def sums_by_holder(
        self, node: NodeView, task: StepTask, clip: ClipRule, here: NDArray[np.bool_]
    ) -> tuple[dict[str, Tensor], ClippedSum]:
        """Return for each of the node's holders its sums, (H, length) by the parts' names, and the statistics
        of all together.

        By default `sums` of one holder after the other.

        Args:
            node, task, clip: as in `sums`.
            here: (H,) which of the holders take part at all.
        """
        from fedsim.queries.one_holder import each  # which knows what a node shows from here

        rows: dict[str, list[Tensor]] = {}
        parts = []
        for view in each(node, task, self.unit, here):
            sums, result = self.sums(view, task, clip)
            for name, values in sums.items():
                rows.setdefault(name, []).append(torch.from_numpy(values))
            parts.append(result)
        together = ClippedSum(
            torch.zeros(0),
            sum(part.count for part in parts),
            clip.sensitivity,
            torch.cat([part.norms for part in parts]),
            torch.cat([part.losses for part in parts]),
        )
        return {name: torch.stack(values) for name, values in rows.items()}, together

    def most_of_a_holder(self, examples: int) -> int:
        """Return the largest number of units of a holder that has at most so many examples."""
        return examples if self.unit == "example" else 1

    def problem_with(self, reply: HolderReply) -> str:
        """Return what is wrong with the sums of a reply beyond shape, dtype, finiteness and norm, or ""."""
        return ""

    def operations(self, shape: Shape) -> float | None:
        """Return the floating point operations of one example in a step, for plans; None: a forward and a
        backward pass of the model for each of its views."""
        return None

    def state(self, config: Config) -> State:
        """Return the state before the first step; none by default."""
        return {}

    def arrays(self, state: State) -> Arrays:
        """Return what nodes must know of the state."""
        return {}

    def told_bytes(self, shape: Shape) -> int:
        """Return the bytes of `arrays` in a step."""
        return 0

    def for_learner(self, state: State, means: Means) -> Means:
        """Return what the learner gets of a step: by default the noisy means as they are.

        Args:
            state: before the step.
            means: public.
        """
        return means

    def updated(self, state: State, means: Means) -> State:
        """Return the state after a step.

        Args:
            state: before it.
            means: what the step released: public.
        """
        return state
