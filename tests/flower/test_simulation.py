"""Flower's simulation runtime, for real: same parameters as in one process, and failures that are told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from fedsim.flower import launch
from fedsim.flower.launch import ADOPTED
from fedsim.privacy import ledger
from tests.conftest import SMALL, command, final, small, train

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.flower, pytest.mark.timeout(400)]


def adopted() -> list[tuple[str, psutil.Process]]:
    """Every process of any launch, with the launch's mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if (mark := process.environ().get(ADOPTED)) and process.pid != os.getpid():
                found.append((mark, process))
        except psutil.Error:
            continue
    return found


def strays() -> list[str]:
    """Processes of any launch that are still there."""
    found = []
    for _, process in adopted():
        with suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found


def actors_of(pid: int) -> list[psutil.Process]:
    """The node processes of the launch that process `pid` made, and of no other beside it."""
    children = {child.pid for child in psutil.Process(pid).children()}
    (own,) = {mark for mark, process in adopted() if process.pid in children}
    return [p for mark, p in adopted() if mark == own and "ClientAppActor" in " ".join(p.cmdline())]


def test_simulation_equals_one_process_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "LOOK_SECONDS", 60.0)  # the result tells the end
    code = command(
        [
            "run",
            "base",
            *SMALL,
            "engine.threads=1",
            "--backend",
            "simulation",
            "--out",
            str(tmp_path / "flower"),
        ]
    )
    assert code == 0, capsys.readouterr().err
    train(small(), tmp_path / "local")
    assert torch.max(torch.abs(final(tmp_path / "flower") - final(tmp_path / "local"))) <= 1e-5
    books = [ledger.read(tmp_path / name / "ledger.jsonl") for name in ("flower", "local")]
    assert books[0].header == books[1].header
    assert [r.event for r in books[0].records] == [r.event for r in books[1].records]
    assert strays() == []


def test_a_node_process_that_dies_stops_the_run_which_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    slow = ["train.steps=60", "train.eval_every=60", "train.checkpoint_every=5", "engine.threads=1"]
    arguments = ["run", "base", *SMALL, *slow, "--backend", "simulation", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsim.cli", *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 10):
        time.sleep(0.05)
    actors = actors_of(process.pid)
    assert actors, "the simulation must have started its actors"
    os.kill(actors[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 3, errors
    assert "failed" in errors
    assert "--resume" in errors
    assert not (out / "result.json").exists()
    assert strays() == []

    assert command(["run", "base", *SMALL, *slow, "--resume", "--out", str(out)]) == 0
    train(small(*slow), tmp_path / "unbroken")
    assert torch.max(torch.abs(final(out) - final(tmp_path / "unbroken"))) <= 1e-5


@pytest.fixture
def private_flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with its own FLWR_HOME and port, whose SuperLink is ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mark = f"pytest-{os.getpid()}-{port}"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        ADOPTED: mark,
    }
    yield environment
    from fedsim.flower.launch import _end_all

    _end_all(0, mark)


def test_plain_flwr_run_with_overrides(tmp_path: Path, private_flower: dict[str, str]) -> None:
    neutral = tmp_path / "cwd"
    neutral.mkdir()
    out = tmp_path / "out"
    overrides = "train.steps=3 privacy.target_epsilon=4 monitor.tensorboard=false"
    settings = f"config='smoke/central_dpsgd' overrides='{overrides}' out='{out}'"
    done = subprocess.run(
        ["flwr", "run", str(ROOT), "--stream", "--run-config", settings],
        env=private_flower,
        cwd=neutral,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 3
    assert result["epsilon"]["example"]["value"] == pytest.approx(4.0, rel=1e-3)
    assert "fedsim: accuracy" in done.stdout
