"""Generated tables: results become rows, claims stand beside what was reached, stale files are found."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from fedsim import loading
from fedsim.report import markers, results
from fedsim.report.claim import claim, number
from fedsim.validate import InputError
from tests.conftest import SMALL, command

HARDWARE = {"processor": "Some CPU", "cores": 2, "gpu": "none", "torch": "9.9"}
SPENT = {"value": 2.99, "delta": 1e-5, "relation": "add/remove one", "accountant": "pld", "note": ""}


def result(**more: Any) -> dict[str, Any]:
    held = {
        "kind": "recipe",
        "config": "de2022/fashion_cpu",
        "overrides": ["privacy.target_epsilon=3", "engine.threads=1"],
        "reference": {
            "paper": "A paper",
            "claims": [
                {"source": "B", "epsilon": 1, "accuracy": 50.0, "status": "verified"},
                {"source": "C", "epsilon": 3, "accuracy": 60.0, "accountant": "rdp", "status": "recalled"},
                {"source": "D", "epsilon": 2.7, "accuracy": 59.0, "status": "recalled"},
            ],
        },
        "evaluated_on": "test set",
        "data": {"name": "fashion_mnist"},
        "backend": "local",
        "holders": 100,
        "partition": "dirichlet(alpha=0.5, concentration=total)",
        "steps": 400,
        "target_epsilon": 3.0,
        "epsilon": {"example": SPENT, "holder": {**SPENT, "value": 5000.0}},
        "delta": 1e-5,
        "seeds": [0, 1],
        "headline": {"name": "accuracy", "unit": "%", "higher_is_better": True},
        "scores": [0.9, 0.91],
        "mean": 0.905,
        "minutes": 12.34,
        "command": "fedsim repeat x",
        "commit": "abc",
        "hardware": HARDWARE,
    }
    return {**held, **more}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    for name in (results.README, results.PAGE):
        (tmp_path / name).write_text(
            "before\n<!-- recipe-results -->\nold\n<!-- end recipe-results -->\nafter\n"
        )
    return tmp_path


def fedsim_results(project: Path, *more: str) -> int:
    return command(["results", "--project", str(project), *more])


def test_tables_hold_what_the_files_hold(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "results" / "fashion.json").write_text(json.dumps(result()))
    (project / "results" / "other.json").write_text(json.dumps({"rows": []}))
    assert fedsim_results(project, "--check") == 1
    assert "out of date: README.md, docs/results.md" in capsys.readouterr().err
    assert "old" in (project / "README.md").read_text(), "--check changes nothing"
    assert fedsim_results(project) == 0
    readme, page = ((project / name).read_text() for name in (results.README, results.PAGE))
    for text in (readme, page):
        assert text.startswith("before\n<!-- recipe-results -->\n")
        assert text.endswith("<!-- end recipe-results -->\nafter\n")
        assert "60 at 3 by rdp (C, recalled)" in text, "the claim at this budget, not another"
        assert "90.50 % (accuracy; 2 seeds, no interval)" in text
        assert "12.3" in text
        assert "engine.threads" not in text
        assert "`de2022/fashion_cpu privacy.target_epsilon=3`" in text
    assert "0: 90.00, 1: 91.00" in page
    assert "5000" not in page
    assert "### A paper" in page
    assert "`fedsim repeat x`, commit abc, Some CPU, 2 cores, torch 9.9." in page
    assert fedsim_results(project, "--check") == 0
    (project / "README.md").write_text(readme.replace("90.50", "95.50"))
    assert fedsim_results(project, "--check") == 1, "a number typed by hand is found"


def test_tuning_is_not_shown_as_a_result(project: Path) -> None:
    tuned = result(evaluated_on="held-out training examples")
    (project / "results" / "tuned.json").write_text(json.dumps(tuned))
    assert fedsim_results(project) == 0
    assert "Nothing measured yet" in (project / "README.md").read_text()
    assert "(held-out training examples)" in (project / "docs/results.md").read_text()


def test_a_source_that_reads_files_says_which() -> None:
    data = {"name": "table", "options": {"train": "exam/train.csv"}}
    assert results._data({"data": data}) == "table (exam/train.csv)"
    assert results._data({"data": {"name": "fashion_mnist", "options": {}}}) == "fashion_mnist"
    assert results._data({"data": {"name": "fashion_mnist"}}) == "fashion_mnist"


@pytest.mark.parametrize(
    ("headline", "scores", "text"),
    [
        (("accuracy", "%"), [0.900, 0.910, 0.905], "90.50 ± 1.24 % (accuracy)"),
        (("rmse", "points"), [2.481, 2.500, 2.490], "2.490 ± 0.024 points (rmse)"),
        (("rmse", ""), [1234.5], "1234 (rmse; 1 seed, no interval)"),
        (("loss", ""), [1.5e-9, 1.6e-9, 1.55e-9], "1.550e-09 ± 1.242e-10 (loss)"),
    ],
)
def test_what_is_reached_has_a_name_and_a_unit(
    headline: tuple[str, str], scores: list[float], text: str
) -> None:
    name, unit = headline
    about = {"name": name, "unit": unit, "higher_is_better": True}
    assert results._reached({"headline": about, "scores": scores, "mean": statistics.mean(scores)}) == text


def test_claims_of_a_row_of_a_paper() -> None:
    reference = {
        "paper": "P",
        "epsilon": 8,
        "accuracy": 79.5,
        "status": "recalled",
        "accuracy_status": "secondary",
    }
    found = results.claim_for(result(reference=reference, target_epsilon=8.0))
    assert found == results.Claim(79.5, 8, "P", "secondary", "unknown accountant", "secondary")
    assert results.claim_for(result(reference=reference, target_epsilon=1.0)) is None
    assert results.claim_for(result(reference={})) is None
    by_noise = result(reference=reference, target_epsilon=None, epsilon={"example": {**SPENT, "value": 7.93}})
    assert results.claim_for(by_noise) == found


def test_a_claim_says_who_accounted_and_how_sure_that_is(project: Path) -> None:
    claim = {"source": "C", "epsilon": 3, "accuracy": 60.0, "accountant": "rdp", "status": "verified"}
    reference = {"paper": "P", "claims": [{**claim, "accountant_status": "recalled"}]}
    (project / "results" / "one.json").write_text(json.dumps(result(reference=reference)))
    assert fedsim_results(project) == 0
    assert "60 at 3 by rdp (C, verified; accountant recalled)" in (project / "README.md").read_text()


def test_what_results_hold_of_their_configurations_is_what_these_say() -> None:
    """A corrected anchor is corrected in every table: what a paper claims is no measurement."""
    for name, held in results.read(Path(__file__).resolve().parents[2] / "results"):
        assert held["reference"] == loading.load(held["config"], held["overrides"]).reference, name


def test_what_repeat_writes_is_what_results_reads(project: Path) -> None:
    out = project / "results" / "tiny.json"
    given = ["repeat", "base", *SMALL, "--seeds", "5", "--results", str(out), "--out", str(project / "runs")]
    assert command(given) == 0
    assert fedsim_results(project) == 0
    assert "`base data.train_examples=400" in (project / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("headline", "accuracy"),
        ("headline", {}),
        ("hardware", {}),
        ("data", {}),
        ("scores", [0.5]),
        ("seeds", 3),
    ],
)
def test_results_of_another_shape_are_refused_by_name(
    name: str, value: object, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(__file__).resolve().parents[2] / "results" / "chem97.json"
    held = {**json.loads(source.read_text()), name: value}
    (project / "results" / "odd.json").write_text(json.dumps(held))
    assert fedsim_results(project) == 2
    said = capsys.readouterr().err
    assert "odd.json" in said
    assert "Make it again" in said
    assert "old" in (project / "README.md").read_text()


@pytest.mark.parametrize("content", ["{", json.dumps({"kind": "recipe", "config": "x"})])
def test_broken_results_are_refused(content: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "results" / "broken.json").write_text(content)
    assert fedsim_results(project) == 2
    assert "broken.json" in capsys.readouterr().err
    assert "old" in (project / "README.md").read_text()


@pytest.mark.parametrize(
    "text", ["no markers", "<!-- end a -->\n<!-- a -->", "<!-- a -->" * 2 + "<!-- end a -->"]
)
def test_markers_must_be_one_pair(text: str) -> None:
    with pytest.raises(InputError, match="exactly one pair"):
        markers.fill(text, {"a": lambda: "x\n"})


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must exist"):
        markers.update(tmp_path, {"README.md": {"a": lambda: "x\n"}})


def test_generated_text_may_hold_anything() -> None:
    """Backslashes and group references are text, not patterns."""
    made = "\\1 \\g<0> $&\n"
    assert (
        markers.fill("<!-- a --><!-- end a -->", {"a": lambda: made}) == f"<!-- a -->\n{made}<!-- end a -->"
    )


def test_epsilons_are_claimed_up_to_a_thousand() -> None:
    assert number(1000.0) == "1000"
    assert number(1001.0) == number("inf") == number(None) == number(float("inf")) == "none"
    assert claim(SPENT) == "2.99 (delta 1e-05, N x delta unknown, add/remove one, pld)"
    assert claim({**SPENT, "n_delta": 0.1}) == "2.99 (delta 1e-05, N x delta 0.1, add/remove one, pld)"
    told = claim({**SPENT, "value": 9.8e8})
    assert told.startswith("no claimable epsilon: above 1000 nobody is protected (delta")
    assert "9.8" not in told, "no number where none can be claimed"
    assert claim({**SPENT, "value": None, "note": "too large"}) == "no claimable epsilon: too large"


def test_the_files_of_this_checkout_are_up_to_date() -> None:
    root = Path(__file__).resolve().parents[2]
    assert markers.update(root, results.parts(root), check=True) == []
