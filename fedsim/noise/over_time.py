"""How the noise of one step hangs together with that of the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedsim.noise.levels import NoiseLevels
from fedsim.samplers import Participation

if TYPE_CHECKING:
    from fedsim.noise.stream import Factorisation  # imports torch


@dataclass(frozen=True)
class NoiseOverTime(ABC):
    """Noise over the steps of a run; its fields are the options.

    A cycle of a sampler (`Participation.period` steps) is one release of the Gaussian mechanism. Its
    sensitivity is `column_norm` times the bound on one unit's contribution to one step.

    Class attributes:
        correlated: whether the noise of a step depends on that of others: `factorisation` then says how.
        said: what tables add to where noise is added; "" for nothing.
        tiny: options of a small example, for tests over all combinations.
    """

    correlated: ClassVar[bool] = False
    said: ClassVar[str]
    tiny: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def check(self, participation: Participation, steps: int) -> None:
        """Refuse a sampler whose cycles are not single releases under this noise.

        Raises:
            InputError: says why, and which samplers go with it.
        """

    def levels(self, steps: int) -> NoiseLevels | None:
        """Return the factors on the noise multiplier over the run; None: constant."""
        return None

    def factorisation(self, participation: Participation, steps: int) -> Factorisation | None:
        """Return what correlates the noise of the steps; None: nothing does."""
        return None

    def holder_factor(self, participation: Participation, steps: int) -> float:
        """Return what the noise multiplier of an event is to be multiplied with for a holder of several
        examples, where the event bounds single examples only because of their places in a cycle."""
        return 1.0

    def column_norm(self, participation: Participation, steps: int) -> float:
        """Return the sensitivity of a release, in bounds on one contribution."""
        found = self.factorisation(participation, steps)
        return 1.0 if found is None else found.column_norm(steps)
