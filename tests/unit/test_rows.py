"""Cells of table files, and the source that reads them."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsim.config import DataConfig
from fedsim.data import datasets, rows
from fedsim.validate import InputError


def test_a_long_text_in_a_csv_is_read(tmp_path: Path) -> None:
    file, text = tmp_path / "texts.csv", "long text\n" * 20_000
    with open(file, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["text", "target"], [text, "spam"]])
    before = csv.field_size_limit()
    assert rows.read(file, ["text"]) == {"text": [text]}
    assert csv.field_size_limit() == before


def test_parquet_is_read_by_the_columns_that_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column that nobody asked for is not read, and one that is not there is named."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, asked = tmp_path / "pairs.parquet", []
    columns = {"caption": ["a dog", None], "size": [3, 4], "image": [{"bytes": b"x"}, {"bytes": None}]}
    parquet.write_table(pyarrow.table({**columns, "large": ["x" * 1000] * 2}), path)
    real = parquet.ParquetFile.read

    def read(self: object, columns: list[str]) -> object:
        asked.append(columns)
        return real(self, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "read", read)
    assert rows.read(path, ["image", "caption"]) == {name: columns[name] for name in ("image", "caption")}
    assert asked == [["image", "caption"]]
    with pytest.raises(InputError, match=r"has no column 'captions'. Did you mean 'caption'"):
        rows.read(path, ["captions"])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"must be a readable \.parquet file"):
        rows.read(path, ["caption"])


def test_parquet_without_its_package_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"pip install 'fedsim\[parquet\]'"):
        rows.read(tmp_path / "pairs.parquet", ["caption"])


def test_a_table_is_chosen_by_configuration(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("school,age,kind,score\nb,4,y,1.5\na,9,x,2\n")
    options = {"numbers": {"age": [0, 8]}, "words": {"kind": ["x", "y"]}, "target": "score"}
    config = DataConfig("table", {**options, "holder": "school"}, str(tmp_path))
    train = datasets.load(config).train
    assert train.inputs.tolist() == [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    assert train.groups is not None
    assert train.groups.tolist() == [1, 0]
    assert np.array_equal(train.targets, [[1.5], [2.0]])
    with pytest.raises(InputError, match="must declare its columns"):
        datasets.load(DataConfig("table", {"target": "score"}, str(tmp_path)))
