"""A run as a whole: budget stop, secure noise, finished runs, EMA, non-private."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.flower import wire
from fedsim.flower.client_app import app
from fedsim.privacy import ledger, secret
from fedsim.validate import InputError, RunError
from tests.conftest import final, small, train


def test_budget_stop_ends_before_the_step_that_would_exceed_it(tmp_path: Path) -> None:
    whole = train(small("train.steps=12"), tmp_path / "whole")
    budget = 0.8 * whole["epsilon"]["example"]["value"]
    cut = small("train.steps=12", f"privacy.stop_at_epsilon={budget}")
    result = train(cut, tmp_path / "cut")
    assert result["stopped_by_budget"]
    assert 1 <= result["steps"] < 12
    assert result["epsilon"]["example"]["value"] <= budget
    one_more = train(small(f"train.steps={result['steps'] + 1}"), tmp_path / "more")
    assert one_more["epsilon"]["example"]["value"] > budget


def test_target_epsilon_is_reached_and_not_exceeded(tmp_path: Path) -> None:
    config = small("privacy.noise_multiplier=null", "privacy.target_epsilon=2.5")
    result = train(config, tmp_path)
    value = result["epsilon"]["example"]["value"]
    assert 2.5 * (1 - 1e-3) <= value <= 2.5
    assert ledger.read(tmp_path / "ledger.jsonl").epsilon().value == pytest.approx(value)


def stop_at(step: int) -> Callable[..., Any]:
    def client(message: Any, context: Any) -> Any:
        if message.metadata.message_type == "train" and wire.unpack_task(message.content)[0].step == step:
            raise OSError("stopped here")
        return app(message, context)

    return client


def secrets() -> list[Path]:
    """Files of the folder of secrets."""
    folder = secret.secrets_folder()
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_secure_noise_differs_between_runs_and_not_within_one(tmp_path: Path) -> None:
    config = small("privacy.noise_source=secure")
    with pytest.raises(RunError):
        train(config, tmp_path / "a", client=stop_at(3))
    (held,) = secrets()
    assert stat.S_IMODE(os.stat(held).st_mode) == 0o600
    assert not held.is_relative_to(tmp_path / "a"), "the secret must not lie among the run's outputs"
    train(config, tmp_path / "a", resume=True)
    assert secrets() == [], "destroyed at the end"
    train(config, tmp_path / "b")
    assert not torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))


def test_secure_run_repeats_an_interrupted_step_with_the_same_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = secret.new()
    monkeypatch.setattr(secret, "new", lambda: made)  # the same secret for both
    config = small("privacy.noise_source=secure", "train.checkpoint_every=100")
    with pytest.raises(RunError):
        train(config, tmp_path / "a", client=stop_at(4))
    train(config, tmp_path / "a", resume=True)
    train(config, tmp_path / "b")
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))
    first, second = ((tmp_path / name / "ledger.jsonl").read_bytes() for name in "ab")
    assert first == second


def test_secure_run_without_its_secret_cannot_resume(tmp_path: Path) -> None:
    config = small("privacy.noise_source=secure")
    with pytest.raises(RunError):
        train(config, tmp_path / "a", client=stop_at(3))
    header = ledger.read_header(tmp_path / "a" / "ledger.jsonl")
    assert header is not None
    secret.destroy(header.run)
    with pytest.raises(InputError, match="secret"):
        train(config, tmp_path / "a", resume=True)


def test_finished_run_is_returned_and_not_repeated(tmp_path: Path) -> None:
    first = train(small(), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert train(small(), tmp_path, resume=True) == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_resume_of_nothing_is_a_fresh_run(tmp_path: Path) -> None:
    train(small(), tmp_path / "a", resume=True)
    train(small(), tmp_path / "b")
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))


def test_average_of_parameters_is_what_is_released(tmp_path: Path) -> None:
    plain = train(small(), tmp_path / "a")
    averaged = train(small("train.ema_decay=0.5"), tmp_path / "b")
    assert plain["parameters_sha256"] != averaged["parameters_sha256"]


def test_nonprivate_claims_no_epsilon(tmp_path: Path) -> None:
    config = small("preset=nonprivate", "privacy.noise_multiplier=null", "privacy.clip_norm=1.0")
    result = train(config, tmp_path)
    value = result["epsilon"]["example"]["value"]
    assert value is None or value == float("inf")
    assert "holder" not in result["epsilon"]


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw", "lamb"])
def test_every_optimizer_resumes_exactly(name: str, tmp_path: Path) -> None:
    config = small(
        f"optimizer.name={name}",
        "optimizer.learning_rate=0.01",
        "optimizer.schedule=cosine",
        "train.ema_decay=0.9",
    )
    with pytest.raises(RunError):
        train(config, tmp_path / "a", client=stop_at(5))
    train(config, tmp_path / "a", resume=True)
    train(config, tmp_path / "b")
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))
