"""What is handed in from Python, and is not what it should be, is refused with what to hand in; nothing is
trained on something else in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim.data.from_python import Data
from fedsim.headline import Metric
from fedsim.tasks.classification import Classification
from fedsim.validate import InputError

RNG = np.random.default_rng(5)
INPUTS = RNG.normal(size=(240, 5)).astype(np.float32)
CLASSES = RNG.integers(0, 3, 240)
SCHOOLS = [f"school {i % 7}" for i in range(240)]
PAIR, TEST = (INPUTS, CLASSES), (INPUTS[:40], CLASSES[:40])
IMAGES = np.zeros((9, 4, 4, 3), np.uint8), CLASSES[:9]
IMAGES_TOO = np.zeros((6, 4, 4, 3), np.uint8), CLASSES[:6]
SETTINGS: dict[str, Any] = {
    "model": "linear",
    "privacy": {"noise_multiplier": 1.0},
    "train": {"steps": 2, "expected_batch_size": 40, "eval_every": 2},
    "optimizer": {"learning_rate": 0.1},
    "monitor": {"tensorboard": False, "progress": False},
}


def data(**declared: Any) -> Data:
    return Data(PAIR, TEST, **{"classes": 3, **declared})


def checked(**settings: Any) -> dict[str, Any]:
    given = {"data": data(), **SETTINGS, **settings}
    return fedsim.check(given.pop("config", "base"), **given)


@pytest.mark.parametrize(
    ("settings", "holders", "warned"),
    [
        ({}, 7, False),
        ({"federation": {"nodes": 1}}, 7, False),
        ({"federation": {"partition": "natural"}}, 7, False),
        ({"federation.partition": "natural"}, 7, False),
        ({"federation": {"partition": "iid", "holders": 10}}, 10, True),
        ({"federation.partition": "iid", "federation.holders": 10}, 10, True),
        ({"partition": "iid", "federation": {"holders": 10}}, 10, True),
        ({"partition": [i % 9 for i in range(240)]}, 9, False),
        ({"config": "quickstart", "privacy": {"target_epsilon": None, "noise_multiplier": 1.0}}, 7, False),
        ({"config": {"federation": {"partition": "iid", "holders": 10}}}, 10, True),
        ({"config": {"federation.partition": "iid", "federation.holders": 10}}, 10, True),
        ({"config": {"federation": {"holders": 7}}}, 7, False),
        ({"config": "iid.yaml"}, 10, True),
        ({"config": "of_iid.yaml"}, 10, True),
    ],
)
def test_owners_of_the_data_are_the_holders_unless_others_are_said(
    settings: Mapping[str, Any],
    holders: int,
    warned: bool,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else epsilon per holder would be that of made-up holders."""
    monkeypatch.chdir(tmp_path)
    Path("iid.yaml").write_text("federation: {partition: iid, holders: 10}")
    Path("of_iid.yaml").write_text("extends: iid.yaml")
    with caplog.at_level(logging.WARNING):
        plan = checked(data=data(holders=SCHOOLS), **settings)
    assert plan["holders"]["holders"] == holders
    assert ("is not said of those owners" in caplog.text) == warned


def test_a_number_that_is_none_is_not_taken_for_a_random_one() -> None:
    gap = [(np.array([np.nan, 1.0], np.float32), 0), (np.ones(2, np.float32), 1)]
    with pytest.raises(InputError, match="train: inputs must be finite"):
        Data(gap, gap[:], classes=2)


