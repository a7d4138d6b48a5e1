"""Objects handed in from Python: every run takes the one it was given, whatever had its name before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedsim
from fedsim import given
from fedsim.tasks.classification import Classification
from fedsim.tasks.regression import Regression

INPUTS = np.random.default_rng(0).normal(size=(120, 5)).astype(np.float32)
TARGETS = (INPUTS[:, 0] > 0).astype(np.int64)
SETTINGS: dict[str, Any] = {
    "federation": {"holders": 4, "nodes": 2, "partition": "iid"},
    "privacy": {"noise_multiplier": 1.0, "delta": 1e-3},
    "train": {"steps": 3, "expected_batch_size": 60},
    "monitor": {"progress": False, "tensorboard": False},
}
pytestmark = pytest.mark.usefixtures("epsilon_takes_no_time")


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.layer = nn.Linear(5, 2)
        nn.init.constant_(self.layer.weight, 0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) * self.scale


def made(scale: float) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return Scaled(scale)

    return make


def signed(sign: float) -> Classification:
    @dataclass(frozen=True)
    class Signed(Classification):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return sign * Classification.loss(self, outputs, targets)

    return Signed()


def trained(folder: Path, **changes: Any) -> Tensor:
    data = fedsim.Data((INPUTS, TARGETS), (INPUTS[:40], TARGETS[:40]), classes=2)
    run = fedsim.train(**{"data": data, "model": "linear", "out": folder, **SETTINGS, **changes})
    return torch.cat([value.flatten() for value in run.model.state_dict().values()])


@pytest.mark.parametrize("kind", ["instance", "function", "task"])
def test_what_differs_only_in_what_it_holds_is_another_object(kind: str, tmp_path: Path) -> None:
    make = {
        "instance": lambda value: {"model": Scaled(value)},
        "function": lambda value: {"model": made(value)},
        "task": lambda value: {"task": signed(value)},
    }[kind]
    first, second = trained(tmp_path / "a", **make(1.0)), trained(tmp_path / "b", **make(-3.0))
    assert not torch.equal(first, second)
    with pytest.raises(fedsim.InputError, match="another configuration"):
        trained(tmp_path / "a", resume=True, **make(-3.0))


def test_a_run_does_not_take_the_nodes_of_one_whose_objects_had_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained(tmp_path / "alone", model=made(5.0))
    monkeypatch.setattr(given, "digest_of", lambda thing: "0" * 64)
    trained(tmp_path / "first", model=made(1.0))
    assert torch.equal(trained(tmp_path / "second", model=made(5.0)), alone)


def test_a_module_is_trained_from_its_own_weights_and_stays_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    model[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again = (trained(tmp_path / name, model=model) for name in ("a", "b"))
    assert torch.equal(first, again)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    held = fedsim.load_run(tmp_path / "a").model.state_dict()
    assert torch.equal(held["0.bias"], before["0.bias"])
    still = trained(tmp_path / "still", model=model, optimizer={"learning_rate": 1e-12})
    torch.testing.assert_close(still, torch.cat([value.flatten() for value in before.values()]))


def several_digests() -> list[str]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [given.digest_of(t) for t in (Scaled(2.0), made(2.0), signed(1.0), Regression([made]))]


def test_digests_are_the_same_in_another_process() -> None:
    program = "from tests.unit import test_given; print(test_given.several_digests())"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(__file__).resolve().parents[2]
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True
    )
    assert said.stdout == f"{several_digests()}\n", said.stderr


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(6, 2), r"must run on inputs of shape \(1, 5\)"),
        (nn.Linear(5, 1), "must give 2 outputs an example"),
        (nn.Linear(5, 3), "must give 2 outputs an example"),
    ],
)
def test_a_module_that_does_not_fit_the_data_is_refused_before_anything_starts(
    model: nn.Module, said: str, tmp_path: Path
) -> None:
    with pytest.raises(fedsim.InputError, match=said):
        trained(tmp_path / "run", model=model)
    assert not (tmp_path / "run").exists()


SCALE = 1.0


def scaled(progress: float) -> float:
    return SCALE * progress


class Kept(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value


def test_hidden_attributes_and_globals_are_part_of_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given.digest_of(Kept(1.0)) == given.digest_of(Kept(1.0)) != given.digest_of(Kept(5.0))
    before = given.digest_of(scaled)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 2.0)
    assert given.digest_of(scaled) != before
    boxes = [np.array([list(range(3000)), [end]], dtype=object) for end in (1, 2)]
    assert given.digest_of(boxes[0]) != given.digest_of(boxes[1])
    same, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert given.structure_of(same) == given.structure_of(other)
    assert given.digest_of(same) != given.digest_of(other)
