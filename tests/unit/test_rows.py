"""Cells of table files, and the source that reads them."""

from __future__ import annotations

import csv
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