class Drawn(torch.utils.data.Dataset[Any]):
    """Draws a view whenever it is asked."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(5), index % 3


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: data(holders=10), "must name the owner of each training example.*got int"),
        (lambda: data(holders={"a": [1, 2]}), "must name the owner of each training example.*got dict"),
        (
            lambda: data(holders=[("Ash", "Ash ")[i % 2] for i in range(240)]),
            "spaces around their names",
        ),
        (lambda: data(holders=[[0, 1], [2, 3]]), r"one word or number, \(N,\) in all, got .* \(2, 2\)"),
        (lambda: data(holders=[[0, 1], [2]]), "got something of shape unequal lists"),
        (lambda: data(classes=["a", "b", "c"]), r"classes must be how many there can be, .* names=\[...\]"),
        (lambda: data(mean=0.5), "mean must be left out, got 0.5: it is for images of bytes"),
        (
            lambda: Data(IMAGES, IMAGES_TOO, classes=3, std=[1.0, 2.0]),
            "std must be one number, or 3, one a channel",
        ),
        (lambda: Data(IMAGES, IMAGES_TOO, classes=3, mean="grey"), "mean must be one number.*got 'grey'"),
        (lambda: Data(PAIR, PAIR, classes=3), "test must hold other examples than train"),
        (lambda: Data(Drawn(), TEST, classes=3), "train must give the same item whenever it is asked"),
        (
            lambda: Data((torch.zeros(9, 20, 20, 3, dtype=torch.uint8), CLASSES[:9]), TEST, classes=3),
            r"in the last axis.*axis 2 of length 3 looks like .* taken as \(N, C, H, W\)",
        ),
    ],
)
def test_data_that_are_something_else_are_refused(made: Callable[[], Data], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made()


class Hidden(nn.Module):
    """A layer that torch does not see."""

    def __init__(self, kind: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.layers = kind(nn.Linear(5, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        first = next(iter(self.layers.values() if isinstance(self.layers, dict) else self.layers))
        result: torch.Tensor = self.head(first(inputs))
        return result


@pytest.mark.parametrize(
    "kind", [lambda one: [one], lambda one: (one,), lambda one: {"a": one}], ids=["list", "tuple", "dict"]
)
def test_layers_that_torch_does_not_see_are_refused(kind: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(InputError, match=r"does not see those in 'layers', a (list|tuple|dict) of Hidden"):
        checked(model=Hidden(kind))
    checked(model=Hidden(lambda one: nn.ModuleList([one])))
    seen = Hidden(kind)
    seen.same = nn.ModuleList(seen.layers.values() if isinstance(seen.layers, dict) else seen.layers)
    checked(model=seen)


def wrong(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1) != targets).float()


class Undecorated(Classification):
    """Its annotation is no option."""

    gamma: float = 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"task": {"name": "classification", "options": {"metrics": [wrong], "headline": "wrong"}}},
            r"headline=wrong must say which way is better.*@fedsim.metric",
        ),
        ({"task": {"name": Undecorated, "options": {"gamma": 1.0}}}, r"@dataclass\(frozen=True\), or gamma"),
        ({"model": nn.Linear(5, 3).state_dict()}, "got weights. Give the module"),
        ({"federation": {"partition": SCHOOLS}}, "The holder of each example is partition="),
        ({"partition": [[0, 1], [2, 3]]}, "one entry an example"),
    ],
)
def test_settings_that_are_something_else_are_refused(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked(**settings)


def test_a_batch_below_one_example_is_told_from_a_rate(caplog: pytest.LogCaptureFixture) -> None:
    checked(train={"expected_batch_size": 0.1})
    assert "it is the rate times the 240 training examples" in caplog.text


def test_a_metric_that_says_its_direction_may_be_the_headline() -> None:
    lower = fedsim.metric(higher_is_better=False, name="wrong")(lambda *given: wrong(*given))
    options = {"metrics": [lower], "headline": "wrong"}
    assert checked(task={"name": "classification", "options": options})["examples"] == 240


def test_a_single_callback_is_no_list() -> None:
    with pytest.raises(InputError, match=r"got a single one. Write callbacks=\[...\]"):
        fedsim.train(data=data(), callbacks=lambda *given: None, **SETTINGS)  # type: ignore[arg-type]


def test_one_constant_is_that_of_all_channels() -> None:
    found = Data(IMAGES, IMAGES_TOO, classes=3, mean=0.25, std=[0.5, 1.0, 2.0]).splits
    for part in (found.train, found.test):
        assert part.mean == (0.25, 0.25, 0.25)
        assert part.std == (0.5, 1.0, 2.0)


class Weighted(fedsim.Task):
    """Has an `__init__` of its own, that calls no other; its targets are classes."""

    own_metrics = (Metric("accuracy", "%"),)

    def __init__(self, weight: float, more: bool = False) -> None:
        self.weight, self.more = weight, more

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.weight * nn.functional.cross_entropy(outputs, targets, reduction="none")

    def measures(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        right = (outputs.argmax(1) == targets).float()
        return {"accuracy": right, "top": right} if self.more else {"accuracy": right}


def test_a_task_with_its_own_init_has_the_defaults_and_its_classes(tmp_path: Path) -> None:
    """Partitions that skew holders by label are the default."""
    run = fedsim.train(data=data(), task=Weighted(2.0), out=tmp_path / "run", **SETTINGS)
    assert run.headline.name == "accuracy"
    assert 0.0 <= run.score <= 1.0
    one, other = Weighted(2.0), Weighted(2.0)
    assert one.metrics is not other.metrics


def test_a_measure_that_nobody_would_see_is_refused() -> None:
    with pytest.raises(InputError, match=r"own_metrics of task Weighted must name all .* but not top"):
        checked(task=Weighted(1.0, more=True))


def test_a_score_that_is_no_number_is_not_called_withheld(tmp_path: Path) -> None:
    nan = fedsim.metric(name="odd")(lambda outputs, targets: torch.full((len(targets),), torch.nan))
    task = {"name": "classification", "options": {"metrics": [nan], "headline": "odd"}}
    run = fedsim.train(data=data(), task=task, out=tmp_path / "run", **SETTINGS)
    assert "odd=not finite" in repr(run)
    with pytest.raises(InputError, match=r"odd of .* must be a finite number to be a score"):
        run.score  # noqa: B018
