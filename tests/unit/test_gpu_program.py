"""`make gpu` on a machine without a GPU: it says so, and its stages work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from tests.conftest import command


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_stages_are_written_as_they_end_and_one_that_fails_does_not_end_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(device: str, seconds: float) -> dict[str, object]:
        raise RuntimeError(f"on {device}, within {seconds:.0f} s")

    monkeypatch.setitem(gpu.STAGES, "memory", gpu.Stage(5.0, fails))
    little = ("train.steps=1", "federation.holders=1000", "federation.partition=iid")  # of one example each
    monkeypatch.setattr(gpu, "SHORT", (*gpu.SHORT, *little))

    def here(seconds: float, module: str, *words: str) -> str:
        assert 0 < seconds <= gpu.STAGES["differs"].limit
        assert (module, command(words)) == ("fedsim.cli", 0)
        return ""

    monkeypatch.setattr(gpu, "_ran", here)  # in processes of their own: below
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--json", str(out), "--only", "memory", "differs"]) == 1
    held = json.loads(out.read_text(encoding="utf-8"))
    assert held["stages"]["memory"]["problem"] == "RuntimeError: on cpu, within 5 s"
    differs = held["stages"]["differs"]
    assert differs["problem"] == ""
    assert differs["from_the_cpu_in_float32"]["float32"] == {"largest": 0.0, "relative": 0.0}


def test_a_stage_that_takes_too_long_is_ended() -> None:
    with pytest.raises(RuntimeError, match="took longer than 1 s"):
        gpu._ran(1.0, "timeit", "-n", "1", "-r", "1", "import time; time.sleep(30)")
    with pytest.raises(RuntimeError, match="exit code"):
        gpu._ran(30.0, "timeit", "-x")
    assert gpu._ran(60.0, "fedsim.cli", "--version").startswith("fedsim")


def test_all_stages_end_within_25_minutes() -> None:
    assert sum(stage.limit for stage in gpu.STAGES.values()) <= 25 * 60
