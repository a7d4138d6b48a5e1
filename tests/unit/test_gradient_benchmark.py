"""Measuring some rows of the gradient benchmark again: nothing that was read before is lost."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gradients import _updated


def held(ratio: float, commit: str, models: tuple[str, ...], hardware: str = "a") -> dict[str, Any]:
    rows = [{"model": model, "views": 1, "ratios": {"ours": ratio}} for model in models]
    made_by = {"command": f"measure {commit}", "commit": commit}
    return {
        **made_by,
        "hardware": hardware,
        "seed": 0,
        "threads": 1,
        "retained_freed_memory": True,
        "rows": rows,
    }


def test_a_replaced_reading_stays_beside_the_new_one() -> None:
    once = _updated(held(1.2, "first", ("cnn", "vit")), held(1.0, "second", ("cnn",)))
    twice = _updated(once, held(0.9, "third", ("cnn",)))
    row = next(row for row in twice["rows"] if row["model"] == "cnn")
    readings = []
    while row is not None:
        readings.append((row["ratios"]["ours"], row.get("measured", {}).get("commit")))
        row = row.get("replaced")
    assert readings == [(0.9, "third"), (1.0, "second"), (1.2, None)]
    assert twice["commit"] == "first"
    assert [row["model"] for row in twice["rows"]] == ["cnn", "vit"]
    assert twice["rows"][1] == {"model": "vit", "views": 1, "ratios": {"ours": 1.2}}


def test_rows_of_another_machine_are_refused() -> None:
    with pytest.raises(SystemExit, match="hardware"):
        _updated(held(1.2, "first", ("cnn",)), held(1.0, "second", ("cnn",), hardware="b"))
