"""Refusals say what to do: of the kinds that docs/mistakes.md shows, other members."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedsim
from fedsim.engine import collect
from fedsim.registry import Registry
from fedsim.tasks.classification import Classification
from fedsim.validate import InputError
from tests.conftest import command

DRAWS = np.random.default_rng(0)
X = DRAWS.normal(size=(60, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
RUN: dict[str, Any] = {
    "federation": {"holders": 3, "nodes": 1},
    "privacy": {"noise_multiplier": 1.0},
    "train": {"steps": 2, "expected_batch_size": 20},
    "monitor": {"progress": False, "tensorboard": False},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(**more: Any) -> fedsim.Run:
    settings = {"model": nn.Linear(4, 2), "data": fedsim.Data((X, Y), (X, Y), classes=2), **RUN, **more}
    return fedsim.train(**settings)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((X.tolist(), Y.tolist()), r"got list of 60 as item 0.*numpy\.array"),
        ([{"x": one, "y": 0} for one in X], r"got dict of 2 as item 0\. Let its __getitem__ return the two"),
        ([(one, 0) for one in X[:3]] + [(X[3],)], "got tuple of 1 as item 3"),
        ([], "must have items .input, target., got none"),
        ((X, Y.astype(float)), r"got float64 of shape \(60,\)\. Convert them by astype\(int64\)"),
        ((X, np.stack([Y, Y, Y], 1)), r"got int64 of shape \(60, 3\)\. Bring them to that form, or declare"),
    ],
)
def test_examples_of_another_form(train: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fedsim.Data(train, (X, Y), classes=2)


class Uncalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs + torch.rand_like(inputs))


class Attention(nn.Linear):
    """Over the batch axis."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        return torch.softmax(outputs @ outputs.T, 1) @ outputs


class Detached(Classification):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.from_numpy((outputs.detach().numpy() ** 2).sum(1))


def two(step: int, numbers: dict[str, Any], more: int) -> None: ...


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": Uncalled()}, "the forward pass must not be random"),
        ({"model": Attention(4, 2)}, "must keep examples apart, but the loss of an example of Attention"),
        ({"task": Detached()}, r"computed from the outputs by torch, .* Leave out detach\(\), numpy\(\)"),
        ({"callbacks": [3]}, "callbacks must be functions of .* got int"),
        ({"callbacks": [two]}, r"but two\(step: .*missing a required argument: 'more'"),
        ({"optimizer": torch.optim.SGD}, "is the class torch.optim.sgd.SGD. Derive it from that one"),
        ({"data.train_examples": 70}, "the data handed in have left, got 70"),
        ({"task": "regression"}, r"has 'class'\. .* \(task\.name=classification"),
        ({"out": "a_file"}, "--out must be a folder, got the file .*a_file. Choose another"),
        ({"strategy": "local_dpsgd"}, "got 'local_dpsgd', which is a method, .* write preset=local_dpsgd"),
        ({"query": "dp_newton"}, "write preset=dp_newton"),
        ({"privacy": {"accountant": dict, "noise_multiplier": 1.0}}, "is dict, which is none. Derive its"),
    ],
)
def test_nothing_starts_and_the_remedy_is_told(more: dict[str, Any], message: str) -> None:
    Path("a_file").write_text("")
    with pytest.raises(InputError, match=message):
        trained(**more)
    assert [path.name for path in Path().iterdir()] == ["a_file"]


def test_models_whose_examples_stay_apart_are_not_refused() -> None:
    """Layer norms, shared layers, and a module in evaluation mode."""
    body = nn.Linear(4, 4)
    net = nn.Sequential(body, nn.LayerNorm(4), nn.Dropout(0.0), body, nn.Linear(4, 2))
    assert trained(model=net).result["steps"] == 2
    assert trained(model=nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)).eval()).score > 0


def test_a_score_that_is_kept_back_is_refused_and_not_shown() -> None:
    run = trained(**{"data.holdout_examples": 20}, monitor={**RUN["monitor"], "public_only": True})
    with pytest.raises(InputError, match=r"must hold accuracy .*data\.holdout_examples=0"):
        _ = run.score
    assert "accuracy=withheld" in repr(run)
    assert "accuracy=0." in repr(trained())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fedsim.epsilon(1.0, 0.1, 2.5, 1e-5), "steps must be a whole number, at least 1, got 2.5"),
        (lambda: fedsim.epsilon(1.0, 64, 10, 1e-5), "got 64. It is the expected batch size over"),
        (
            lambda: fedsim.clipped_gradient_sum(nn.Linear(4, 2), X[:, None], Y, 1.0),  # type: ignore[arg-type]
            r"clip must be a clip rule, such as fedsim\.clipping\.flat\.FlatClip\(1\.0\), got float",
        ),
        (lambda: fedsim.check(None), "name of a configuration, a path"),  # type: ignore[arg-type]
        (lambda: trained().predict(X[0]), r"float32 of shape \(n, 4\).*A single example x is x\[None\]"),
        (lambda: trained().predict(X[:, :3]), r"got float32 of shape \(60, 3\)\. Bring them to that form"),
    ],
)
def test_calls_from_python(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run base --epochs 5", "Settings have no dashes: train.steps=5"),
        ("run base --clip-norm=2", "Settings have no dashes: clip_norm=2"),
        ("run base --verbose", "Settings have no dashes: verbose=VALUE"),
        ("epsilon --verbose", "unrecognized arguments: --verbose. `fedsim --help` says more."),
        ("train quickstart", "Did you mean 'run'? `fedsim --help` says more."),
        ("run", "the following arguments are required: config. `fedsim run --help` says more."),
        (
            "run base privacy.noise_multiplier=1 model.name=nets.py:Net",
            "Name the module without its ending, as nets:Object",
        ),
        ("run base privacy.noise_multiplier=1 model.name=my.nets.Net", "with a colon: my.nets:Net"),
        (
            "calibrate --target-epsilon 1 --population 10 --batch 20 --steps 5",
            "--batch must be at most --population, 10, got 20.",
        ),
    ],
)
def test_commands(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = command(arguments.split())
    except SystemExit as stop:  # of argparse
        code = int(stop.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err


class Base:
    pass


class MadeElsewhere:
    def __new__(cls) -> Base:  # type: ignore[misc]
        return Base()


def test_a_class_that_makes_what_is_wanted_is_taken() -> None:
    from fedsim.merging import Choice

    registry: Registry[Base] = Registry("axis", "fedsim.optimizers", Base)
    assert isinstance(registry.make(Choice(f"{__name__}:MadeElsewhere")), Base)
    with pytest.raises(InputError, match=r"is the class tests\.unit\.test_remedies\.Uncalled"):
        registry.make(Choice(f"{__name__}:Uncalled"))


def test_a_node_that_refuses_is_logged_without_the_way_and_one_that_breaks_with_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim.engine.holder import Node

    def run(problem: Exception) -> str:
        def fails(*_: object) -> None:
            raise problem

        monkeypatch.setattr(Node, "clipped_sum", fails)
        caplog.clear()
        with caplog.at_level(logging.ERROR, logger=collect.__name__), pytest.raises(fedsim.RunError) as told:
            trained()
        assert str(problem) in str(told.value)
        return caplog.text

    assert "Traceback" not in run(InputError("its batch is no batch."))
    assert "Traceback" in run(ZeroDivisionError("division by zero"))
