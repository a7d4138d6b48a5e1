"""Killed at any moment and resumed, a run ends exactly like one that was never disturbed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch

from fedsim import loading, seeds
from fedsim.engine.experiment import prepare
from fedsim.privacy import ledger
from tests.conftest import SMALL, command, final

KILLS = 10
STEPS = 60
SLOWER = [f"train.steps={STEPS}", "train.checkpoint_every=3", "train.eval_every=20"]


def start(out: Path) -> int:
    """Begin or resume the run in a process of its own, and return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = command(
                ["run", "base", *SMALL, *SLOWER, "engine.threads=1", "--resume", "--out", str(out)]
            )
        finally:
            os._exit(code)
    return child


def ended(process: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def runs(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def ledger_lines(out: Path) -> int:
    path = out / "ledger.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    prepare(loading.load("base", [*SMALL, *SLOWER]))  # data and code are read before the processes part
    assert ended(start(tmp_path / "unbroken")) == 0

    # Each process is killed a random while after it has added a random number of steps to the ledger: before,
    # in and after the writing of ledger lines, metrics and checkpoints.
    out = tmp_path / "broken"
    moments = seeds.stream(7, "kills")
    for _ in range(KILLS):
        process = start(out)
        wanted = ledger_lines(out) + int(moments.integers(0, 5))
        while ledger_lines(out) < wanted and runs(process):
            time.sleep(0.001)
        time.sleep(float(moments.uniform(0.0, 0.06)))
        assert runs(process), "the run must really be interrupted"
        os.kill(process, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL
    assert ended(start(out)) == 0

    assert torch.equal(final(tmp_path / "unbroken"), final(out))
    first, second = (json.loads((f / "result.json").read_text()) for f in (tmp_path / "unbroken", out))
    assert first["parameters_sha256"] == second["parameters_sha256"]
    assert first["epsilon"] == second["epsilon"]
    steps = [record.step for record in ledger.read(out / "ledger.jsonl").records]
    assert steps == list(range(STEPS))
    assert (tmp_path / "unbroken" / "ledger.jsonl").read_bytes() == (out / "ledger.jsonl").read_bytes()
    shown = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert shown == list(range(1, STEPS + 1)), "every step once in the metrics too"
