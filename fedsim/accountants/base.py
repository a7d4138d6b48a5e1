"""An accountant: from releases to epsilon, and what it can answer for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import dp_accounting as dp

from fedsim.privacy import events
from fedsim.privacy.loss_distribution import TOLERANCE, Part


@dataclass(frozen=True)
class Accountant(ABC):
    """Epsilon of compositions of sampled Gaussian releases. It has no options: a name says all of it.

    Class attributes:
        is_upper_bound: whether its epsilon is never below the true one. What is not is shown, never claimed:
            no noise is calibrated by it and no run is stopped by it.
        takes_groups: whether it answers for several examples of one holder that are drawn independently.
        searches_coarsely: whether a wider tolerance makes it much faster, for the first stage of a search.
        takes_selection: whether it answers for the best of a hidden number of runs, by `selected_epsilon`.
        check: the accountant whose answer stands beside this one's.
    """

    is_upper_bound: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = False
    takes_selection: ClassVar[bool] = False
    searches_coarsely: ClassVar[bool] = False
    check: ClassVar[str] = "pld"

    def supports(self, event: dp.DpEvent) -> str:
        """Return why this accountant has no answer for an event, or ""."""
        if events.renyi_only(event):
            return "the mechanism is bounded at whole Renyi orders only"
        if any(found.sample is not None and found.sampling_rate < 1.0 for found in events.releases(event)):
            return "sampling without replacement composes by Renyi DP only"
        return ""

    @abstractmethod
    def epsilon(
        self, parts: tuple[Part, ...], delta: float, tolerance: float = TOLERANCE
    ) -> tuple[float | None, str]:
        """Return (epsilon, note) of the composition of `parts`, each with noise, at 0 < delta < 1.

        The value is None, with the reason in the note, where it cannot be computed soundly.

        Args:
            parts: what was released; one at least.
            delta: of the answer.
            tolerance: relative accuracy that is enough, where the accountant has a choice.
        """

    def selected_epsilon(
        self, parts: tuple[Part, ...], delta: float, selection: events.Selection
    ) -> tuple[float | None, str]:
        """Return (epsilon, note) of the best of a hidden number of runs, each the composition of `parts`.

        It is asked where `takes_selection` says so.
        """
        return None, "no answer for the best of a hidden number of runs"
