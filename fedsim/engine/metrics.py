"""Where a run's numbers go: JSON lines, callbacks, writers from outside. (TensorBoard: `engine.board`; the
screen: `engine.progress`.)

They come tagged public or sensitive (fedsim.visibility). Sensitive ones (training loss, gradient norms,
times) are useful in simulation and never to be published: `public_only` drops them before a writer sees them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from fedsim import references
from fedsim.engine.checkpoint import write_atomic
from fedsim.registry import check_choice
from fedsim.report.plain import as_json
from fedsim.types import StepRecord
from fedsim.validate import InputError
from fedsim.visibility import Public, Sensitive, shown

_KNOWN = ("folder", "completed")


class Writer(Protocol):
    """One destination of metrics."""

    def write(self, record: StepRecord) -> None:
        """Take one step's numbers."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class JsonLines:
    """metrics.jsonl, one line a step; of a run that is resumed, lines after `completed` are cut off."""

    def __init__(self, path: Path, completed: int) -> None:
        kept = [as_json(line) + "\n" for line in read_steps(path) if line["step"] <= completed]
        write_atomic(path, "".join(kept).encode())
        self._handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 - close() ends it

    def write(self, record: StepRecord) -> None:
        line = {
            "step": record.step,
            "public": of_kind(Public, record.numbers),
            "sensitive": of_kind(Sensitive, record.numbers),
            "histograms": shown(record.histograms, public_only=False),
        }
        self._handle.write(as_json(line) + "\n")
        self._handle.flush()

    def close(self) -> None:
        self._handle.close()


class SamplesPage:
    """samples.html of a run: the newest samples, where a task says something in words."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, record: StepRecord) -> None:
        """See `Writer`."""
        if record.samples is None:
            return
        from fedsim.report import samples  # imports matplotlib

        public = isinstance(record.samples, Public)
        made = samples.page(record.step, record.samples.value, public=public)
        write_atomic(self._path, made.encode())

    def close(self) -> None:
        """See `Writer`."""


def check_writers(listed: Sequence[Any]) -> None:
    """Refuse writers from outside that `own_writers` would refuse, as far as they show it before they are
    made: that may leave files.

    Raises:
        InputError: no such class, options that do not fit, or one without `write` and `close`.
    """
    for entry in listed:
        choice = check_choice(entry, "monitor.writers")
        make = references.resolve(choice.name, "monitor.writers")
        references.fitting(make, choice.options, dict.fromkeys(_KNOWN), "monitor.writers")
        if isinstance(make, type):
            _refuse_unfit(make, choice.name)


def _refuse_unfit(writer: Any, name: str) -> None:
    if not callable(getattr(writer, "write", None)) or not callable(getattr(writer, "close", None)):
        raise InputError(f"monitor.writers: {name} must make an object with write and close.")


def own_writers(listed: Sequence[Any], folder: Path, completed: int) -> list[Writer]:
    """Return writers from outside, in their order.

    Args:
        listed: package.module:Class, or {name, options}; called with the options, and with `folder` (of the
            run) and `completed` (steps, on resuming above 0) where it has parameters of these names.

    Raises:
        InputError: no such class, options that do not fit, or what is made has no `write` and `close`.
    """
    made = []
    for entry in listed:
        choice = check_choice(entry, "monitor.writers")
        make = references.resolve(choice.name, "monitor.writers")
        known = dict(zip(_KNOWN, (folder, completed), strict=True))
        writer = references.called(make, choice.options, known, "monitor.writers")
        _refuse_unfit(writer, choice.name)
        made.append(writer)
    return made


class Watcher(Writer, Protocol):
    """A writer that can also be fed from a metrics.jsonl, where the run is another process's."""

    def update(self, completed: int, numbers: Mapping[str, float | None]) -> None:
        """Take in the numbers of step `completed`."""
        ...


class Callbacks:
    """Calls functions with (completed steps, numbers by name) after every step.

    Raises:
        InputError: one of them does not take these.
    """

    def __init__(self, functions: Sequence[Callable[[int, dict[str, float | None]], Any]]) -> None:
        _check_callbacks(functions)
        self._functions = list(functions)

    def write(self, record: StepRecord) -> None:
        """See `Writer`."""
        self.update(record.step, shown(record.numbers, public_only=False))

    def update(self, completed: int, numbers: Mapping[str, float | None]) -> None:
        """See `Watcher`."""
        for function in self._functions:
            function(completed, dict(numbers))

    def close(self) -> None:
        """See `Writer`."""


def _check_callbacks(callbacks: Sequence[Callable[..., Any]]) -> None:
    if callable(callbacks):
        raise InputError("callbacks must be a list of functions, got a single one. Write callbacks=[...].")
    for function in callbacks:
        if not callable(function):
            raise InputError(
                f"callbacks must be functions of (completed steps, numbers by name), got "
                f"{type(function).__name__}."
            )
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # of a function that is not Python's
            continue
        try:
            signature.bind(1, {})
        except TypeError as error:
            name = getattr(function, "__name__", type(function).__name__)
            raise InputError(
                f"callbacks must take (completed steps, numbers by name), but {name}{signature} does not: "
                f"{error}. Give it these two parameters."
            ) from error


class Metrics:
    """Fans one record out to all writers; the only place that decides what may leave."""

    def __init__(self, writers: Sequence[Writer], public_only: bool) -> None:
        self._writers = list(writers)
        self._public_only = public_only

    def write(self, record: StepRecord) -> None:
        """Send a step's numbers to every writer, without the sensitive ones in public-only mode."""
        if self._public_only:
            record = StepRecord(
                record.step,
                {name: value for name, value in record.numbers.items() if isinstance(value, Public)},
                {name: value for name, value in record.histograms.items() if isinstance(value, Public)},
                record.samples if isinstance(record.samples, Public) else None,
            )
        for writer in self._writers:
            writer.write(record)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.close()


def of_kind(kind: type[Public[Any] | Sensitive[Any]], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of one kind, without the tag."""
    return {name: tagged.value for name, tagged in numbers.items() if isinstance(tagged, kind)}


def numbers_of(line: Mapping[str, Any]) -> dict[str, float | None]:
    """Return all numbers of one line of `read_steps` by name, public and sensitive ones together."""
    return {**line["public"], **line["sensitive"]}


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, oldest first; a torn last line is left out."""
    if not path.exists():
        return []
    out = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            out.append(json.loads(text))
        except ValueError:
            continue  # the line a killed run was writing; metrics, unlike the ledger, carry no guarantee
    return out
