"""What is handed in from Python, and is not what it should be, is refused with what to hand in; nothing is
trained on something else in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from tests.conftest import command

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
        (lambda: Data((np.ma.array(INPUTS), CLASSES), TEST, classes=3), "must be without a mask"),
        (lambda: Data((INPUTS, np.ma.array(CLASSES)), TEST, classes=3), "must be without a mask"),
        (lambda: data(holders=np.ma.array(CLASSES)), "every example must have a holder.* masked"),
        (lambda: data(holders=["", "a", "b"] * 80), "the name of some is empty"),
        (lambda: data(holders=["a", " ", "b"] * 80), "the name of some is empty"),
        (lambda: Data((torch.zeros(9, 5).bfloat16(), CLASSES[:9]), TEST, classes=3), "got torch.bfloat16"),
        (lambda: data(names=["a", "b", "b"]), "names of targets must differ, got 'b' twice"),
        (lambda: data(names="abc"), "names must be a list of words, got 'abc'"),
        (lambda: data(names=[1, 2, 3]), "names must be a list of words"),
        (lambda: data(classes=True), "an integer above 0, got True"),
        (lambda: data(classes=0), "an integer above 0, got 0"),
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


def test_owners_that_went_with_their_examples_are_told_from_owners_that_are_too_few() -> None:
    said = {"data": data(holders=SCHOOLS), "federation": {"holders": 7}}
    with pytest.raises(
        InputError, match=r"Set federation\.holders=\d\. Where more were meant: data\.holdout"
    ):
        checked(**said, **{"data.train_examples": 4})
    with pytest.raises(InputError, match=r"Set federation\.holders=7\.$"):
        checked(**{**said, "federation": {"holders": 6}})


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


class Hooked(nn.Sequential):
    """The first rows of its first layer are not trained."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
        self[0].weight.register_hook(lambda gradient: 0.0 * gradient)


class Keeping(nn.Sequential):
    """Keeps what it computed, as many models do."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 3))
        self.calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = super().forward(input)
        return self.last


def test_hooks_that_copies_of_a_model_would_not_have_are_refused() -> None:
    for model in (Hooked(), Hooked):
        with pytest.raises(InputError, match=r"parameter 0\.weight of the model must have no hook"):
            checked(model=model)
    with torch.device("meta"), pytest.raises(InputError, match=r"0\.weight is on the meta device"):
        checked(model=nn.Sequential(nn.Linear(5, 3)))


def test_a_model_that_keeps_what_it_computed_can_be_used_after_training(tmp_path: Path) -> None:
    run = fedsim.train(data=data(), out=tmp_path / "run", **{**SETTINGS, "model": Keeping()})
    again = fedsim.load_run(run.folder, model=Keeping())
    assert np.array_equal(run.predict(INPUTS).best, again.predict(INPUTS).best)
    assert fedsim.load_run(run.folder).model.calls == 0


class Counting(nn.Sequential):
    """Counts its calls in a buffer, in eval mode alone."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.calls += 1
        return super().forward(input)


def test_a_model_that_cannot_be_evaluated_is_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must leave the model's buffers alone, but it changes calls"):
        fedsim.train(data=data(), out=tmp_path / "run", **{**SETTINGS, "model": Counting()})
    assert not (tmp_path / "run").exists()


def test_a_model_with_another_hook_is_another_model(tmp_path: Path) -> None:
    def model(factor: float) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(5, 3))
        made.register_forward_hook(lambda module, inputs, outputs: outputs * factor)
        return made

    run = fedsim.train(data=data(), out=tmp_path / "run", **{**SETTINGS, "model": model(2.0)})
    with pytest.raises(InputError, match="its hooks or what it keeps in attributes are others now"):
        fedsim.load_run(run.folder, model=model(-2.0)).predict(INPUTS)
    assert fedsim.load_run(run.folder, model=model(2.0)).predict(INPUTS).best.shape == (240,)
    with pytest.raises(InputError, match="belongs to another configuration"):
        fedsim.train(data=data(), out=tmp_path / "run", resume=True, **{**SETTINGS, "model": model(3.0)})


