"""Flower's simulation runtime, for real: failures that are told, and Flower's own command.

That a whole run equals one process: tests/examples/test_examples.py, with parts of a user's own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from fedsim.flower.launch import ADOPTED
from tests.conftest import SMALL, command, final, small, train
from tests.flower.processes import adopted, strays
from tests.unit.test_pages import own_app

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.flower, pytest.mark.timeout(400)]


def actors_of(pid: int) -> list[psutil.Process]:
    """The node processes of the launch that process `pid` made, and of no other beside it."""
    children = {child.pid for child in psutil.Process(pid).children()}
    (own,) = {mark for mark, process in adopted() if process.pid in children}
    return [p for mark, p in adopted() if mark == own and "ClientAppActor" in " ".join(p.cmdline())]


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
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
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


def test_plain_flwr_run_with_a_mistake_and_of_an_app_of_ones_own(
    tmp_path: Path, private_flower: dict[str, str]
) -> None:
    """The app is that of docs/use.md, outside of the checkout; its server calls fedsim's."""
    neutral = tmp_path / "cwd"
    neutral.mkdir()
    out = tmp_path / "out"

    def flwr_run(app: Path, settings: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["flwr", "run", str(app), "--stream", "--run-config", settings],
            env=private_flower,
            cwd=neutral,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    said = flwr_run(ROOT, "config='quikstart'").stdout
    assert "got 'quikstart'. Did you mean 'quickstart'?" in said
    assert "Traceback" not in said

    overrides = "train.steps=3 privacy.target_epsilon=4 monitor.tensorboard=false"
    own_app(tmp_path / "my-app")
    done = flwr_run(tmp_path / "my-app", f"config='smoke/central_dpsgd' overrides='{overrides}' out='{out}'")
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 3
    assert result["epsilon"]["example"]["value"] == pytest.approx(4.0, rel=1e-3)
    assert "fedsim: accuracy" in done.stdout
    assert f"accuracy {result['accuracy']:.3f} at epsilon 4.00" in done.stdout
