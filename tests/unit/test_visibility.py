"""Public or sensitive as a type: untagged is refused, and a tag goes with what is computed from a value."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedsim.engine.metrics import JsonLines, Metrics
from fedsim.report.plain import as_json
from fedsim.types import StepRecord
from fedsim.visibility import Public, Sensitive, sensitive_names, shown


def strict(text: str) -> object:
    """Parse JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_tag_goes_with_what_is_computed() -> None:
    assert Public(3).map(float) == Public(3.0)
    assert Sensitive(3).map(float) == Sensitive(3.0)
    assert Sensitive(3) != Public(3)


def test_a_sensitive_value_is_not_in_its_text() -> None:
    assert "8675309" not in f"{Sensitive(8675309)} {Sensitive(8675309)!r} {[Sensitive(8675309)]}"


def test_sensitive_entries_are_left_out_at_any_depth() -> None:
    tree = {"a": Public(1), "b": {"c": Sensitive(2), "d": Public(3)}, "e": Sensitive({"f": 4})}
    assert shown(tree, public_only=True) == {"a": 1, "b": {"d": 3}}
    assert shown(tree, public_only=False) == {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}}
    assert sensitive_names(tree) == ["b.c", "e"]


def test_what_is_not_tagged_is_refused_without_its_value() -> None:
    with pytest.raises(TypeError, match="'train_loss' must be Public or Sensitive") as caught:
        StepRecord(1, {"train_loss": 8675309.0})  # type: ignore[dict-item]
    assert "8675309" not in str(caught.value)
    with pytest.raises(TypeError, match="gradient_norm"):
        StepRecord(1, {}, {"gradient_norm": ((1.0, 2.0), (3.0,))})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="inner"):
        shown({"outer": {"inner": 1.0}}, public_only=False)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    numbers = {"a": Public(math.nan), "b": Sensitive(math.inf), "c": Sensitive(None), "d": Public(0.5)}
    for _ in range(2):  # a resumed run writes the lines of the first one anew
        with Metrics([JsonLines(tmp_path / "metrics.jsonl", 1)], public_only=False) as metrics:
            metrics.write(StepRecord(2, numbers))
    with Metrics([JsonLines(tmp_path / "metrics.jsonl", 2)], public_only=False):
        pass
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    held = strict(line)
    assert isinstance(held, dict)
    assert held["public"] == {"a": None, "d": 0.5}
    assert held["sensitive"] == {"b": None, "c": None}
    assert strict(as_json({"x": (math.inf, [-math.inf]), "y": 1})) == {"x": [None, [None]], "y": 1}
