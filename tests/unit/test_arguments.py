"""Options of several values take these alone: settings and the first argument stand where they like."""

from __future__ import annotations

import argparse
import itertools

import pytest

from fedsim.cli import _parse, parser
from tests.conftest import command


def several() -> list[tuple[str, argparse.ArgumentParser, argparse.Action]]:
    """Every option of every command that takes any number of values."""
    (commands,) = (one.choices for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    return [
        (name, own, action)
        for name, own in commands.items()
        for action in own._actions
        if action.option_strings and action.nargs in ("+", "*")
    ]


def test_there_are_such_options() -> None:
    assert {f"{name} {action.option_strings[0]}" for name, _, action in several()} >= {
        "repeat --seeds",
        "probe --shots",
    }


@pytest.mark.parametrize(
    ("name", "action"), [(name, action) for name, _, action in several()], ids=lambda v: str(v)[:20]
)
def test_words_after_the_values_are_not_swallowed(name: str, action: argparse.Action) -> None:
    flag = action.option_strings[0]
    assert action.type is int, "or the values here must be others"
    pieces = (["runs/some"], [flag, "1", "2"], ["train.steps=3", "seed=-1"])
    for order in itertools.permutations(pieces):
        words = list(itertools.chain(*order))
        if words.index("runs/some") > words.index("seed=-1"):
            continue  # the first argument comes first of those without a name
        found = vars(_parse(parser(), [name, *words]))
        assert found[action.dest] == [1, 2], words
        assert found["overrides"] == ["train.steps=3", "seed=-1"], words
        assert str(found.get("config", found.get("run"))) == "runs/some", words


@pytest.mark.parametrize(
    ("words", "overrides", "seeds"),
    [
        ("q --seed 3 train.steps=3 4", ["train.steps=3"], [3, 4]),  # the option by its beginning
        ("q a=1 --seeds -1 2 b=2 --json c=3", ["a=1", "b=2", "c=3"], [-1, 2]),
        ("q --seeds=5 b=2", ["b=2"], [5]),
        ("q --seeds 1 --out x=y z=1", ["z=1"], [1]),  # an option of one value has the value that it is given
        ("q --seeds 1 2 -- z=1", ["z=1"], [1, 2]),
    ],
)
def test_words_of_a_line(words: str, overrides: list[str], seeds: list[int]) -> None:
    found = _parse(parser(), ["repeat", *words.split()])
    assert (found.config, found.overrides, found.seeds) == ("q", overrides, seeds)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("repeat q --seeds 0,1,2", "Put blanks between numbers: --seeds 0 1 2."),
        ("repeat --seeds 0,1 q", "Put blanks between numbers: --seeds 0 1."),
        ("repeat q --seeds 0 one", "invalid int value: 'one'"),
        ("repeat q --seeds a=1", "--seeds: expected at least one argument"),
        ("epsilon --published De et", "a TEXT with blanks goes into quotes"),
    ],
)
def test_what_is_no_value_is_refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = command(line.split())
    except SystemExit as stop:  # of argparse
        code = int(stop.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
