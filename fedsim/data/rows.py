"""Columns of table files: CSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data.targets import Targets
from fedsim.partitions.base import as_numbers
from fedsim.validate import InputError, PrivateInputError

Columns = dict[str, list[Any]]
SUFFIXES = (".csv", ".jsonl", ".parquet")
LONGEST_CELL = 2**31 - 1  # characters; csv's own limit of 131,072 is below a long text


def read(path: Path, wanted: Sequence[str]) -> Columns:
    """Return the wanted columns of a file, row by row; cells of CSV are words, others what the file has.

    Raises:
        InputError: a file that is missing, damaged or of another kind, or lacks a column.
    """
    validate.one_of(path.suffix, SUFFIXES, f"the ending of {path.name}")
    try:
        if path.suffix == ".parquet":
            return _parquet(path, wanted)
        found = _csv(path) if path.suffix == ".csv" else _jsonl(path)
    except InputError:
        raise
    except Exception as error:  # every format has its own errors
        raise InputError(f"{path} must be a readable {path.suffix} file: {error}.") from error
    _check_names(path, wanted, found)
    return {name: found[name] for name in wanted}


def _check_names(path: Path, wanted: Sequence[str], there: Collection[str]) -> None:
    for name in wanted:
        if name not in there:
            raise InputError(f"{path} has no column {name!r}. {_columns(name, there, path)}")


def _columns(name: str, there: Collection[str], path: Path) -> str:
    """The column that was meant, or those there are; one name with blanks in it says how cells are parted."""
    if len(there) == 1 and path.suffix == ".csv" and (parted := re.search(r"[;\t|]", next(iter(there)))):
        return f"Its first line is {next(iter(there))!r}: part cells by commas, not by {parted[0]!r}."
    return validate.did_you_mean(name, there) or f"It has {', '.join(map(repr, list(there)[:12]))}."


def _csv(path: Path) -> Columns:
    before = csv.field_size_limit(LONGEST_CELL)  # of the process
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, strict=True)
            names = list(reader.fieldnames or [])
            if len(set(names)) != len(names):
                raise InputError(f"{path}: every column must have a name of its own, got {names}.")
            rows = list(reader)
    finally:
        csv.field_size_limit(before)
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise InputError(f"{path}: every row must have {len(names)} cells, row {number} has not.")
    return {name: [row[name] for row in rows] for name in names}


def _jsonl(path: Path) -> Columns:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if any(not isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: every line must be a JSON object.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet(path: Path, wanted: Sequence[str]) -> Columns:
    """Read the wanted columns alone: a file may have others, of any size."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(
            f"{path} needs the package pyarrow: {error}. Run pip install 'fedsim[parquet]'."
        ) from error
    with parquet.ParquetFile(path) as file:
        _check_names(path, wanted, file.schema_arrow.names)
        found = file.read(columns=list(wanted))
    return {name: found.column(name).to_pylist() for name in wanted}


def spoken(cell: Any) -> str | None:
    """Return a cell as a text, or None where it is neither a text nor a number: of a list of texts, nobody
    says which is meant."""
    return str(cell) if isinstance(cell, str | int | float) and not isinstance(cell, bool) else None


def number(cell: Any, where: str) -> float:
    """Return a cell as a number, NaN for an empty one.

    Raises:
        PrivateInputError: it is a word.
    """
    if cell is None or cell == "":
        return float("nan")
    try:
        return float(cell)
    except (TypeError, ValueError):
        expected = f"{where} must hold numbers"
        raise PrivateInputError(f"{expected}, got {cell!r}.", f"{expected}.") from None


def scaled(cells: Sequence[Any], low: float, high: float, where: str) -> NDArray[np.float32]:
    """Return numbers (N,) on [-1, 1] by their declared range: cut off at its ends, 0 for an empty cell."""
    values = np.array([number(cell, where) for cell in cells], dtype=np.float64)
    placed = np.clip((values - low) / (high - low), 0.0, 1.0) * 2.0 - 1.0
    return np.where(np.isnan(placed), 0.0, placed).astype(np.float32)


def one_hot(cells: Sequence[Any], words: Sequence[str]) -> NDArray[np.float32]:
    """Return (N, words): 1 for the declared word a cell has, nothing where it has another or none."""
    places = {word: index for index, word in enumerate(words)}
    out = np.zeros((len(cells), len(words)), dtype=np.float32)
    for row, cell in enumerate(cells):
        if (place := places.get(str(cell).strip())) is not None:
            out[row, place] = 1.0
    return out


def classes(cells: Sequence[Any], words: Sequence[str], where: str) -> tuple[NDArray[np.int64], Targets]:
    """Return the declared class (N,) of each cell, and the declaration.

    Raises:
        PrivateInputError: a cell is no declared class.
    """
    if any(isinstance(word, bool) for word in words):
        raise InputError(
            f"{where}: classes must be words, got {list(words)}: YAML reads yes, no, true and false as truth "
            "values. Put them in quotes."
        )
    places = {str(word): index for index, word in enumerate(words)}
    if len(places) != len(words):
        raise InputError(f"{where}: classes must be different words, got {list(words)}.")
    found = [places.get(str(cell)) for cell in cells]
    if None in found:
        expected = f"{where} must be one of the declared classes {', '.join(places)}"
        remedy = "Declare all there can be, written as they are there."
        raise PrivateInputError(
            f"{expected}, got {cells[found.index(None)]!r}. {remedy}", f"{expected}. {remedy}"
        )
    return np.array(found, dtype=np.int64), Targets("class", len(words), tuple(places))


def classes_of_words(words: NDArray[Any], declared: Targets, where: str) -> NDArray[np.int64]:
    """Return targets (N,) that are words as their numbers among the declared names.

    Raises:
        InputError: no classes with names are declared, or a word is none of them.
    """
    if declared.kind != "class" or not declared.names:
        raise InputError(f"{where} are words, so the classes must be named, in their order: names=[...].")
    return classes(words.tolist(), declared.names, where)[0]


def numbered(cells: Sequence[Any], where: str) -> NDArray[np.int64]:
    """Return owners of any words as numbers (N,) in their sorted order.

    Raises:
        PrivateInputError: a cell is empty.
    """
    if any(cell is None or str(cell).strip() == "" for cell in cells):
        expected = f"{where} must name the holder of every row"
        raise PrivateInputError(
            f"{expected}, and is empty in some. Name it, or leave such rows out.", f"{expected}."
        )
    return as_numbers([str(cell) for cell in cells])
