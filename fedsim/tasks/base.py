"""What a model is trained for: targets, a loss an example, metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim import references, validate
from fedsim.data.examples import ArrayDataset
from fedsim.data.targets import Targets
from fedsim.headline import RESERVED, Metric
from fedsim.validate import InputError

Measure = Callable[[Tensor, Tensor], Tensor]
"""(outputs (n, ...), targets (n, ...)) -> one number an example, (n,)."""


class Gauge(Protocol):
    """A metric that is no mean over examples: takes in outputs batch by batch, says one number at the end."""

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch: outputs (n, ...), values in the targets' own unit, and targets (n, ...)."""
        ...

    def result(self) -> float:
        """Return the number over everything taken in."""
        ...


Own = TypeVar("Own", bound=Callable[..., Any])


def metric(unit: str = "", higher_is_better: bool = True, name: str = "") -> Callable[[Own], Own]:
    """Say how a metric is shown, and which of two values is better.

    For a `Measure`, whose mean over examples is the metric, and for a class of `Gauge`s, of which every
    evaluation makes one, without arguments.

    Args:
        unit: as in `Metric`.
        higher_is_better: the direction.
        name: of the metric; "": that of the function or class.
    """

    def say(own: Own) -> Own:
        own.metric = Metric(name or own.__name__, unit, higher_is_better)  # type: ignore[attr-defined]
        return own

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


class WithGauges:
    """The meter of a task, and the user's gauges."""

    def __init__(self, task: Task) -> None:
        self._task, self._inner = task, task.meter()
        self._gauges = {metric.name: make() for metric, make in task.gauged}

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """See `Meter`."""
        self._inner.add(outputs, targets)
        for name, gauge in self._gauges.items():
            with _failing(name):
                gauge.add(self._task.predicted(outputs.clone()), targets.clone())

    def result(self) -> dict[str, float]:
        """See `Meter`."""
        found = self._inner.result()
        for name, gauge in self._gauges.items():
            with _failing(name):
                found[name] = float(gauge.result())
        return found


_SILENT = "task {} has no words for its answers: set speaks = False, or write in_words and targets_in_words."


