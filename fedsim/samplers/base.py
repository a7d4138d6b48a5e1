"""A sampler: whether a unit takes part in a step, and how often that can be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.seeds import Root, derive

if TYPE_CHECKING:
    from fedsim.config import Config  # imports omegaconf


@dataclass(frozen=True)
class Participation:
    """All that an event needs to know of a sampler.

    A run is cut into cycles of `period` steps from step 0 on. In each of them a unit takes part in at most
    one step, which no data decides, and there with probability `rate`, independently of the other units and
    of the other cycles.

    Attributes:
        period: steps of a cycle.
        rate: probability to take part in a cycle, 0 < rate <= 1.
        separation: fewest steps from one participation to the next.
        share: part of all units that a step takes on average; what tasks carry as `sampling_rate`.
        sample: (units, of which each step takes exactly so many) where the draw has a fixed size; its
            neighbouring relation is then replace one. None: add or remove one.
    """

    period: int
    rate: float
    separation: int
    share: float
    sample: tuple[int, int] | None = None


@dataclass(frozen=True)
class Draw:
    """What decides who is in one step: the same on every node, and apart from all data.

    Attributes:
        step: server updates before this one.
        share: `Participation.share`.
        population: how many units there are, of which ids are 0 .. population - 1.
        keys: of the step, those of `Sampler.keys` among them.
    """

    step: int
    share: float
    population: int
    keys: Mapping[str, bytes]


@dataclass(frozen=True)
class Sampler(ABC):
    """Who takes part in a step; its fields are the options. Units are examples or holders, by their ids.

    Class attributes:
        tiny: options of a small example, for tests over all combinations.
    """

    tiny: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def participation(self, share: float, batch: float, units: int) -> Participation:
        """Return how often a unit takes part.

        Args:
            share: part of all units that a step shall take on average, 0 < share <= 1.
            batch: train.expected_batch_size, which says so; for messages.
            units: how many units there are.

        Raises:
            InputError: no draw of this kind takes that share.
        """

    @abstractmethod
    def selected(self, draw: Draw, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which of `ids` (n,), non-negative and in any order, a step takes; (n,).

        The answer for an id depends on the id and the draw alone, not on the other ids nor on who asks.
        """

    def check(self, config: Config) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse settings that do not go with this sampler.

        Raises:
            InputError: says which, and what to change.
        """

    def keys(self, root: Root, step: int) -> dict[str, bytes]:
        """Return the keys that `selected` needs of a step, by purpose."""
        return {"draw": derive(root, "draw", step)}
