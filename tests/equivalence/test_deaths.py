"""A run under secure noise dies at every single moment it changes the disk, and always goes on rightly."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim.engine.experiment import prepare
from fedsim.engine.run_folder import RunFolder
from fedsim.privacy import ledger, secret
from tests.conftest import small, train

CHANGES = ("open", "write", "pwrite", "fsync", "link", "unlink", "replace", "rename", "mkdir", "ftruncate")
CONFIG = small(
    "privacy.noise_source=secure",
    "model.name=linear",
    "train.steps=3",
    "train.checkpoint_every=2",
    "data.train_examples=60",
    "train.expected_batch_size=20",
)
DIED = 77
pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("epsilon_takes_no_time")]


def dies_at(moment: int, out: Path, resume: bool) -> bool:
    """Train in a process of its own that is gone at its `moment`-th change of the disk; say if it was."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _die_at(moment)
            train(CONFIG, out, resume=resume)
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, DIED), "the run must not fail by itself"
    return status == DIED


def _die_at(moment: int) -> None:
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                os._exit(DIED)
            return real(*arguments, **named)

        return call

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))


def secrets() -> list[Path]:
    folder = secret.secrets_folder()
    return sorted(folder.iterdir()) if folder.is_dir() else []


def check(out: Path) -> None:
    """What must hold at any moment, whoever looks."""
    folder = RunFolder(out)
    assert len(secrets()) <= 1
    if folder.result.exists():
        assert secrets() == [], "a finished run has no secret"
    elif folder.ledger.exists() and ledger.read(folder.ledger).steps < 3:
        assert len(secrets()) == 1, "a ledger that is to be continued has its secret"
    elif not folder.ledger.exists() and not ledger.draft_path(folder.ledger).exists():
        assert secrets() == [], "no secret without a ledger or the draft of one"


def test_death_at_every_moment_leaves_a_run_that_goes_on_and_no_secret(tmp_path: Path) -> None:
    prepare(CONFIG)  # data and code are read before the processes part
    moment, reached = 1, []
    while True:
        out = tmp_path / str(moment)
        died = dies_at(moment, out, resume=False)
        check(out)
        released = ledger.read(out / "ledger.jsonl").steps if (out / "ledger.jsonl").exists() else 0
        reached.append(released)
        before = (out / "ledger.jsonl").read_bytes() if released else b""
        result = train(CONFIG, out, resume=True)
        assert result["steps"] == 3
        assert result["steps_repeated_to_rounding"] == []
        assert secrets() == []
        after = (out / "ledger.jsonl").read_bytes()
        assert after.startswith(before[: before.rfind(b"\n") + 1]), "the same steps, by the same secret"
        assert ledger.read(out / "ledger.jsonl").steps == 3
        assert not ledger.draft_path(out / "ledger.jsonl").exists()
        if not died:
            break
        moment += 1
    assert moment > 40
    assert set(reached) == {0, 1, 2, 3}


def test_death_at_moments_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from the middle: a run that died after its second ledger line, resumed and dying again
    at every third moment."""
    prepare(CONFIG)
    with monkeypatch.context() as patch:
        patch.setenv(secret.FOLDER_VARIABLE, str(tmp_path / "of the search"))
        second = moment_of_second_line(tmp_path)
    moment, died = 1, True
    while died:
        out = tmp_path / str(moment)
        assert dies_at(second, out, resume=False)
        died = dies_at(moment, out, resume=True)
        check(out)
        assert train(CONFIG, out, resume=True)["steps_repeated_to_rounding"] == []
        assert secrets() == []
        moment += 3
    assert moment > 20


def moment_of_second_line(base: Path) -> int:
    for moment in range(20, 100):
        assert dies_at(moment, base / f"search {moment}", resume=False)
        path = base / f"search {moment}" / "ledger.jsonl"
        if path.exists() and ledger.read(path).steps == 2:
            return moment
    raise AssertionError("a run of three steps has a second line")
