"""N x delta stands in every epsilon line: above 1 with a warning, above 10 refused before anything starts."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console

from fedsim.engine.experiment import prepare
from fedsim.engine.progress import ConsoleProgress
from fedsim.headline import Metric
from fedsim.privacy import accountant, events, ledger
from fedsim.privacy.ledger import Ledger, LedgerHeader
from fedsim.report.claim import claim
from fedsim.validate import InputError
from tests.conftest import SMALL, command, small, train


@pytest.mark.parametrize("preset", ["central_dpsgd", "dp_fedavg"])
def test_a_delta_that_gives_away_more_than_ten_examples_is_refused(
    preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Or ten holders, where their presence is protected: here 200 examples, or 100 holders with 4 each."""
    unit = "example" if preset == "central_dpsgd" else "holder"
    examples, units = (200, 200) if unit == "example" else (400, 100)
    given = [f"preset={preset}", f"data.train_examples={examples}", "federation.holders=100"]
    most = 10 / units
    with pytest.raises(
        InputError, match=rf"privacy\.delta must be at most {most} for {units} {unit}s, got 0\.4"
    ):
        prepare(small(*given, "privacy.delta=0.4"))
    prepare(small(*given, f"privacy.delta={most}"))
    assert f"is above 1 / {units}, the number of {unit}s" in caplog.text
    caplog.clear()
    prepare(small(*given, f"privacy.delta={1 / units}"))
    assert "privacy.delta" not in caplog.text


def test_where_holders_are_the_unit_examples_claim_nothing_by_a_delta_that_is_too_large_for_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """400 examples of 10 holders at delta 0.05: half a holder, and 20 examples; at 0.02 8 examples."""
    for delta, finite in ((0.05, False), (0.02, True)):
        config = small("preset=dp_fedavg", f"privacy.delta={delta}")
        result = train(config, tmp_path / str(delta))
        of_holder, of_example = result["epsilon"]["holder"], result["epsilon"]["example"]
        assert "privacy.delta" not in caplog.text
        assert of_holder["value"] > 0
        assert of_holder["n_delta"] == pytest.approx(10 * delta)
        assert of_example["n_delta"] == pytest.approx(400 * delta)
        assert (of_example["value"] is not None) is finite
        if not finite:
            assert claim(of_example) == (
                "no claimable epsilon: delta is for holders, and much too large for 400 examples"
            )


def test_nothing_is_written_for_a_refused_delta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert command(["run", "base", *SMALL, "privacy.delta=0.4", "--out", str(out)]) == 2
    assert "N x delta is 160" in capsys.readouterr().err
    assert not out.exists()
    assert command(["check", "base", *SMALL, "privacy.delta=0.4"]) == 2


def test_every_epsilon_of_a_run_says_n_delta_and_warns_above_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """400 examples and 10 holders at delta 0.01: 4 examples and 0.1 holders."""
    config = small("privacy.delta=0.01", "federation.examples_per_holder_at_most=40")
    with caplog.at_level(logging.WARNING):
        result = train(config, tmp_path)
    assert "privacy.delta 0.01 is above 1 / 400" in caplog.text
    spent = result["epsilon"]
    assert {name: each["n_delta"] for name, each in spent.items()} == pytest.approx(
        {"example": 4.0, "example_check": 4.0, "holder": 0.1}
    )
    for name, each in spent.items():
        assert f"N x delta {each['n_delta']:.2g}" in claim(each)
        assert ("WARNING: N x delta is above 1" in claim(each)) == (name != "holder")
    assert command(["epsilon", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "delta" in line]
    assert len(lines) == 3
    assert ["N x delta 4" in line for line in lines] == [True, True, False]
    assert "N x delta 0.1" in lines[2]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["public"]
    assert last["n_delta"] == pytest.approx(4.0)
    shown = io.StringIO()
    progress = ConsoleProgress(
        6, Metric("accuracy", "%"), "t", Console(file=shown, force_terminal=False, width=200)
    )
    progress.update(6, last)
    assert "(N x delta 4)" in shown.getvalue()


def test_epsilons_of_given_settings_say_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    mechanism = ["--steps", "10", "--noise-multiplier", "1", "--delta", "1e-4"]
    assert command(["epsilon", *mechanism, "--population", "20000", "--batch", "100"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert all("N x delta 2," in line and "WARNING" in line for line in told)
    assert command(["epsilon", *mechanism, "--sampling-rate", "0.005"]) == 0
    assert capsys.readouterr().out.count("N x delta unknown") == 2
    assert command(["epsilon", *mechanism, "--population", "200000", "--batch", "100"]) == 2


def test_the_bounds_themselves() -> None:
    spent = accountant.epsilon(events.gaussian_step(1.0, 0.1), 1e-3)
    assert spent.n_delta is None
    assert spent.among(1000).note == spent.note, "at 1 there is nothing to warn of"
    assert "WARNING" in spent.among(1001).note
    assert spent.among(10_000).n_delta == pytest.approx(10.0)
    with pytest.raises(InputError, match="N x delta"):
        spent.among(10_001)
    assert dataclasses.replace(spent.among(500), n_delta=None) == spent
    assert "N x delta 0.5" in spent.among(500).describe()


def test_a_ledger_counts_the_units_its_events_protect(tmp_path: Path) -> None:
    header = LedgerHeader(config_hash="x", delta=1e-3, unit="holder", examples=900, holders=50)
    with Ledger.create(tmp_path / "ledger.jsonl", header) as book:
        book.append(0, events.gaussian_step(1.0, 0.1))
    view = ledger.read(tmp_path / "ledger.jsonl")
    assert view.epsilon().n_delta == pytest.approx(0.05)
    assert view.holder_epsilon(7).n_delta == pytest.approx(0.05)
