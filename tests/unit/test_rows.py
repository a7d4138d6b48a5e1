"""Cells of table files."""

from __future__ import annotations

import csv
from pathlib import Path

from fedsim.data import rows


def test_a_long_text_in_a_csv_is_read(tmp_path: Path) -> None:
    file, text = tmp_path / "texts.csv", "long text\n" * 20_000
    with open(file, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["text", "target"], [text, "spam"]])
    before = csv.field_size_limit()
    assert rows.read(file, ["text"]) == {"text": [text]}
    assert csv.field_size_limit() == before
