"""`fedsim repeat`: one run a seed, finished ones kept, and a result that can be checked against the runs."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from fedsim.report import results
from tests.conftest import SMALL, command


def repeat(tmp_path: Path, *more: str) -> int:
    given = ["repeat", "base", *SMALL, "reference.paper=nobody 2000", "--out", str(tmp_path / "runs")]
    return command([*given, "--results", str(tmp_path / "results" / "tiny.json"), *more])


def test_every_seed_runs_once_and_the_result_says_what_they_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repeat(tmp_path, "--seeds", "3", "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert len(alone["scores"]) == 1
    assert repeat(tmp_path, "--seeds", "3", "4") == 0
    first = capsys.readouterr()
    assert first.err.count("finished before") == 1
    (mean,) = re.search(r"all *│ ([\d.]+) % \(2 seeds, no interval\)", first.out).groups()  # type: ignore[union-attr]
    assert repeat(tmp_path, "--seeds", "3", "4") == 0
    assert capsys.readouterr().err.count("finished before") == 2

    held = json.loads((tmp_path / "results" / "tiny.json").read_text())
    runs = {
        json.loads(p.read_text())["seed"]: json.loads(p.read_text()) for p in tmp_path.rglob("result.json")
    }
    assert held["seeds"] == [3, 4] == sorted(runs)
    assert held["scores"] == [runs[3]["accuracy"], runs[4]["accuracy"]]
    assert held["headline"] == {"name": "accuracy", "unit": "%", "higher_is_better": True}
    assert [run["score"] for run in held["runs"]] == held["scores"]
    assert held["mean"] == pytest.approx(statistics.mean(held["scores"]))
    assert float(mean) == pytest.approx(100 * held["mean"], abs=0.01)
    assert held["epsilon"]["holder"]["value"] == max(r["epsilon"]["holder"]["value"] for r in runs.values())
    assert held["epsilon"]["example"]["delta"] == held["delta"] == 1e-5
    assert held["minutes"] == pytest.approx(statistics.mean(r["seconds"] for r in runs.values()) / 60)
    assert held["reference"] == {"paper": "nobody 2000"}
    assert held["steps"] == 6
    assert held["partition"] == "dirichlet(alpha=0.5, concentration=total)"
    assert held["backend"] == "local"
    assert held["evaluated_on"] == "test set"
    assert held["hardware"]["torch"]
    assert held["commit"]
    assert held["runs"][0]["peak_memory_bytes"]["process"] > 1e7
    assert held["runs"][0]["parameters_sha256"] != held["runs"][1]["parameters_sha256"]
    assert held["command"].startswith("fedsim repeat base ")
    assert "--seeds 3 4" in held["command"]


def test_overrides_may_follow_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repeat(tmp_path, "--seeds", "0", "--backend", "local", "data.holdout_examples=100", "--json") == 0
    held = json.loads(capsys.readouterr().out)
    assert held["evaluated_on"] == "held-out training examples"
    assert "data.holdout_examples=100" in held["command"]


@pytest.mark.parametrize(
    "more", [["--seeds", "1", "1"], ["--seeds", "1", "--backend", "local", "seed=2"], ["--seeds", "-1"]]
)
def test_wrong_seeds_are_refused(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repeat(tmp_path, *more) == 2
    assert "seed" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_other_left_over_words_are_refused() -> None:
    with pytest.raises(SystemExit) as ended:
        command(["repeat", "base", "--seeds", "0", "--backend", "local", "nonsense"])
    assert ended.value.code == 2


def test_freely_tuned_settings_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["tuning={mode: free, trials: 7, held_out_examples: 40}", "--seeds", "0"]
    assert repeat(tmp_path, *given) == 0
    assert "tuning: settings chosen by 7 trials on 40 held-out" in capsys.readouterr().out
    held = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert "epsilon does not count that" in held["tuning"]
    held["reference"] = {}
    assert f"tuned: {held['tuning']}." in results.page([held])


def test_records_name_the_backend_and_settings_that_runs_were_made_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run is taken up whatever is asked for that changes no result, and the record says how it
    was made, not how it would be now."""
    assert repeat(tmp_path, "--seeds", "3", "4") == 0
    asked = ["--seeds", "3", "4", "--backend", "simulation"]
    assert repeat(tmp_path, "federation.nodes=5", *asked) == 0
    said = capsys.readouterr()
    assert said.err.count("(finished before, federation.nodes=2)") == 2
    told = "Finished before, otherwise than is asked now: seed 3, seed 4 (backend local, federation.nodes=2)."
    assert told in " ".join(said.out.split())
    held = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert (held["backend"], held["nodes"], held["taken_up"]) == ("local", 2, told)
    assert [(run["backend"], run["nodes"]) for run in held["runs"]] == [("local", 2)] * 2
    for text in (held["command"], " ".join(held["overrides"])):
        assert "nodes=5" not in text
        assert "--backend" not in text
        assert "federation.nodes=2" in text
    paths = {json.loads(p.read_text())["seed"]: p for p in tmp_path.rglob("result.json")}
    result = json.loads(paths[4].read_text())
    paths[4].write_text(json.dumps({**result, "backend": "simulation", "nodes": 5}))
    config = paths[4].with_name("config.yaml")
    config.write_text(config.read_text().replace("  nodes: 2\n", "  nodes: 5\n"))
    assert repeat(tmp_path, "federation.nodes=5", *asked) == 0
    held = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert (held["backend"], held["nodes"]) == ("local, simulation", "2, 5")
    assert held["taken_up"] == told.replace("seed 3, seed 4", "seed 3")
    assert [run["settings"][-1] for run in held["runs"]] == ["federation.nodes=2", "federation.nodes=5"]
    assert "federation.nodes=5" not in held["overrides"], "not of all runs"
    del result["backend"]
    paths[4].write_text(json.dumps(result))
    assert repeat(tmp_path, "--seeds", "4") == 2, "the result of seeds 3 and 4 stays"
    (tmp_path / "results" / "tiny.json").unlink()
    assert repeat(tmp_path, "--seeds", "4") == 0
    held = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert held["backend"] == "not recorded", "of a run from before results told"


def test_the_result_of_other_settings_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held.json"
    given = ["repeat", "base", *SMALL, "train.steps=2", "--seeds", "0", "--results", str(held)]
    assert command([*given, "--out", str(tmp_path / "a")]) == 0
    before = held.read_bytes()
    assert command([*given, "engine.threads=1", "--out", str(tmp_path / "b")]) == 0, "it changes no result"
    held.write_bytes(before)
    capsys.readouterr()
    assert command([*given, "train.steps=3", "--out", str(tmp_path / "c")]) == 2
    assert "and would be written over by that of base" in " ".join(capsys.readouterr().err.split())
    assert command([*given, "--seeds", "1", "--out", str(tmp_path / "c")]) == 2
    assert "seeds 0, and would be written over without 0." in " ".join(capsys.readouterr().err.split())
    assert held.read_bytes() == before
    assert not (tmp_path / "c").exists()


def test_there_is_no_mean_over_runs_whose_loss_is_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their accuracy is that of guesses, and would stand in a result file as any other."""
    assert repeat(tmp_path, "optimizer.learning_rate=1e30", "--seeds", "1") == 3
    assert "[1] did not" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
