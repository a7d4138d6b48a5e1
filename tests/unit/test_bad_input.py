"""Bad input ends with exit code 2 and one clear message, before anything is started or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from fedsim import models
from fedsim.engine import checkpoint
from fedsim.flower import launch
from fedsim.validate import InputError, PrivateInputError, RunError, printable
from tests.conftest import SMALL, command, small, train


@pytest.fixture(autouse=True)
def _nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started for bad input")

    monkeypatch.setattr(launch, "simulate", refuse)


CASES = {
    "unknown key": (["train.stps=3"], "Did you mean 'train.steps'"),
    "unknown section": (["optimiser.name=sgd"], "Did you mean 'optimizer"),
    "wrong type": (["train.steps=many"], "train.steps"),
    "fraction of steps": (["train.steps=2.5"], "train.steps"),
    "both target and noise": (["privacy.target_epsilon=3"], "both given"),
    "neither target nor noise": (["privacy.noise_multiplier=null"], "neither given"),
    "expected batch above N": (["train.expected_batch_size=401"], "expected batch above N"),
    "missing data folder": (["data.name=cifar10", "data.root=/nowhere"], "/nowhere"),
    "unreachable budget": (
        ["privacy.noise_multiplier=null", "privacy.target_epsilon=1e-9", "privacy.delta=1e-200"],
        "target",
    ),
    "budget below one step": (["privacy.stop_at_epsilon=1e-7"], "stop_at_epsilon"),
    "more holders than examples": (["federation.holders=401"], "federation.holders must be at most 400"),
    "more nodes than holders": (["federation.nodes=11"], "federation.nodes"),
    "unknown model": (["model.name=small_cn"], "small_cnn"),
    "unknown option": (["model.options={hiden: 3}", "model.name=mlp"], "hid"),
    "unknown engine": (["engine.gradients=ghost"], "engine.gradients"),
    "unknown strategy": (["strategy.name=centre"], "Did you mean 'central'"),
    "unknown query": (["query=gradients"], "Did you mean 'gradient'"),
    "unknown sampler": (["sampler=poison"], "Did you mean 'poisson'"),
    "unknown noise": (["noise=independant"], "Did you mean 'independent'"),
    "unknown preset": (["preset=central"], "central_dpsgd"),
    "unknown optimizer": (["optimizer.name=sdg"], "sgd"),
    "delta": (["privacy.delta=1.5"], "privacy.delta"),
    "negative clip": (["privacy.clip_norm=-1"], "privacy.clip_norm"),
    "no such device": (["engine.device=cuda:99"], "engine.device"),
    "noise for nonprivate": (["preset=nonprivate", "privacy.clip_norm=1.0"], "noise_multiplier"),
    "override without value": (["train.steps"], "key.path=value"),
    "steps beyond a machine's integers": (
        ["train.steps=99999999999999999999"],
        "train.steps must be between",
    ),
    "noise beyond double precision": (["privacy.noise_multiplier=1e300"], "privacy.noise_multiplier"),
    "noise below double precision": (["privacy.noise_multiplier=1e-320"], "privacy.noise_multiplier"),
    "clip norm that is no number": (["privacy.clip_norm=.nan"], "privacy.clip_norm"),
    "share of a GPU that is no number": (["engine.gpus_per_node=.nan"], "engine.gpus_per_node"),
    "threads beyond a machine's integers": (["engine.threads=100000000000000000000"], "engine.threads"),
    "model beyond the memory": (
        ["model.options={hidden: [1000000000000]}"],
        "more than this machine can give",
    ),
    "path of nobody": (["data.root=~nobody at all/x"], "Could not determine home"),
    "interpolation of nothing": (["title=${nothing}"], "nothing"),
    "unread setting": (
        ["optimizer.options.beta1=0.5"],
        "optimizer.options of momentum: unknown key 'beta1'",
    ),
    "extends as an override": (["extends=quickstart"], "extends must stand in a configuration file"),
}


@pytest.mark.parametrize("backend", ["local", "simulation"])
@pytest.mark.parametrize("case", CASES)
def test_exit_code_two_and_one_message(
    case: str, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, message = CASES[case]
    out = tmp_path / "run"
    code = command(["run", "base", *SMALL, *overrides, "--backend", backend, "--out", str(out)])
    text = capsys.readouterr().err
    assert code == 2
    assert message in text
    assert text.count("fedsim: ") == 1
    assert not out.exists(), "nothing may be written for bad input"


def test_model_with_batchnorm_is_refused_by_name_and_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def make(input_shape: tuple[int, ...], outputs: int, options: object) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(input_shape[0], 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(outputs)
        )

    monkeypatch.setitem(models.FAMILIES, "bn", models.Family(models.LinearOptions, make))
    code = command(["run", "base", *SMALL, "model.name=bn", "--out", str(tmp_path / "run")])
    text = capsys.readouterr().err
    assert code == 2
    assert "BatchNorm2d" in text
    assert "'1'" in text
    assert "GroupNorm" in text


def damage_checkpoint(out: Path) -> None:
    path = checkpoint.latest(out / "checkpoints")
    assert path is not None
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def cut_checkpoint(out: Path) -> None:
    path = checkpoint.latest(out / "checkpoints")
    assert path is not None
    path.write_bytes(path.read_bytes()[:200])


def damage_ledger(out: Path) -> None:
    path = out / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"step": 1', '"step": 7').replace('"step":1', '"step":7')
    path.write_text("".join(lines))


def lose_ledger_lines(out: Path) -> None:
    path = out / "ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_checkpoint, "damaged"),
        (cut_checkpoint, "damaged"),
        (damage_ledger, "ledger"),
        (lose_ledger_lines, "ledger"),
        (lambda out: (out / "config.yaml").write_text("train: {steps: 9}\n"), "another configuration"),
    ],
)
def test_damaged_run_is_refused_on_resume(
    harm: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small(), tmp_path)
    (tmp_path / "result.json").unlink()
    harm(tmp_path)
    code = command(["run", "base", *SMALL, "--resume", "--out", str(tmp_path)])
    text = capsys.readouterr().err
    assert code == 2
    assert message in text


def test_folder_of_another_configuration_names_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small(), tmp_path)
    code = command(["run", "base", *SMALL, "privacy.clip_norm=0.7", "--resume", "--out", str(tmp_path)])
    text = capsys.readouterr().err
    assert code == 2
    assert "privacy.clip_norm is 0.5 there and 0.7 here" in text


def test_existing_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small(), tmp_path)
    before = (tmp_path / "result.json").read_bytes()
    assert command(["run", "base", *SMALL, "--out", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "result.json").read_bytes() == before


def test_what_a_terminal_takes_as_an_order_is_written_out() -> None:
    """In every message of ours, also of names with a newline; other letters and signs stay as they are."""
    name = "a\x1b[31m\u202eb\x07\udcff\u2028é猫👩\u200d👧 c"
    plain = "a\\x1b[31m\\u202eb\\x07\\udcff\\u2028é猫👩\u200d👧 c"
    for error in (InputError(name), RunError(name), PrivateInputError(name, name)):
        assert str(error) == plain
    assert PrivateInputError("x", name).public == plain
    assert str(InputError("two\nlines\tkept")) == "two\nlines\tkept"
    assert printable("two\nlines") == "two\\nlines"
    assert printable(plain) == plain
    str(InputError(name)).encode()  # what no encoding has would end a command
