"""The gradient benchmark: rows measured again, where nothing read before is lost, and methods apart."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks import gradients
from benchmarks.gradients import _updated
from benchmarks.models import CASES
from benchmarks.peers import by_vmap, methods
from benchmarks.process import Process


def held(ratio: float, commit: str, models: tuple[str, ...], hardware: str = "a") -> dict[str, Any]:
    rows = [{"model": model, "views": 1, "ratios": {"ours": ratio}} for model in models]
    made_by = {"command": f"measure {commit}", "commit": commit}
    return {
        **made_by,
        "hardware": hardware,
        "seed": 0,
        "threads": 1,
        "retained_freed_memory": True,
        "as_installed": False,
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


def test_each_library_as_installed_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One turn of the smallest case, of three methods: what is fedsim's is measured both ways."""
    chosen = {name: make for name, make in methods("cpu", False).items() if name in ("non-private", "ours")}
    monkeypatch.setattr(gradients, "methods", lambda *_: {**chosen, "vmap": by_vmap})
    monkeypatch.setattr(gradients.jax_peer, "installed", lambda: False)
    arguments = argparse.Namespace(device="cpu", as_installed=True, repeats=1)
    row = gradients._row(CASES["linear-10"], 16, arguments)
    whole = {"non-private", "ours", "non-private, as a library", "ours, as a library", "vmap"}
    assert set(row["seconds"]) == whole
    assert all(turn > 0 for turns in row["seconds"].values() for turn in turns)


def test_a_process_that_cannot_begin_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"benchmarks\.gradients ended with exit code 1"):
        Process("benchmarks.gradients", "--serve", "no-such-model", "ours", "1", "1")
