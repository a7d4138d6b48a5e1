"""Images that the rows of a table name, with their targets: ROOT/TABLE and the files below ROOT.

Every row is an example, or is left out by a column that the options name; nothing else is: an image that is
not there, a label without a declared meaning, or an image named twice is refused by file and row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data import rows
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.sources import SOURCES
from fedsim.data.sources.image_files import ImageFiles
from fedsim.data.targets import Targets, class_words
from fedsim.partitions.base import as_numbers
from fedsim.rules import SET, read_with
from fedsim.validate import InputError, PrivateInputError

UNCERTAIN = -1.0
"""How CheXpert writes that a finding may be there or not."""


@SOURCES.register("image_table")
@dataclass(frozen=True)
class ImageTable(ImageFiles):
    """Images that the rows of a CSV, JSON lines or Parquet file name, with a class or several labels each.

    Attributes:
        train, test: tables below data.root.
        path: column of the image's file, with / between folders.
        strip: what every path starts with and the files below data.root do not.
        train_folder, test_folder: folder below data.root in which the paths of a table start.
        suffix: ending that the paths lack, such as ".jpeg".
        target: column of the class.
        classes: of the target: declared words in the order of their numbers, or how many there are, written
            as 0, 1, ...
        labels: instead, columns of labels, 1 where an image has one and 0 where not.
        blank: 0 or 1 for an empty cell of a label; null: there is none.
        uncertain: 0 or 1 for a label of -1; null: there is none.
        uncertain_of: label -> 0 or 1, where it is another than `uncertain`.
        only: column -> the value of the rows to use, of both tables; others are left out.
        holder: column of the natural owner of a row, for federation.partition=natural.
        holder_in_path: instead, a regular expression with one group: the owner, where it is first found in
            the path, such as (patient[0-9]+)/.
    """

    train: str = "train.csv"
    test: str = "test.csv"
    path: str = "path"
    strip: str = ""
    train_folder: str = ""
    test_folder: str = ""
    suffix: str = ""
    target: str | None = field(default=None, metadata=read_with(classes=SET))
    classes: Any = None
    labels: list[str] = field(default_factory=list)
    blank: int | None = field(default=None, metadata=read_with(labels=SET))
    uncertain: int | None = field(default=None, metadata=read_with(labels=SET))
    uncertain_of: dict[str, Any] = field(default_factory=dict, metadata=read_with(labels=SET))
    only: dict[str, Any] = field(default_factory=dict)
    holder: str | None = None
    holder_in_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.target is None) == (not self.labels):
            raise InputError(
                "image_table must declare its targets: data.options.target, the column of a class, with "
                f"classes, or labels, columns of 0 and 1, got target {self.target!r}, labels {self.labels}."
            )
        if self.target is not None and not self.words:
            raise InputError(
                "data.options.classes must list different words, or be a number above 0, for the target "
                f"{self.target!r}, got {self.classes!r}. Which classes there can be is declared: which there "
                "are is private."
            )
        if self.labels and self.classes is not None:
            raise InputError("data.options.classes goes with a target and not with labels: leave it out.")
        if len(set(self.labels)) != len(self.labels):
            raise InputError(f"data.options.labels must be different columns, got {self.labels}.")
        self._check_rules()
        self._check_owner()

    def _check_rules(self) -> None:
        """Refuse meanings of cells that are none."""
        if not (self.blank is None or _bit(self.blank)):
            raise InputError(f"data.options.blank must be 0, 1 or null, got {self.blank!r}.")
        if not (self.uncertain is None or _bit(self.uncertain)):
            raise InputError(f"data.options.uncertain must be 0, 1 or null, got {self.uncertain!r}.")
        for label, meaning in self.uncertain_of.items():
            validate.one_of(label, self.labels, "every label of data.options.uncertain_of")
            if not _bit(meaning):
                raise InputError(f"data.options.uncertain_of.{label} must be 0 or 1, got {meaning!r}.")

        for column, value in self.only.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise InputError(
                    f"data.options.only.{column} must be a word or a number, got {value!r}: YAML reads yes, "
                    "no, true and false as truth values. Put it in quotes."
                )

    def _check_owner(self) -> None:
        if self.holder_in_path is None:
            return
        if self.holder is not None:
            raise InputError("data.options.holder and holder_in_path both name the owner: leave one out.")
        try:
            groups = re.compile(self.holder_in_path).groups
        except re.error as error:
            raise InputError(
                f"data.options.holder_in_path must be a regular expression, got {self.holder_in_path!r}: "
                f"{error}."
            ) from error
        if groups != 1:
            raise InputError(
                "data.options.holder_in_path must have one group, the owner, as in (patient[0-9]+)/, got "
                f"{self.holder_in_path!r} with {groups}."
            )

    @property
    def words(self) -> tuple[str, ...]:
        """The declared classes as cells have them; none where the declaration is no such thing."""
        return class_words(self.classes)

    def load(self, root: Path) -> Splits:
        """See `Source.load`: the order is that of the rows.

        Raises:
            InputError: tables or columns that are missing, and too many images for the memory.
            PrivateInputError: a row whose image, target or owner is not as declared; names file and row.
        """
        train = _Rows(root / self.train, self, own=True)
        test = _Rows(root / self.test, self, own=False)
        seen: dict[str, str] = {}
        train_files = train.files(root, self.train_folder, seen)
        test_files = test.files(root, self.test_folder, seen)
        first = train.dataset(root, train_files, None)
        return Splits(first, test.dataset(root, test_files, first.inputs.shape[1:]))


class _Rows:
    """The rows of one table that are used, and what they say.

    Args:
        path: of the table.
        source: the options.
        own: whether owners are read; those of the public split are not asked for.
    """

    def __init__(self, path: Path, source: ImageTable, own: bool) -> None:
        self._path, self._source, self._own = path, source, own
        owner = [source.holder] if source.holder is not None and own else []
        target = [] if source.target is None else [source.target]
        read = rows.read(path, [source.path, *target, *source.labels, *source.only, *owner])
        count = len(read[source.path])
        used = [
            row
            for row in range(count)
            if all(str(read[name][row]).strip() == str(value) for name, value in source.only.items())
        ]
        if not used:
            among = f" with {source.only} (data.options.only)" if source.only else ""
            raise InputError(f"{path} must have at least one row{among}, got none of {count}.")
        self._columns = {name: [cells[row] for row in used] for name, cells in read.items()}
        header = path.suffix == ".csv"
        self._numbers = [row + 1 + header for row in used]  # as an editor counts them

    def _wrong(self, row: int, expected: str, got: Any, remedy: str) -> PrivateInputError:
        """What is wrong with a row; in public only what is expected of every row."""
        return PrivateInputError(
            f"{self._said(row)}{expected}, got {got!r}. {remedy}", f"{self._path}: {expected}. {remedy}"
        )

    def _unreadable(self, row: int, error: InputError) -> PrivateInputError:
        expected = "every row must name a readable image, all of one size or brought to it"
        return PrivateInputError(
            f"{self._said(row)}{error}", f"{self._path}: {expected} by data.options.size."
        )

    def _said(self, row: int) -> str:
        return f"{self._path}, row {self._numbers[row]}: "

    def files(self, root: Path, folder: str, seen: dict[str, str]) -> list[Path]:
        """Return the images' files.

        Args:
            root: data.root.
            folder: below it, in which paths start.
            seen: real path -> where it was named; those found are added.
        """
        found: list[Path] = []
        for row, cell in enumerate(self._columns[self._source.path]):
            path = root / folder / self._below(row, cell)
            if not path.is_file():
                raise self._wrong(
                    row,
                    f"{self._source.path} must name a file below {root / folder}",
                    str(path),
                    "Set data.root to the data set's folder, or set data.options.strip, suffix, train_folder "
                    "or test_folder.",
                )
            real = os.path.realpath(path)
            if real in seen:
                raise self._wrong(
                    row,
                    "every image must be named once, or its example would count twice",
                    f"{path}, as {seen[real]}",
                    "Leave one of the rows out.",
                )
            seen[real] = self._said(row).removesuffix(": ")
            found.append(path)
        return found

    def _below(self, row: int, cell: Any) -> str:
        """The path that a cell says, from the folder in which paths start."""
        source, said = self._source, "" if cell is None else str(cell)
        if not said.startswith(source.strip):
            raise self._wrong(
                row,
                f"{source.path} must start with data.options.strip {source.strip!r}",
                said,
                "Mend the row, or the option.",
            )
        rest = said.removeprefix(source.strip)
        parts = PurePosixPath(rest).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in rest:
            raise self._wrong(
                row,
                f"{source.path} must be a path below data.root",
                said,
                "Name a file, without .. and without a / in front; data.options.strip takes off a beginning.",
            )
        return rest + source.suffix

    def dataset(self, root: Path, files: Sequence[Path], shape: tuple[int, ...] | None) -> ArrayDataset:
        """Return the examples; images that are decoded at once have `shape` (H, W, 3), by default that of the
        first."""
        targets, declared = self._targets()
        groups = self._owners() if self._own else None
        inputs, _ = self._source.images(root, [lambda: files], shape, self._unreadable, str(self._path))
        return ArrayDataset("image_table", inputs, targets, groups, declared, *self._source.constants)

    def _targets(self) -> tuple[NDArray[Any], Targets]:
        source = self._source
        if source.target is not None:
            places = {word: place for place, word in enumerate(source.words)}

            def place(row: int, cell: Any) -> int:
                if (found := places.get(str(cell).strip())) is None:
                    expected = f"{source.target} must be one of the declared classes {', '.join(places)}"
                    raise self._wrong(row, expected, cell, "Mend the row, or data.options.classes.")
                return found

            cells = self._columns[source.target]
            return self._each(cells, place).astype(np.int64), Targets("class", len(places), tuple(places))
        columns = [self._each(self._columns[name], self._meaning(name)) for name in source.labels]
        declared = Targets("labels", len(source.labels), tuple(source.labels))
        return np.stack(columns, axis=1).astype(np.uint8), declared

    def _each(self, cells: Sequence[Any], meaning: Callable[[int, Any], int]) -> NDArray[np.int64]:
        return np.array([meaning(row, cell) for row, cell in enumerate(cells)], dtype=np.int64)

    def _meaning(self, label: str) -> Callable[[int, Any], int]:
        """Return what a cell of a label means, by its row: 0 or 1."""
        source = self._source
        doubt = source.uncertain_of.get(label, source.uncertain)
        rules = {"": source.blank, UNCERTAIN: doubt, 0.0: 0, 1.0: 1}
        known = ["0", "1"] + ["-1"] * (doubt is not None) + ["empty"] * (source.blank is not None)

        def said(row: int, cell: Any) -> int:
            found = rules.get(_number(cell))
            if found is None:
                remedy = "data.options.blank says what an empty cell means, uncertain what -1 does."
                raise self._wrong(row, f"{label} must be one of {', '.join(known)}", cell, remedy)
            return found

        return said

    def _owners(self) -> NDArray[np.int64] | None:
        source = self._source
        if source.holder is not None:
            return rows.numbered(self._columns[source.holder], f"{self._path}: {source.holder}")
        if source.holder_in_path is None:
            return None
        found = []
        for row, cell in enumerate(self._columns[source.path]):
            match = re.search(source.holder_in_path, str(cell))
            if match is None or not match[1]:
                raise self._wrong(
                    row,
                    f"{source.path} must hold an owner by holder_in_path {source.holder_in_path!r}",
                    cell,
                    "Mend the row, or the expression.",
                )
            found.append(match[1])
        return as_numbers(found)


def _number(cell: Any) -> float | str:
    """A label's cell as a number; "" for an empty one, and the cell itself as a word for anything else."""
    word = "" if cell is None else str(cell).strip()
    try:
        value = float(word)
    except ValueError:
        return word
    return "" if isinstance(cell, float) and np.isnan(cell) else value  # how Parquet has an empty cell


def _bit(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in (0, 1)
