"""Examples in docstrings are what comes out."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import fedsim

ROOT = Path(__file__).resolve().parents[2]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "fedsim").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_of_a_module(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("name", ["Data", "calibrate", "check", "epsilon", "train"])
def test_the_front_door_has_examples(name: str) -> None:
    assert ">>> " in getattr(fedsim, name).__doc__
