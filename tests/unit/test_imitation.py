"""A small batch with the noise per update of a larger one: what is released, and that nothing is claimed
(budget: 10 s)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedsim import loading
from fedsim.engine.experiment import prepare
from fedsim.privacy import ledger
from fedsim.validate import InputError
from tests.conftest import command, small, train

IMITATING = ("train.imitated_batch_size=600", "privacy.noise_multiplier=4.0")


def test_a_run_has_the_noise_of_the_larger_batch_and_claims_no_epsilon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ledger holds what was really released: a tenth of the noise multiplier, at a tenth of the rate."""
    mechanism = prepare(small(*IMITATING)).mechanism
    whole = prepare(small("train.expected_batch_size=300", "privacy.noise_multiplier=2.0")).mechanism
    noise = [m.release().noise_stds["sum"] / m.divisor for m in (mechanism, whole)]
    assert noise[0] == pytest.approx(noise[1], rel=1e-12), "4 / 600 = 2 / 300"
    train(small(*IMITATING), tmp_path / "run")
    book = ledger.read(tmp_path / "run" / "ledger.jsonl")
    assert [record.noise_multiplier for record in book.records] == pytest.approx([0.4] * 6)
    assert [record.sampling_rate for record in book.records] == pytest.approx([60 / 400] * 6)
    for spent in (book.epsilon(), book.epsilon("rdp"), book.holder_epsilon(1), book.holder_epsilon(40)):
        assert spent.value is not None
        assert math.isinf(spent.value)
        assert "batch size of 600" in spent.note
    held = json.loads((tmp_path / "run" / "result.json").read_text())
    assert held["noise_multiplier"] == pytest.approx(0.4)
    for spent in held["epsilon"].values():
        assert spent["value"] is None, "infinite"
    assert command(["epsilon", str(tmp_path / "run")]) == 0
    assert "no claimable epsilon" in capsys.readouterr().out


def test_holder_updates_claim_nothing_either(tmp_path: Path) -> None:
    imitating = small(*IMITATING, "query=holder_update", "optimizer.name=sgd", "train.steps=2")
    train(imitating, tmp_path / "run")
    book = ledger.read(tmp_path / "run" / "ledger.jsonl")
    found = [book.epsilon(), book.holder_epsilon(40), book.example_epsilon()]
    assert all(spent is None or math.isinf(spent.value or 0.0) for spent in found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("train.imitated_batch_size=60",), "not above expected_batch_size 60"),
        (("train.imitated_batch_size=600", "privacy.noise_multiplier=null"), "goes with"),
        ((*IMITATING, "privacy.stop_at_epsilon=3"), "no budget"),
    ],
)
def test_what_imitates_has_no_budget(changes: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        small(*changes)


def test_the_smoke_recipe_of_captions_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    quiet = ["monitor.progress=false", "monitor.tensorboard=false"]
    found = train(loading.load("dpcap2024/smoke", quiet), tmp_path / "run")
    assert 1.0 < found["perplexity"] < 1e4
    assert 0.0 <= found["token_accuracy"] <= 1.0
    assert found["headline"]["name"] == "perplexity"
