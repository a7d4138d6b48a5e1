"""Newcomers' mistakes get what was expected, what came and the remedy as an answer, and no traceback."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from benchmarks import mistakes, report
from benchmarks.mistakes import Mistake, Said
from fedsim.flower import server_app
from fedsim.report import markers
from fedsim.validate import InputError

pytestmark = pytest.mark.timeout(600)  # the first one makes all mistakes
LISTED = {mistake.title: mistake for group in mistakes.groups().values() for mistake in group}


@pytest.fixture(scope="module")
def found() -> dict[str, Said]:
    """How each ends today."""
    return mistakes.everything()


def test_there_are_forty_and_each_is_another() -> None:
    assert len(LISTED) >= 40
    assert len(LISTED) == sum(map(len, mistakes.groups().values())), "titles are different"
    typed = [(one.shell or one.python, str(one.files), one.prepare) for one in LISTED.values()]
    assert len(set(typed)) == len(typed)
    assert len({mistakes.anchor(title) for title in LISTED}) == len(LISTED)


@pytest.mark.parametrize("title", LISTED)
def test_the_answer_names_what_was_expected_what_came_and_the_remedy(
    title: str, found: dict[str, Said]
) -> None:
    mistake, said = LISTED[title], found[title]
    assert said.code == mistake.code, said.text
    assert "Traceback" not in said.text
    assert len(mistake.says) == 3
    for part in mistake.says:
        assert part in " ".join(said.text.split())


def test_the_page_is_what_comes_out(found: dict[str, Said]) -> None:
    text = (mistakes.ROOT / "docs/mistakes.md").read_text(encoding="utf-8")
    assert markers.fill(text, {"mistakes": lambda: mistakes.page(found)}) == text
    assert set(report.PARTS["docs/mistakes.md"]) == {"mistakes"}


def test_an_error_that_nobody_raised_on_purpose_is_told_apart(tmp_path: Path) -> None:
    (folder := tmp_path / "here").mkdir()
    said = mistakes.made(Mistake("x", "x", "x", python="1 / 0"), folder)
    assert said.code == mistakes.NOT_ON_PURPOSE
    assert "Traceback" in said.text
    with pytest.raises(RuntimeError, match="must succeed"):
        mistakes.made(Mistake("x", "x", "x", prepare="1 / 0", shell="fedsim list"), folder)


@pytest.mark.parametrize("error", [InputError("seeds must differ."), ZeroDivisionError("division by zero")])
def test_flowers_log_shows_the_way_to_errors_of_others_alone(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    assert server_app.app is not None  # its module is what Flower loads
    try:
        raise error
    except Exception as caught:
        logging.getLogger("flwr").error("%s raised an exception", "Simulation", exc_info=caught)
    shown = caplog.handler.format(caplog.records[0])
    assert str(error) in shown
    assert ("Traceback" in shown) is isinstance(error, ZeroDivisionError)
    if isinstance(error, InputError):  # fedsim.flower.launch finds the cause by these words
        assert "\nfedsim.validate.InputError: seeds must differ." in shown
