"""Rows of a table with declared columns."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data import rows
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.sources import SOURCES
from fedsim.data.sources.base import Source
from fedsim.data.targets import Targets
from fedsim.validate import InputError, PrivateInputError

_log = logging.getLogger(__name__)


@SOURCES.register("table")
@dataclass(frozen=True)
class Table(Source):
    """Rows of CSV, JSON lines or Parquet files with declared columns: numbers by range, words by list.

    What a column can hold is declared, because what it does hold is private: a number is put on [-1, 1] by
    its range, and cut off at the ends; a word is 1 in its own place; an empty number is the middle of its
    range, and a word that is not declared is nothing.

    Attributes:
        train, test: files below data.root.
        numbers: column -> [low, high].
        words: column -> [word, ...].
        target: column to predict, or several numbers or labels.
        classes: of a target of words, declared in the order of their numbers; null: the target is numbers.
        labels: whether the target's columns are labels of 0 and 1.
        target_range: [low, high] that a target of numbers is cut off at.
        holder: column of the natural owner of a row, for federation.partition=natural.
    """

    train: str = "train.csv"
    test: str = "test.csv"
    numbers: dict[str, Any] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)
    target: Any = None
    classes: list[Any] = field(default_factory=list)
    labels: bool = False
    target_range: list[float] = field(default_factory=list)
    holder: str | None = None

    def __post_init__(self) -> None:
        for name, given in self.numbers.items():
            if not isinstance(given, list) or len(given) != 2 or not _below(*given):
                raise InputError(f"data.options.numbers.{name} must be [low, high], got {given!r}.")
        for name, given in self.words.items():
            if not isinstance(given, list) or not given or len(set(map(str, given))) != len(given):
                raise InputError(f"data.options.words.{name} must list different words, got {given!r}.")
        if not self.numbers and not self.words:
            raise InputError(
                "table must declare its columns, got none. Set data.options.numbers to their ranges, such as "
                "{age: [18, 95]}, or data.options.words to their words, such as {ward: [eyes, heart]}."
            )
        if not self.targets:
            raise InputError("data.options.target must name the column to predict, got none.")
        if self.classes and (self.labels or len(self.targets) > 1):
            raise InputError("data.options.classes goes with one target column and without labels.")
        if self.target_range and (self.classes or self.labels):
            raise InputError("data.options.target_range goes with a target of numbers: leave it out.")
        if self.target_range and (len(self.target_range) != 2 or not _below(*self.target_range)):
            raise InputError(f"data.options.target_range must be [low, high], got {self.target_range}.")
        used = [*self.numbers, *self.words, *self.targets]
        if len(set(used)) != len(used):
            raise InputError(f"every column must be declared once, numbers, words or target, got {used}.")

    @property
    def targets(self) -> list[str]:
        """The target's columns."""
        return [self.target] if isinstance(self.target, str) else list(self.target or [])

    def assumed_public(self) -> tuple[str, ...]:
        """See `Source.assumed_public`."""
        said = []
        if self.numbers:
            said.append(f"the declared ranges of {', '.join(self.numbers)}")
        if self.words:
            said.append(f"the declared words of {', '.join(self.words)}")
        if self.target_range:
            said.append(f"the declared range of {', '.join(self.targets)}")
        return tuple(said)

    def load(self, root: Path) -> Splits:
        """See `Source.load`.

        Raises:
            InputError: files or columns that are missing, cells that are no numbers or no declared class.
        """
        splits = Splits(self._split(root / self.train, own=True), self._split(root / self.test, own=False))
        self._warn(splits.test, root / self.test)
        return splits

    def _warn(self, test: ArrayDataset, path: Path) -> None:
        """Say which columns tell nothing in the test split, which is public: wrongly declared, it seems."""
        place, (inputs, _) = len(self.numbers), test.read(slice(None))
        for index, name in enumerate(self.numbers):
            if len(test) > 1 and np.ptp(inputs[:, index]) == 0:
                _log.warning("%s: column %s is one value by data.options.numbers in every row.", path, name)
        for name, words in self.words.items():
            if not inputs[:, place : place + len(words)].any():
                _log.warning("%s: column %s has none of the words of data.options.words.", path, name)
            place += len(words)

    def _split(self, path: Path, own: bool) -> ArrayDataset:
        owner = [self.holder] if self.holder is not None and own else []
        found = rows.read(path, [*self.numbers, *self.words, *self.targets, *owner])
        groups = rows.numbered(found[owner[0]], f"{path}: {owner[0]}") if owner else None
        wanted, declared = self._wanted(path, found)
        return ArrayDataset("table", self._inputs(path, found), wanted, groups, declared)

    def inputs(self, path: Path) -> tuple[list[str], NDArray[np.float32]]:
        """See `Source.inputs`: the rows of a file with the declared columns, named by their numbers."""
        found = self._inputs(path, rows.read(path, [*self.numbers, *self.words]))
        return [str(row) for row in range(len(found))], found

    def _inputs(self, path: Path, found: rows.Columns) -> NDArray[np.float32]:
        parts = [
            rows.scaled(found[name], float(low), float(high), f"{path}: {name}")[:, None]
            for name, (low, high) in self.numbers.items()
        ]
        parts += [rows.one_hot(found[name], [str(w) for w in words]) for name, words in self.words.items()]
        return np.concatenate(parts, axis=1)

    def _wanted(self, path: Path, found: rows.Columns) -> tuple[Any, Targets]:
        names = self.targets
        if self.classes:
            return rows.classes(found[names[0]], self.classes, f"{path}: {names[0]}")
        columns = [[rows.number(cell, f"{path}: {name}") for cell in found[name]] for name in names]
        values = np.array(columns, dtype=np.float64).T
        if np.isnan(values).any():
            expected = f"{path}: {', '.join(names)} must have a number in every row"
            raise PrivateInputError(
                f"{expected}, row {int(np.isnan(values).any(1).argmax())} has none.", expected
            )
        if self.labels:
            if not np.isin(values, (0.0, 1.0)).all():
                expected = f"{path}: labels must be 0 or 1"
                raise PrivateInputError(f"{expected}, got others.", expected)
            return values.astype(np.uint8), Targets("labels", len(names), tuple(names))
        if self.target_range:
            values = values.clip(self.target_range[0], self.target_range[1])
        return values, Targets("values", len(names), tuple(names))


def _below(low: Any, high: Any) -> bool:
    return isinstance(low, int | float) and isinstance(high, int | float) and low < high
