"""Calibrations kept in files: the same number in less time, and never less noise than the target needs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedsim.noise.levels import NoiseLevels
from fedsim.privacy import calibrations, search
from fedsim.privacy.family import EventFamily
from fedsim.validate import InputError

TARGET, DELTA, STEPS = 2.0, 1e-5, 40


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    monkeypatch.setenv("FEDSIM_CALIBRATIONS", "on")
    return tmp_path / "calibrations"


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Where each search started, in the order they were made."""
    made: list[float] = []
    plain = search._search

    def counted(gap: object, start: float, name: str) -> float:
        made.append(start)
        return plain(gap, start, name)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "_search", counted)
    return made


def calibrated(target: float = TARGET, name: str = "pld", rate: float = 0.1) -> search.Calibration:
    return search.noise_multiplier_for(target, DELTA, EventFamily.gaussian(rate), STEPS, name)


def only(folder: Path) -> Path:
    (path,) = folder.glob("*")
    return path


@pytest.mark.parametrize("name", ["pld", "rdp"])
def test_the_second_calibration_is_the_first_without_a_search(
    name: str, folder: Path, searches: list[float]
) -> None:
    first = calibrated(name=name)
    assert only(folder).suffix == ".json", "no draft is left"
    assert calibrated(name=name) == first
    assert len(searches) == 1


@pytest.mark.parametrize("factor", [0.2, 0.98, 0.9999, 1.01, 5.0])
def test_a_file_with_another_number_is_not_believed(
    factor: float, folder: Path, searches: list[float]
) -> None:
    first = calibrated()
    only(folder).write_text(json.dumps({"log_noise_multiplier": math.log(first.noise_multiplier * factor)}))
    again = calibrated()
    assert again == first
    assert again.achieved.value is not None
    assert again.achieved.value <= TARGET
    assert len(searches) == 2
    assert json.loads(only(folder).read_text())["log_noise_multiplier"] == pytest.approx(
        math.log(first.noise_multiplier), abs=1e-15
    ), "the damage is repaired"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"log_noise_mult',
        b"[]",
        b"3",
        b"{}",
        b"\xff\xfe",
        b'{"log_noise_multiplier": null}',
        b'{"log_noise_multiplier": "1.0"}',
        b'{"log_noise_multiplier": NaN}',
        b'{"log_noise_multiplier": Infinity}',
        b'{"log_noise_multiplier": 1e300}',
        b'{"log_noise_multiplier": -1e300}',
        b'{"log_noise_multiplier": true}',
    ],
)
def test_a_damaged_file_is_found_again(content: bytes, folder: Path, searches: list[float]) -> None:
    first = calibrated()
    only(folder).write_bytes(content)
    assert calibrated() == first
    assert len(searches) == 2


def test_every_input_has_a_file_of_its_own(folder: Path) -> None:
    family = EventFamily.gaussian(0.1)
    calls = [
        (TARGET, DELTA, family, STEPS, "rdp"),
        (2.5, DELTA, family, STEPS, "rdp"),
        (TARGET, 2e-5, family, STEPS, "rdp"),
        (TARGET, DELTA, EventFamily.gaussian(0.2), STEPS, "rdp"),
        (TARGET, DELTA, EventFamily.gaussian(0.1, NoiseLevels((1.2, 0.8), STEPS)), STEPS, "rdp"),
        (TARGET, DELTA, family, 41, "rdp"),
        (TARGET, DELTA, family, STEPS, "rdp_objax"),
        (TARGET, DELTA, family, STEPS, "pld"),
    ]
    for count, call in enumerate(calls, start=1):
        search.noise_multiplier_for(*call)
        assert len(list(folder.glob("*.json"))) == count


@pytest.mark.parametrize("what", ["_versions", "_code"])
def test_other_code_or_another_version_searches_again(
    what: str, searches: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated()
    monkeypatch.setattr(calibrations, what, lambda: "another")
    calibrated()
    assert len(searches) == 2


def test_an_unreachable_target_is_not_kept(folder: Path) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be reached"):
            search.noise_multiplier_for(1e-9, 1e-10, EventFamily.gaussian(0.5), 10**6, "rdp")
    assert not list(folder.glob("*.json"))


def test_off_reads_and_writes_nothing(
    folder: Path, searches: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CALIBRATIONS", "off")
    calibrated()
    assert not folder.exists()
    monkeypatch.setenv("FEDSIM_CALIBRATIONS", "on")
    calibrated()
    monkeypatch.setenv("FEDSIM_CALIBRATIONS", "off")
    calibrated()
    assert len(searches) == 3


def test_where_nothing_can_be_written_it_searches(
    tmp_path: Path, searches: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file"))
    assert calibrated() == calibrated()
    assert len(searches) == 2