def test_runs_of_one_configuration_at_once_do_not_meet(tmp_path: Path) -> None:
    """In threads of one process, where they share their nodes."""
    more = {**SETTINGS, "train": {"steps": 12, "expected_batch_size": 120, "eval_every": 12}}

    def trained(name: str) -> torch.Tensor:
        run = fedsim.train(data=shared, out=tmp_path / name, **more)
        return torch.cat([value.flatten() for value in run.model.parameters()])

    shared = data()
    alone = trained("alone")
    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(trained, ["a", "b", "c"]):
            assert torch.equal(found, alone)


class Writing(Weighted):
    """Divides outputs, or clamps targets, where others read them."""

    def __init__(self, where: str) -> None:
        super().__init__(1.0)
        self.where = where

    def measures(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.where == "outputs":
            outputs.div_(10.0)
        else:
            targets.clamp_(max=0)
        return super().measures(outputs, targets)


@pytest.mark.parametrize("where", ["outputs", "targets"])
def test_a_task_that_writes_into_what_others_read_is_refused(where: str) -> None:
    with pytest.raises(InputError, match=f"must leave {where} as they get them"):
        checked(task=Writing(where))


@pytest.mark.parametrize("wrong", [("accuracy",), Metric("accuracy"), None])
def test_metrics_that_are_none_are_refused(wrong: Any) -> None:
    class Wrong(Weighted):
        own_metrics = wrong

    with pytest.raises(InputError, match=r"own_metrics of task Wrong must be a tuple of fedsim\.headline"):
        checked(task=Wrong(1.0))


class NoWriter:
    """Lacks what a writer has."""


def test_a_wrong_writer_is_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    monitor = {**SETTINGS["monitor"], "writers": [f"{__name__}:NoWriter"]}
    with pytest.raises(InputError, match="must make an object with write and close"):
        fedsim.train(data=data(), out=tmp_path / "run", **{**SETTINGS, "monitor": monitor})
    assert not (tmp_path / "run").exists()


def test_what_is_no_path_model_or_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fedsim.train(data=data(), out=tmp_path / "run", **SETTINGS)
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: fedsim.load_run(5), "folder of the run must be a path, got 5"),  # type: ignore[arg-type]
        (lambda: fedsim.load_run(run.folder, task="classification"), "task must be the object"),  # type: ignore[arg-type]
        (lambda: fedsim.load_run(run.folder, model="linear"), "model must be the object"),  # type: ignore[arg-type]
        (lambda: fedsim.export(run, None), "out must be a path, got None"),  # type: ignore[arg-type]
        (lambda: fedsim.export(run, run.folder / "result.json"), "out must be a folder, got the file"),
        (lambda: fedsim.train(data=data(), out=5, **SETTINGS), "out must be a path, got 5"),  # type: ignore[arg-type]
        (lambda: fedsim.train(data=data(), resume="no", **SETTINGS), "resume must be one of"),  # type: ignore[arg-type]
        (lambda: run.predict(None), r"inputs must be examples \(n, ...\), .* got NoneType"),
        (lambda: run.predict(PAIR), "inputs must be one array, got tuple"),
        (lambda: run.predict(np.ma.array(INPUTS)), "inputs must be without a mask"),
        (lambda: run.predict(torch.zeros(2, 5).bfloat16()), "inputs must be of a dtype that numpy has"),
        (lambda: Metric(""), "a metric must have a name"),
        (
            lambda: checked(partition={0: [1, 2], 1: [0]}),
            r"the holder of each example, \(N,\)",
        ),
    ]
    for call, message in wrong:
        with pytest.raises(InputError, match=message):
            call()
    for option in ("--holder-examples", "--delta"):
        assert command(["epsilon", str(run.folder), option, "0"]) == 2
        assert f"{option} must be between" in capsys.readouterr().err
