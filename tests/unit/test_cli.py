"""The command line: every command, its JSON, and what it writes."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from fedsim.cli import hints, training
from fedsim.config import FederationConfig
from fedsim.engine.server import Server
from fedsim.merging import Choice
from fedsim.study import compare
from tests.conftest import SMALL, command, small, train


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert command([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_run_writes_everything_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert command(["run", "base", *SMALL, "monitor.tensorboard=true", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert str(out) in shown.replace("\n", "").replace("│", "").replace(" ", "")
    for name in ("config.yaml", "ledger.jsonl", "metrics.jsonl", "result.json", "final.safetensors"):
        assert (out / name).is_file()
    assert any((out / "checkpoints").iterdir())
    assert any((out / "tensorboard").iterdir())
    result = json.loads((out / "result.json").read_text())
    for kind in ("example", "example_check", "holder"):
        spent = result["epsilon"][kind]
        assert spent["value"] > 0
        assert spent["delta"] == 1e-5
        assert spent["relation"]
        assert spent["accountant"] in ("pld", "rdp")
    assert result["steps"] == 6
    assert len(result["parameters_sha256"]) == 64
    assert result["commit"]
    assert result["seconds"] > 0


def test_names_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No markup, no emoji; what a terminal cannot show is escaped, and ends nothing."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    out = tmp_path / "[bold]:cat:é"
    assert command(["run", "base", *SMALL, "train.steps=1", "--out", str(out)]) == 0
    shown.flush()
    said = shown.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "[bold]:cat:\\xe9" in said.replace("\n", "").replace(" ", "").replace("|", "")


def test_a_run_says_what_the_command_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["run", "base", *SMALL, "--out", str(tmp_path / "run")]

    def killed(self: Server, final: Any, seconds: float) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Server, "_finish", killed)
        assert command(given) != 0
    capsys.readouterr()
    said = []
    for _ in range(2):
        assert command([*given, "--resume"]) == 0
        said += [line for line in capsys.readouterr().out.splitlines() if "this command" in line]
    assert "went on after step 6" in said[0]
    assert "trained nothing: the run was finished before" in said[1]


def test_held_out_scores_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["base", *SMALL, "train.steps=2", "train.eval_every=2", "monitor.progress=true"]
    for name, more in (("test", []), ("held-out", ["data.holdout_examples=50", "data.test_examples=null"])):
        assert command(["run", *given, *more, "--out", str(tmp_path / name)]) == 0
        said = capsys.readouterr()
        other = "held-out" if name == "test" else "test"
        for text in (said.out, said.err):
            assert f"{name} accuracy" in text
            assert f"{other} accuracy" not in text


def test_a_run_without_a_folder_is_named_by_what_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["run", "quickstart", "train.steps=1", "data.options={}", "--json"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("quickstart-steps=1-options=_-")
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_a_run_without_a_folder_is_found_however_its_settings_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the same command written otherwise would release everything once more."""
    monkeypatch.chdir(tmp_path)
    given = [*SMALL, "seed=5"]
    assert command(["run", "base", *given]) == 0
    for other in (given[::-1], ["monitor.progress=false", *given], ["seed=4", *given]):
        capsys.readouterr()
        assert command(["run", "base", *other]) == 2
        assert "holds a finished run of this configuration" in " ".join(capsys.readouterr().err.split())
        assert command(["run", "base", *other, "--resume"]) == 0
        assert "trained nothing" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert command(["run", "base", *SMALL, "seed=6"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_programs_are_named_as_they_can_be_called_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = tmp_path / "my env" / "bin", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / "tensorboard").write_text("#!/bin/sh\n")
        (folder / "tensorboard").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(own / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(own))
    assert hints.program("tensorboard") == "tensorboard"
    monkeypatch.setenv("PATH", str(other))  # another environment's would be started
    assert hints.program("tensorboard") == "'my env/bin/tensorboard'"
    monkeypatch.chdir(other)
    monkeypatch.setenv("PATH", "")
    assert hints.program("tensorboard") == f"'{own}/tensorboard'"


def test_a_first_run_leads_to_the_page_of_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where configs/compare has one of the recipe; that command is whole, and writes report.html."""
    for name, there in (("quickstart", True), ("base", False), (str(tmp_path / "quickstart"), False)):
        assert bool(hints.comparison(name)) is there, name
    assert command(["run", "quickstart", *SMALL, "--out", str(tmp_path / "run")]) == 0
    (line,) = (one for one in capsys.readouterr().out.splitlines() if "as a page: " in one)
    asked: list[Any] = []
    monkeypatch.setattr(compare, "run", lambda wanted, *_: asked.append(wanted) or [])
    words = shlex.split(line.partition("as a page: ")[2])
    assert command([*words[1:], "--json"]) == 0
    assert Path(asked[0].recipe).stem == "quickstart"
    assert f"compare {words[2]}" in training._next_runs("quickstart", small())


@pytest.mark.parametrize("strategy", ["central_dpsgd", "dp_mf"])
def test_epsilon_of_the_ledger_is_that_of_the_result(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(f"preset={strategy}", "federation.examples_per_holder_at_most=60")
    result = train(config, tmp_path)
    for source in (tmp_path, tmp_path / "ledger.jsonl"):
        spent = answer(capsys, "epsilon", str(source))
        assert spent["steps"] == 6
        values = list(spent["epsilon"].values())
        assert values[0]["value"] == pytest.approx(result["epsilon"]["example"]["value"])
        assert values[1]["value"] == pytest.approx(result["epsilon"]["example_check"]["value"])
        assert values[2]["value"] == pytest.approx(result["epsilon"]["holder"]["value"])


def test_epsilon_and_calibrate_are_inverse(capsys: pytest.CaptureFixture[str]) -> None:
    mechanism = ["--population", "50000", "--batch", "4096", "--steps", "875"]
    found = answer(capsys, "calibrate", "--target-epsilon", "2", *mechanism)
    sigma = found["noise_multiplier"]
    assert found["achieved"]["value"] <= 2.0
    assert found["verified"]["accountant"] == "rdp"
    spent = answer(capsys, "epsilon", "--noise-multiplier", str(sigma), *mechanism)
    assert spent["epsilon"]["pld"]["value"] == pytest.approx(2.0, rel=1e-3)


def test_published_settings_show_both_values_where_they_differ(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "epsilon", "--published", "TAN")
    assert len(rows) == 2
    assert [row["differs"] for row in rows] == [True, False]
    assert rows[0]["row"]["epsilon_published"] == 8
    assert rows[0]["rdp"]["value"] == pytest.approx(7.0985, rel=5e-3)
    population, delta = rows[0]["row"]["population"], rows[0]["row"]["delta"]
    assert rows[0]["rdp"]["n_delta"] == rows[0]["pld"]["n_delta"] == pytest.approx(population * delta)
    assert command(["epsilon", "--published", "TAN"]) == 0
    shown = capsys.readouterr().out
    assert "differs" in shown
    assert "N x delta" in shown


def test_check_trains_nothing_and_shows_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = answer(capsys, "check", "quickstart")
    plan = shown["plan"]
    assert plan["sampling_rate"] == pytest.approx(0.2)
    assert plan["epsilon"]["example"]["value"] == pytest.approx(3.0, rel=1e-3)
    assert plan["epsilon"]["example_check"]["accountant"] == "rdp"
    assert plan["noise_multiplier"] > 0
    assert plan["bytes_to_largest_node_per_step"] == 4 * plan["parameters"]
    assert plan["memory_bytes_without_data_and_libraries"]["node"] > 0
    assert command(["check", "quickstart"]) == 0
    assert "epsilon per example" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["epsilon"],
        ["epsilon", "--steps", "3", "--noise-multiplier", "1"],
        ["epsilon", "--steps", "0", "--noise-multiplier", "1", "--sampling-rate", "0.1"],
        ["epsilon", "--steps", "3", "--noise-multiplier", "-1", "--sampling-rate", "0.1"],
        ["epsilon", "--steps", "3", "--noise-multiplier", "1", "--population", "10", "--batch", "11"],
        ["epsilon", "--published", "no such paper"],
        ["epsilon", "/no/such/ledger.jsonl"],
        ["calibrate", "--target-epsilon", "-1", "--steps", "3", "--sampling-rate", "0.1"],
        ["calibrate", "--target-epsilon", "1", "--steps", "3"],
        ["check", "no_such_config"],
    ],
)
def test_bad_arguments_end_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(arguments) == 2
    assert capsys.readouterr().err.startswith("fedsim: ")


@pytest.mark.parametrize(
    "name", ["run", "verify", "compare", "repeat", "check", "epsilon", "calibrate", "results"]
)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command([name, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_what_is_proposed_next_is_not_refused() -> None:
    """More owners only where how many there are does not follow from the data."""
    assert "federation.holders=100 " in training._next_runs("x", small())
    natural = dataclasses.replace(small(), federation=FederationConfig(10, partition=Choice("natural")))
    assert training._next_runs("x", natural) == ""


def test_verify_compares_federated_and_centralized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = answer(capsys, "verify", "base", *SMALL, "--out", str(tmp_path))
    assert shown["largest_parameter_difference"] <= 1e-5
    assert shown["federated"]["holders"] == 10
    assert shown["centralized"]["holders"] == 1
    assert command(["verify", "base", *SMALL, "--out", str(tmp_path), "--resume"]) == 0
    text = capsys.readouterr().out
    assert "Largest difference" in text
    assert "TensorBoard" in text
    assert "Try next" in text
