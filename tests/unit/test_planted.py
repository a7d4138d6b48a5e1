"""Planted defects: the table fits the code as it is, and only a test that fails has noticed anything."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import planted
from benchmarks.planted import Defect, measure
from tests.ids import ROOT, missing


def test_every_defect_of_the_table_can_be_planted() -> None:
    """Whoever changes a line that a defect stands on moves the defect with it."""
    held = planted.defects()
    assert len(held) >= 25
    for defect in held:
        defect.planted((ROOT / defect.file).read_text(encoding="utf-8"))
        assert not missing(defect.test), defect.name


def project(folder: Path) -> Path:
    """A package of one function, with a test that looks at it and one that does not."""
    (folder / "fedsim").mkdir(parents=True)
    (folder / "fedsim/__init__.py").write_text("")
    (folder / "fedsim/sums.py").write_text("def add(a, b):\n    return a + b\n")
    (folder / "test_sums.py").write_text(
        "from fedsim.sums import add\n\n\n"
        "def test_looks():\n    assert add(2, 3) == 5\n\n\n"
        "def test_does_not():\n    assert add(2, 2) == 4\n\n\n"
        "def test_fails():\n    assert add(2, 3) == 6\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def times(test: str, new: str = "a * b", old: str = "a + b") -> Defect:
    return Defect(f"{new} for {old}", "fedsim/sums.py", old, new, f"test_sums.py::{test}")


def test_a_defect_is_caught_by_a_failing_test_only(tmp_path: Path) -> None:
    source = project(tmp_path / "project")
    chosen = [times("test_looks"), times("test_does_not"), times("test_looks", "a +* b")]
    rows = list(measure(chosen, source, jobs=2))
    assert [row["caught"] for row in rows] == [True, False, False], "a file that cannot be read is no test"
    assert rows[0]["caught_by"] == "test_sums.py::test_looks"
    assert "6 == 5" in rows[0]["message"]
    assert (source / "fedsim/sums.py").read_text() == "def add(a, b):\n    return a + b\n", "never in place"


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (times("test_looks", old="a - b"), "found 0 times"),
        (times("test_looks", old="a"), "found 3 times"),
        (times("test_looks", new="a + b"), "the new text is the old one"),
        (times("test_fails"), "does not pass without any defect"),
        (times("test_that_is_not_there"), "does not pass without any defect"),
    ],
)
def test_what_shows_nothing_is_refused(defect: Defect, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(measure([defect], project(tmp_path)))


def test_names_are_unique(tmp_path: Path) -> None:
    entry = {"name": "x", "file": "f", "old": "a", "new": "b", "test": "t"}
    (tmp_path / "table.json").write_text(json.dumps([entry, entry]))
    with pytest.raises(ValueError, match="same name: x"):
        planted.defects(tmp_path / "table.json")


def test_every_test_that_the_table_of_situations_names_is_there() -> None:
    table = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[^`\s]+\.py::[^`]+)`", table)
    assert len(named) >= 60
    assert [test for test in named if missing(test)] == []


def test_rows_that_are_not_measured_again_stay_where_the_table_has_them(tmp_path: Path) -> None:
    entries = [{"name": n, "file": "f", "old": "a", "new": "b", "test": "t"} for n in "xyz"]
    (tmp_path / "table.json").write_text(json.dumps(entries))
    out = tmp_path / "out.json"
    for rows in ({"z": True, "gone": True}, {"x": False}):
        made = {name: {"name": name, "caught": caught} for name, caught in rows.items()}
        planted.write(out, {"commit": "c"}, made, tmp_path / "table.json")
    held = json.loads(out.read_text())
    assert [row["name"] for row in held["defects"]] == ["x", "z"]
    assert (held["planted"], held["caught"]) == (2, 1)
