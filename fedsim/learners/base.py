"""A learner: from noisy sums to parameters. All of it is post-processing and costs no privacy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedsim.config import Config
from fedsim.grads.flat import FlatSpec
from fedsim.queries.base import Query
from fedsim.queries.statistic import Means


class Learning(ABC):
    """A learner at work on one model: with its state, which a checkpoint holds."""

    @abstractmethod
    def init(self, params: Tensor) -> None:
        """Start afresh from parameters (P,)."""

    @abstractmethod
    def update(self, params: Tensor, means: Means, step_index: int) -> Tensor:
        """Return the new parameters (P,) after step `step_index`, from 0; `params` stays as it is."""

    def learning_rate(self, step_index: int) -> float | None:
        """Return the learning rate of a step; None for a learner without one."""
        return None

    def average(self) -> Tensor | None:
        """Return averaged parameters (P,) to release in place of the last ones, or None."""
        return None

    @abstractmethod
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return copies of the state's tensors, and the plain numbers beside them."""

    @abstractmethod
    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Take over what `state_dict` returned; `init` is then not needed."""


@dataclass(frozen=True)
class Learner(ABC):
    """What the server does with a noisy statistic; its fields are the options.

    Class attributes:
        takes: names of the parts it needs; a step without them leaves the parameters as they are.
        needs_fresh_noise: whether it relies on noise that is independent over the steps, of one scale.
        unread: settings that it does not read; set to anything but their default they are refused.
        tiny: options of a small example, for tests over all combinations.
    """

    takes: ClassVar[tuple[str, ...]]
    needs_fresh_noise: ClassVar[bool] = False
    unread: ClassVar[tuple[str, ...]] = ()
    tiny: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def start(self, config: Config, query: Query, layout: FlatSpec, examples: int) -> Learning:
        """Return the learner at work.

        Args:
            config: of the run.
            query: whose statistic it gets.
            layout: which entries of the flat parameters are which tensor.
            examples: in the training set, over all holders.

        Raises:
            InputError: it cannot learn such parameters, or settings of its own are wrong.
        """