@dataclass(frozen=True)
class Task(ABC):
    """What a model is trained for. A task of your own derives from this, or from one of fedsim's.

    Attributes:
        metrics: measures of your own beside the task's: functions (`Measure`) or classes (`Gauge`), or their
            names as package.module:Object.
        headline: name of the metric that tables, plots and progress show; "": the task's first.
    """

    kind: ClassVar[str] = "class"
    """The kind of targets it takes (`fedsim.data.targets.Targets`)."""
    own_metrics: ClassVar[tuple[Metric, ...]] = ()
    """The task's metrics, the headline first; `measures` gives a number an example of each."""

    metrics: list[Any] = field(default_factory=list)
    headline: str = ""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Give a task whose `__init__` is its own, and calls no other, the defaults of this class."""
        made = super().__new__(cls)
        object.__setattr__(made, "metrics", [])
        return made

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

    def shown(self, inputs: Tensor, targets: Tensor) -> Tensor | Mapping[str, Tensor]:
        """Return what the model is called with: the inputs, or named arrays where it is shown more.

        Args:
            inputs: (n, ...) of n views.
            targets: (n, ...) their targets, as `loss` gets them; what of one is shown must not tell the model
                what the loss asks.
        """
        return inputs

    @torch.no_grad()
    def answered(self, model: nn.Module, inputs: Tensor, blank: Tensor) -> Tensor:
        """Return the model's outputs (n, ...) for inputs (n, ...) whose targets nobody knows.

        Args:
            model: in eval mode.
            inputs: as the model takes them.
            blank: (n, ...) of the targets' form; what it holds has no meaning.
        """
        outputs: Tensor = model(inputs)
        return outputs

    def outputs(self, declared: Targets) -> int:
        """Return the width of the model's output for targets of this form."""
        return declared.size

    def strata(self, targets: NDArray[Any]) -> NDArray[np.int64] | None:
        """Return a label (N,) an example, by which partitions skew holders; None where there is none.

        By default the classes of a task for classes, and none for others.
        """
        classes = self.kind == "class" and targets.ndim == 1
        return targets.astype(np.int64, copy=False) if classes else None

    def strata_of(self, data: ArrayDataset) -> NDArray[np.int64] | None:
        """Return `strata` of all targets (N, ...) of a data set."""
        found = [part for part in data.of_targets(self.strata) if part is not None]
        return np.concatenate(found) if len(found) > 1 else next(iter(found), None)

    def predicted(self, outputs: Tensor) -> Tensor:
        """Return what the outputs (n, ...) say in the targets' own unit, for values."""
        return outputs

    speaks: ClassVar[bool] = False
    """Whether `in_words` and `targets_in_words` say something; they are asked of nobody else."""

    def in_words(self, answered: Tensor, declared: Targets) -> list[str]:
        """Return in words what outputs (n, ...) say of each example, as `answered` gives them."""
        raise NotImplementedError(_SILENT.format(type(self).__name__))

    def targets_in_words(self, targets: NDArray[Any], declared: Targets) -> list[str]:
        """Return in words what targets (n, ...) say."""
        raise NotImplementedError(_SILENT.format(type(self).__name__))

    def check_targets(self, targets: NDArray[Any]) -> None:  # noqa: B027 - most tasks ask nothing more
        """Refuse targets (N, ...) that break what the task's options declare of them.

        Raises:
            PrivateInputError: they do.
        """

    def check_outputs(self, outputs: Tensor) -> None:  # noqa: B027 - most losses take any numbers
        """Refuse what a new model says of made-up examples, (n, ...), where the loss takes something else.

        Raises:
            InputError: says what the loss takes.
        """

    def noticed(self, targets: NDArray[Any]) -> dict[str, int]:
        """Return how many examples, by what is odd about their targets (N, ...), there are: none is left out
        for it, and all of it is as private as the targets."""
        return {}

    def undefined(self, targets: NDArray[Any]) -> tuple[str, ...]:
        """Return the names of metrics that no model has on examples with these targets (N, ...)."""
        return ()

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
                f"{declared.kind!r}. Choose the task that goes with them{_of_kind(declared.kind)}, or "
                f"declare the targets as what they are; a task of your own sets kind = {declared.kind!r}."
            )
        self.chosen  # noqa: B018 - a headline that is no metric is refused here

    @property
    def measured(self) -> tuple[tuple[Metric, Measure], ...]:
        """The user's own metrics that are means over examples, with their functions."""
        return tuple(own for own in map(_of_user, self.metrics) if not isinstance(own[1], type))

    @property
    def gauged(self) -> tuple[tuple[Metric, Callable[[], Gauge]], ...]:
        """The user's own metrics that are none, with their classes."""
        return tuple(own for own in map(_of_user, self.metrics) if isinstance(own[1], type))

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """Every metric: the task's, the user's, and "loss"."""
        own: Any = self.own_metrics
        if not isinstance(own, tuple | list) or not all(isinstance(one, Metric) for one in own):
            raise InputError(
                f"own_metrics of task {type(self).__name__} must be a tuple of fedsim.headline.Metric, such "
                f"as (Metric('accuracy', '%'),), got {own!r}."
            )
        found = (*own, *(_of_user(given)[0] for given in self.metrics))
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
            InputError: `headline` names no metric, or one that does not say which way is better.
        """
        metrics = {metric.name: metric for metric in self.all_metrics}
        if not self.headline:
            return next(iter(metrics.values()))
        try:
            validate.one_of(self.headline, metrics, "task.options.headline")
        except InputError as error:
            raise InputError(f"{error} Add one of your own under task.options.metrics.") from None
        for given in self.metrics:
            metric, measure = _of_user(given)
            if metric.name == self.headline and not isinstance(getattr(measure, "metric", None), Metric):
                raise InputError(
                    f"task.options.headline={self.headline} must say which way is better, by which models "
                    "are judged and settings chosen. Write @fedsim.metric(higher_is_better=True), or False, "
                    "above it."
                )
        return metrics[self.headline]

    def all_measures(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return one number an example, (n,), of every metric that is a mean over examples."""
        found = {**self.measures(outputs, targets), "loss": self.loss(outputs, targets)}
        for metric, measure in self.measured:
            with _failing(metric.name):
                values = measure(self.predicted(outputs.clone()), targets.clone())  # and may write into them
            if not isinstance(values, Tensor) or values.shape != (len(targets),):
                shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise InputError(
                    f"metric {metric.name} must give one number an example, shape ({len(targets)},), got "
                    f"{shape}. Average over the other axes."
                )
            found[metric.name] = values
        return found


@contextmanager
def _failing(name: str) -> Iterator[None]:
    """Say which of the user's metrics it was that failed."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"metric {name} fails by {type(error).__name__}: {error}. Mend it.") from error


def _of_user(given: Any) -> tuple[Metric, Any]:
    measure = references.resolve(given, "task.options.metrics") if isinstance(given, str) else given
    unfit = isinstance(measure, type) and not all(
        callable(getattr(measure, n, None)) for n in ("add", "result")
    )
    if not callable(measure) or unfit:
        raise InputError(
            "task.options.metrics must list functions of (outputs, targets), classes with methods "
            f"add(outputs, targets) and result(), or package.module:Object, got {given!r}."
        )
    said = getattr(measure, "metric", None)
    return said if isinstance(said, Metric) else Metric(getattr(measure, "__name__", str(given))), measure


def finite_rows(outputs: Tensor) -> Tensor:
    """Return which examples (n,) have finite outputs only: others count as wrong."""
    return torch.isfinite(outputs).flatten(1).all(1)


def _of_kind(kind: str) -> str:
    """The tasks of ours that are about targets of a kind, as part of a sentence."""
    from fedsim.tasks import TASKS

    names = [name for name, task in TASKS.own().items() if task.kind == kind]
    return f" (task.name={' or '.join(names)})" if names else ""
