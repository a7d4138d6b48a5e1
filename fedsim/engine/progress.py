"""How far a run is: a bar in a terminal, one line drawn anew in a notebook, plain lines elsewhere.

It shows the step, epsilon so far and the newest headline, of the numbers that `Metrics` let through.
"""

from __future__ import annotations

import html
import importlib
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fedsim import references
from fedsim.headline import Metric
from fedsim.types import StepRecord
from fedsim.visibility import shown

with references.undisturbed():
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from fedsim.engine.experiment import Experiment

REDRAWN_EVERY = 0.2
"""Seconds between two drawings in a notebook, whose front end may be far away."""


class Progress(ABC):
    """A `fedsim.engine.metrics.Watcher` that shows the newest numbers.

    Args:
        total: steps of the run.
        headline: the metric it is judged by.
        judged_by: the split it is judged by, such as "test".
        timed: show how long it may take: seconds a step follow the private draw, so a run that writes public
            numbers only does not.
    """

    def __init__(self, total: int, headline: Metric, *, judged_by: str = "test", timed: bool = True) -> None:
        self._total, self._headline, self._timed = total, headline, timed
        self._what = f"{judged_by} {headline.name}"
        self._score: float | None = None
        self._epsilon = self._n_delta = math.nan

    def write(self, record: StepRecord) -> None:
        """See `fedsim.engine.metrics.Writer`."""
        self.update(record.step, shown(record.numbers, public_only=False))

    def update(self, completed: int, numbers: Mapping[str, float | None]) -> None:
        """Take in and show the numbers of step `completed`; also of lines read back from metrics.jsonl."""
        self._epsilon = _number(numbers.get("epsilon", self._epsilon))
        self._n_delta = _number(numbers.get("n_delta", self._n_delta))
        self._score = numbers.get(self._headline.name, self._score)
        self._show(completed, evaluated=self._headline.name in numbers)

    @abstractmethod
    def _show(self, completed: int, *, evaluated: bool) -> None:
        """Show it, after a step with or without an evaluation."""

    @abstractmethod
    def close(self) -> None:
        """Leave what was reached, and no time."""

    @property
    def _spent(self) -> str:
        if math.isnan(self._epsilon):  # a run without privacy has none
            return "-"
        return f"{self._epsilon:.3g} (N x delta {self._n_delta:.2g})"


class ConsoleProgress(Progress):
    """A bar in a terminal; elsewhere a plain line an evaluation."""

    def __init__(
        self,
        total: int,
        headline: Metric,
        title: str = "",
        console: Console | None = None,
        *,
        judged_by: str = "test",
        timed: bool = True,
    ) -> None:
        super().__init__(total, headline, judged_by=judged_by, timed=timed)
        self._console = console or Console(stderr=True)
        self._bar: Bar | None = None
        if self._console.is_terminal:
            times: list[ProgressColumn] = [TimeRemainingColumn()] if timed else []
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                *times,
                TextColumn("epsilon {task.fields[epsilon]}  {task.fields[score]}", markup=False),
                console=self._console,
            )
            score = f"{self._what} -"
            self._task = self._bar.add_task(title or "training", total=total, epsilon="-", score=score)
            self._bar.start()

    def _show(self, completed: int, *, evaluated: bool) -> None:
        score = self._headline.shown(self._score)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=completed, epsilon=self._spent, score=f"{self._what} {score}"
            )
        elif evaluated:
            self._console.print(
                f"step {completed}/{self._total}  epsilon {self._spent}  {self._what} {score}",
                markup=False,
                emoji=False,
            )

    def close(self) -> None:
        """See `Progress`."""
        if self._bar is not None:
            self._bar.stop()


class NotebookProgress(Progress):
    """One line in the output of a notebook's cell, drawn anew while the run goes on.

    Args:
        total, headline, title, judged_by, timed: as of `ConsoleProgress`.
        display: IPython's, which returns a handle whose `update` puts something else in the place.
        clock: seconds.
    """

    def __init__(
        self,
        total: int,
        headline: Metric,
        title: str = "",
        *,
        display: Callable[..., Any],
        judged_by: str = "test",
        timed: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(total, headline, judged_by=judged_by, timed=timed)
        self._title, self._clock = title or "training", clock
        self._completed = 0
        self._began: tuple[float, int] | None = None  # the first step takes longer: it is not measured
        self._drawn = -math.inf
        self._there = repr(self._line())
        self._handle = display(self._line(), display_id=True)

    def _show(self, completed: int, *, evaluated: bool) -> None:
        self._completed = completed
        now = self._clock()
        self._began = self._began or (now, completed)
        if evaluated or completed == self._total or now - self._drawn >= REDRAWN_EVERY:
            self._draw(self._line(self._left(now)))
            self._drawn = now

    def _draw(self, line: _Line) -> None:
        """Put a line into the place, where it says something else than the one there: nothing tells when what
        comes after the last step is done."""
        if repr(line) != self._there:
            self._handle.update(line)
            self._there = repr(line)

    def _left(self, now: float) -> str:
        began, first = self._began or (now, self._completed)
        if not self._timed or self._completed <= first:
            return ""
        seconds = (now - began) / (self._completed - first) * (self._total - self._completed)
        return f"{math.ceil(seconds)} s left" if seconds < 100 else f"{math.ceil(seconds / 60)} min left"

    def _line(self, left: str = "") -> _Line:
        score = f"{self._what} {self._headline.shown(self._score)}"
        said = [left, f"epsilon {self._spent}", score]
        return _Line(self._title, self._completed, self._total, [words for words in said if words])

    def close(self) -> None:
        """See `Progress`."""
        self._draw(self._line())


class _Line:
    """What a notebook shows: a bar and words, or words alone where there is no HTML."""

    def __init__(self, title: str, completed: int, total: int, said: list[str]) -> None:
        self._bar = f'<progress value="{completed}" max="{total}"></progress>'
        self._words = [f"step {completed}/{total}", *said]
        self._title = title

    def __repr__(self) -> str:
        return "  ".join([self._title, *self._words])

    def _repr_html_(self) -> str:
        words = " &nbsp; ".join(map(html.escape, self._words))
        return f"<div>{html.escape(self._title)} {self._bar} {words}</div>"


def progress_of(experiment: Experiment) -> Progress:
    """Return what shows the progress of a run that is about to start, in the place where it was started."""
    config = experiment.config
    steps, headline = experiment.mechanism.steps, experiment.task.chosen
    judged_by, timed = config.data.judged_by, not config.monitor.public_only
    if (display := notebooks_display()) is not None:
        return NotebookProgress(
            steps, headline, config.title, display=display, judged_by=judged_by, timed=timed
        )
    return ConsoleProgress(steps, headline, config.title, judged_by=judged_by, timed=timed)


def notebooks_display() -> Callable[..., Any] | None:
    """Return IPython's display where this process is the kernel of a notebook; None elsewhere.

    A kernel has imported IPython already, so nobody else needs to have it.
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if not hasattr(shell, "kernel"):  # IPython in a terminal has none
        return None
    found: Callable[..., Any] = importlib.import_module("IPython.display").display
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value
