"""What a model is trained for: targets, a loss an example, metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import references, validate
from fedsim.data.targets import Targets
from fedsim.headline import RESERVED, Metric
from fedsim.validate import InputError

Measure = Callable[[Tensor, Tensor], Tensor]
"""(outputs (n, ...), targets (n, ...)) -> one number an example, (n,)."""


def metric(unit: str = "", higher_is_better: bool = True) -> Callable[[Measure], Measure]:
    """Say how the values of the decorated `Measure` are shown, and which of two is better."""

    def say(measure: Measure) -> Measure:
        measure.metric = Metric(measure.__name__, unit, higher_is_better)  # type: ignore[attr-defined]
        return measure

    return say


class Meter(Protocol):
    """Takes in outputs batch by batch, without waiting for a device, and says the metrics at the end."""

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch: outputs (n, ...) and targets (n, ...)."""
        ...

    def result(self) -> dict[str, float]:
        """Return the value of each metric over everything taken in."""
        ...


class Means:
    """The means over examples of what `Task.measures` says of each."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._sums: dict[str, Tensor] = {}
        self._examples = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """See `Meter`."""
        for name, values in self._task.all_measures(outputs, targets).items():
            total = values.double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._examples += len(targets)

    def result(self) -> dict[str, float]:
        """See `Meter`."""
        return {name: float(total) / self._examples for name, total in self._sums.items()}


@dataclass(frozen=True)
class Task(ABC):
    """What a model is trained for. A task of your own derives from this, or from one of fedsim's.

    Attributes:
        metrics: measures of your own beside the task's: functions (`Measure`), or package.module:function.
        headline: name of the metric that tables, plots and progress show; "": the task's first.
    """

    kind: ClassVar[str] = "class"
    """The kind of targets it takes (`fedsim.data.targets.Targets`)."""
    own_metrics: ClassVar[tuple[Metric, ...]] = ()
    """The task's metrics, the headline first; `measures` gives a number an example of each."""

    metrics: list[Any] = field(default_factory=list)
    headline: str = ""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss an example, (n,): what is differentiated, clipped and averaged over views.

        Args:
            outputs: what the model returns for n views.
            targets: (n, ...) targets as `Targets` has them, floats in the model's dtype.
        """

    @abstractmethod
    def measures(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Return, by the names of `own_metrics`, one number an example, (n,), whose mean is the metric."""

    def outputs(self, declared: Targets) -> int:
        """Return the width of the model's output for targets of this form."""
        return declared.size

    def strata(self, targets: NDArray[Any]) -> NDArray[np.int64] | None:
        """Return a label (N,) an example, by which partitions skew holders; None where there is none."""
        return None

    def predicted(self, outputs: Tensor) -> Tensor:
        """Return what the outputs (n, ...) say in the targets' own unit, for values."""
        return outputs

    def check_targets(self, targets: NDArray[Any]) -> None:  # noqa: B027 - most tasks ask nothing more
        """Refuse targets (N, ...) that break what the task's options declare of them.

        Raises:
            PrivateInputError: they do.
        """

    def meter(self) -> Meter:
        """Return a new meter of all metrics."""
        return Means(self)

    def check(self, declared: Targets) -> None:
        """Refuse targets that the task is not about.

        Raises:
            InputError: says which tasks they go with.
        """
        if declared.kind != self.kind:
            raise InputError(
                f"task {type(self).__name__} must have targets of kind {self.kind!r}, but the data has "
                f"{declared.kind!r}. Choose the task that goes with them, or other data."
            )
        self.chosen  # noqa: B018 - a headline that is no metric is refused here

    @property
    def measured(self) -> tuple[tuple[Metric, Measure], ...]:
        """The user's own metrics with their functions."""
        return tuple(_of_user(given) for given in self.metrics)

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """Every metric: the task's, the user's, and "loss"."""
        found = (*self.own_metrics, *(metric for metric, _ in self.measured))
        names = [metric.name for metric in found]
        if len(set(names)) != len(names) or RESERVED & set(names):
            raise InputError(
                f"task.options.metrics must have names of their own, got {', '.join(names)}: a result has "
                f"other numbers called {', '.join(sorted(RESERVED & set(names))) or 'so'}. Rename functions."
            )
        return (*found, Metric("loss", higher_is_better=False))

    @property
    def chosen(self) -> Metric:
        """The headline.

        Raises:
            InputError: `headline` names no metric.
        """
        metrics = {metric.name: metric for metric in self.all_metrics}
        if not self.headline:
            return next(iter(metrics.values()))
        validate.one_of(self.headline, metrics, "task.options.headline")
        return metrics[self.headline]

    def all_measures(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return one number an example, (n,), of every metric that is a mean over examples."""
        found = {**self.measures(outputs, targets), "loss": self.loss(outputs, targets)}
        for metric, measure in self.measured:
            values = measure(outputs.clone(), targets.clone())  # which may write into what it is given
            if not isinstance(values, Tensor) or values.shape != (len(targets),):
                shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise InputError(
                    f"metric {metric.name} must give one number an example, shape ({len(targets)},), got "
                    f"{shape}. Average over the other axes."
                )
            found[metric.name] = values
        return found


def _of_user(given: Any) -> tuple[Metric, Measure]:
    measure = references.resolve(given, "task.options.metrics") if isinstance(given, str) else given
    if not callable(measure):
        raise InputError(
            "task.options.metrics must list functions of (outputs, targets), or package.module:function, "
            f"got {given!r}."
        )
    said = getattr(measure, "metric", None)
    return said if isinstance(said, Metric) else Metric(getattr(measure, "__name__", str(given))), measure


def finite_rows(outputs: Tensor) -> Tensor:
    """Return which examples (n,) have finite outputs only: others count as wrong."""
    return torch.isfinite(outputs).flatten(1).all(1)
