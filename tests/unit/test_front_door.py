"""`import fedsim`: training, checking, predicting and exporting from Python, with own objects (40 s)."""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

import fedsim
from fedsim.cli import main as command
from fedsim.data import datasets, examples
from fedsim.data.from_python import Data
from fedsim.engine import model_card
from fedsim.tasks.classification import Classification
from fedsim.tasks.regression import Regression
from fedsim.validate import InputError
from tests.conftest import SMALL

HERE = str(Path(fedsim.__file__).parent).encode()
RNG = np.random.default_rng(3)
INPUTS = RNG.normal(size=(260, 8)).astype(np.float32)
VALUES = (INPUTS[:, :1] * 3.0 + 1.0).astype(np.float32)
SETTINGS: dict[str, Any] = {
    "task": "regression",
    "privacy": {"noise_multiplier": 1.0},
    "train": {"steps": 4, "expected_batch_size": 50, "eval_every": 2},
    "optimizer": {"learning_rate": 0.1},
    "monitor": {"tensorboard": False, "progress": False},
}


def numbers() -> Data:
    return Data((INPUTS[:200], VALUES[:200]), (INPUTS[200:], VALUES[200:]), values=1, names=["height"])


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> fedsim.Run:
    """A run of a family of ours, on the embedded images."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert command(["run", "base", *SMALL, "--out", str(folder), "--json"]) == 0
    return fedsim.load_run(folder)


def test_a_module_starts_from_its_own_weights_and_stays_as_it_was() -> None:
    own = net()
    before = copy.deepcopy(own.state_dict())
    still = {**SETTINGS, "optimizer": {"learning_rate": 1e-12}}
    run = fedsim.train(model=own, data=numbers(), partition="iid", federation={"holders": 5}, **still)
    for name, value in before.items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=0, atol=1e-6)
        assert torch.equal(own.state_dict()[name], value)
    moved = fedsim.train(model=own, data=numbers(), partition="iid", federation={"holders": 5}, **SETTINGS)
    assert not torch.allclose(moved.model[0].weight, before["0.weight"], atol=1e-3)
    assert all(torch.equal(own.state_dict()[name], value) for name, value in before.items())


def test_federated_equals_centralized_and_callbacks_see_every_step() -> None:
    seen: list[tuple[int, dict[str, float | None]]] = []
    owners = np.array([f"school {i % 7}" for i in range(200)])
    run = fedsim.train(
        model=net(), data=numbers(), partition=owners, callbacks=[lambda *a: seen.append(a)], **SETTINGS
    )
    alone = fedsim.train(
        model=net(), data=numbers(), partition="iid", federation={"holders": 1, "nodes": 1}, **SETTINGS
    )
    for one, other in zip(run.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert run.config.federation.holders == 7
    assert [step for step, _ in seen] == [1, 2, 3, 4] == [line["step"] for line in run.metrics]
    assert seen[-1][1]["rmse"] == run.score == run.result["rmse"]
    assert (run.headline.name, run.headline.higher_is_better) == ("rmse", False)
    assert run.ledger.steps == 4
    assert run.epsilon == pytest.approx(run.ledger.epsilon().value)
    assert run.result["epsilon"]["example_check"]["value"] >= run.epsilon > 0


def test_a_run_belongs_to_its_objects(tmp_path: Path) -> None:
    kept = {"partition": "iid", "federation": {"holders": 3}, "out": tmp_path / "run", **SETTINGS}
    fedsim.train(model=net(), data=numbers(), **kept)
    again = fedsim.train(model=net(), data=numbers(), resume=True, **kept)
    assert again.ledger.steps == 4
    with pytest.raises(InputError, match=r"another configuration: model.name"):
        fedsim.train(model=net(1), data=numbers(), resume=True, **kept)
    other = numbers()
    changed = VALUES.copy()
    changed[0] += 1.0
    other = Data((INPUTS[:200], changed[:200]), (INPUTS[200:], VALUES[200:]), values=1, names=["height"])
    with pytest.raises(InputError, match=r"another configuration: data.name"):
        fedsim.train(model=net(), data=other, resume=True, **kept)
    with pytest.raises(InputError, match=r"backend must be local for objects handed in from Python"):
        fedsim.train(model=net(), data=numbers(), backend="simulation", **{**kept, "out": tmp_path / "new"})
    assert not (tmp_path / "new").exists()


def test_two_calls_get_folders_of_their_own() -> None:
    runs = [
        fedsim.train(model=net(), data=numbers(), partition="iid", federation={"holders": 2}, **SETTINGS)
        for _ in range(2)
    ]
    assert runs[0].folder != runs[1].folder
    assert runs[0].result["parameters_sha256"] == runs[1].result["parameters_sha256"]


def test_a_data_set_of_images_is_read_item_by_item() -> None:
    pictures = [RNG.integers(0, 256, (6, 5, 3)).astype(np.uint8) for _ in range(4)]
    of_pillow = [(Image.fromarray(p), i % 2) for i, p in enumerate(pictures)]
    of_torch = [(torch.from_numpy(p).movedim(-1, 0), torch.tensor(i % 2)) for i, p in enumerate(pictures)]
    pair = (torch.from_numpy(np.stack(pictures)).movedim(-1, 1), torch.tensor([0, 1, 0, 1]))
    found = [Data(given, given[:], classes=2).splits.train for given in (of_pillow, of_torch, [*pair])]
    for data in found:
        assert np.array_equal(data.inputs, np.stack(pictures))
        assert data.targets.tolist() == [0, 1, 0, 1]
        assert data.mean == data.std == (0.5, 0.5, 0.5)
    grey = Data([(Image.fromarray(p[..., 0]), 0) for p in pictures], of_grey(pictures), classes=2)
    assert grey.splits.train.inputs.shape == (4, 6, 5, 1)


def of_grey(pictures: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack(pictures)[..., :1], np.zeros(len(pictures), int)


@pytest.mark.parametrize(
    ("train", "declared", "message"),
    [
        ([(np.zeros(3), 0), (np.zeros(4), 0)], {"classes": 2}, "one shape and kind.*item 1"),
        ([(np.zeros(3), 2)], {"classes": 2}, r"labels must lie in 0 \.\. 1.*got 2 \.\. 2"),
        ([(np.zeros(3), 0)], {}, "declare its targets by one of"),
        ([(np.zeros(3), 0)], {"classes": 2, "values": 1}, "declare its targets by one of"),
        ([np.zeros(3)], {"classes": 2}, r"items \(input, target\)"),
        (3, {"classes": 2}, "pair of arrays"),
        ((np.zeros((4, 3)), np.zeros(5, int)), {"classes": 2}, "as many targets as inputs, got 4 and 5"),
        ((np.full((2, 3), np.nan), np.zeros(2, int)), {"classes": 2}, "must be finite"),
        (([[1, 5]], [0]), {"classes": 2}, r"items \(input, target\)"),
    ],
)
def test_examples_that_do_not_fit_are_refused(train: Any, declared: dict[str, int], message: str) -> None:
    good = (np.zeros((2, 3)), np.zeros(2, int))
    with pytest.raises(InputError, match=message):
        Data(train, good, **declared)


def test_predictions_are_those_that_were_scored(trained: fedsim.Run) -> None:
    test = datasets.load(trained.config.data).test
    found = trained.predict(np.asarray(test.inputs))
    assert np.mean(found.best == test.targets) == trained.score
    np.testing.assert_allclose(found.outputs.sum(1), 1.0, rtol=1e-5)
    assert found.names[0] == "T-shirt/top"
    shuffled = fedsim.predict(trained.folder, torch.tensor(np.asarray(test.inputs[:7])).movedim(-1, 1))
    assert np.array_equal(shuffled.best, found.best[:7])
    for wrong in (np.zeros((2, 28, 28, 3), np.uint8), np.zeros((2, 28, 28, 1), np.float32), test.inputs[:0]):
        with pytest.raises(InputError, match="as the model was trained on"):
            trained.predict(wrong)


def test_a_run_folder_stands_alone(
    trained: fedsim.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(trained.folder, folder)
    (folder / "config.yaml").unlink()  # names data that are not here
    Image.fromarray(np.full((40, 30), 99, np.uint8)).save(tmp_path / "grey.png")
    np.save(tmp_path / "two.npy", np.zeros((2, 28, 28, 1), np.uint8))
    code = (
        "import sys; sys.modules['fedsim.data.datasets'] = None\n"  # nothing may load data
        "from fedsim.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["predict", str(folder), str(tmp_path / "two.npy"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["predictions"]) == 2
    assert command(["predict", str(folder), str(tmp_path / "grey.png")]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head == "input,class,probability"
    name, label, probability = line.split(",")
    assert name == "grey.png"
    assert label in trained.card.targets.names
    assert 0.1 <= float(probability) <= 1.0
    card = model_card.read(folder / "model.json")
    assert (card.outputs, card.targets.names[1], card.example_shape) == (10, "Trouser", (1, 28, 28))
    assert card.epsilon["example"]["value"] == trained.epsilon
    assert "holder" not in card.epsilon, "that of a holder is sensitive without a declared cap"


def test_other_weights_than_the_cards_are_refused(trained: fedsim.Run, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(trained.folder, folder)
    weights = folder / "final.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    with pytest.raises(InputError, match=r"must be the weights that model.json names"):
        fedsim.load_run(folder).model  # noqa: B018
    (folder / "model.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"expected the model.json of a finished run"):
        fedsim.load_run(folder).card  # noqa: B018


def test_an_exported_program_gives_the_models_outputs(trained: fedsim.Run, tmp_path: Path) -> None:
    assert command(["export", str(trained.folder), "--out", str(tmp_path / "out")]) == 0
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1, (
        "who may read one may read all"
    )
    with zipfile.ZipFile(tmp_path / "out" / "model.pt2") as packed:
        for name in packed.namelist():
            assert not any(folder in packed.read(name) for folder in (b"site-packages", HERE)), name
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    test = np.array(datasets.load(trained.config.data).test.inputs)
    for count in (1, 7, 100):
        outputs = program(torch.from_numpy(test[:count]))
        probabilities = outputs.softmax(1).detach().numpy()
        np.testing.assert_allclose(probabilities, trained.predict(test[:count]).outputs, rtol=1e-4, atol=1e-6)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as held:
        assert set(held.keys()) == set(trained.model.state_dict())
        said = json.loads(held.metadata()["fedsim"])
    assert said["epsilon"]["example"]["value"] == trained.epsilon
    with pytest.raises(InputError, match="must not hold a model already"):
        fedsim.export(trained, tmp_path / "out")


def test_a_folder_without_a_finished_run_is_told_from_one_without_any(
    trained: fedsim.Run, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"nowhere must be the folder of a finished run, and holds no run\. Its path"
    ):
        fedsim.load_run(tmp_path / "nowhere")
    shutil.copytree(trained.folder, tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    with pytest.raises(
        InputError, match=r"has no result\.json\. Finish it by the same command with --resume"
    ):
        fedsim.load_run(tmp_path / "cut")


def test_an_export_leaves_later_predictions_alone(trained: fedsim.Run, tmp_path: Path) -> None:
    """Also where it is the first thing a process does: what tracing makes must not stay behind."""
    test = np.array(datasets.load(trained.config.data).test.inputs)[:5]
    expected = trained.predict(test).outputs
    examples._of_channels.cache_clear()
    fedsim.export(trained, tmp_path / "out")
    np.testing.assert_array_equal(trained.predict(test).outputs, expected)


def test_a_given_model_is_handed_in_again_where_it_is_not_known(tmp_path: Path) -> None:
    run = fedsim.train(model=net(), data=numbers(), partition="iid", federation={"holders": 2}, **SETTINGS)
    expected = run.predict(INPUTS[:3]).outputs
    fedsim.given._held.clear()
    with pytest.raises(InputError, match="Hand it in again, as model="):
        fedsim.load_run(run.folder).model  # noqa: B018
    np.testing.assert_array_equal(fedsim.load_run(run.folder, net(5)).predict(INPUTS[:3]).outputs, expected)


def test_what_can_be_chosen_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["optimizer.name"]["momentum"][1] == {"momentum": 0.9}
    assert "alpha" in found["federation.partition"]["dirichlet"][1]
    for setting, variants in found.items():
        assert all(about for about, _ in variants.values()), f"{setting}: every variant says what it is"
    assert command(["list", "data.nam"]) == 2


def test_numbers_of_privacy_are_those_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    spent = fedsim.epsilon(1.0, 0.01, 100, 1e-5)
    noise = fedsim.calibrate(spent.value, 0.01, 100, 1e-5).noise_multiplier
    assert noise == pytest.approx(1.0, rel=1e-3)
    settings = ["--noise-multiplier", "1", "--sampling-rate", "0.01", "--steps", "100", "--json"]
    assert command(["epsilon", *settings]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"]["pld"]["value"] == spent.value


def test_importing_it_is_cheap_and_shadows_nothing() -> None:
    code = (
        "import sys, fedsim\n"
        "assert not {'torch', 'flwr', 'omegaconf', 'scipy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for found in pkgutil.iter_modules(fedsim.__path__[:1], "fedsim."):
        importlib.import_module(found.name)
    assert all(callable(getattr(fedsim, name)) for name in fedsim.__all__), "a module hides a name"


def test_functions_and_classes_stand_where_names_may() -> None:
    @fedsim.metric(unit="%")
    def near(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((outputs - targets).abs() < 1.0).float()[:, 0]

    changed = {
        **SETTINGS,
        "task": {"name": "regression", "options": {"metrics": [near]}},
        "optimizer": {"learning_rate": np.float64(0.1), "schedule": lambda progress: 1.0 - progress},
    }
    run = fedsim.train(model=net(), data=numbers(), partition="iid", federation={"holders": 3}, **changed)
    assert 0.0 <= run.result["near"] <= 1.0
    assert [line["learning_rate"] for line in run.metrics] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_what_is_handed_in_says_what_need_not_be_repeated() -> None:
    words = np.where(VALUES[:, 0] > 1.0, "tall", "short")
    owners = [f"school {i % 4}" for i in range(200)]
    pairs = (INPUTS[:200], words[:200]), (INPUTS[200:], words[200:])
    data = Data(*pairs, classes=2, names=["short", "tall"], holders=owners)
    assert data.splits.train.targets.tolist() == (words[:200] == "tall").astype(int).tolist()
    model = nn.Linear(8, 2).double()
    settings = {**SETTINGS, "task": "classification"}
    run = fedsim.train(model=model, data=data, partition="natural", **settings)
    assert run.config.federation.holders == 4
    for federation in ({"partition": "natural"}, {"partition": {"name": "natural"}}):
        again = fedsim.train(
            model=model, data=data, federation=federation, out="again", resume=True, **settings
        )
        assert again.config.federation.holders == 4
        assert again.folder.name == "again"
    with pytest.raises(InputError, match=r"must be 4, the number of owners"):
        fedsim.train(model=model, data=data, federation={"partition": "natural", "holders": 5}, **settings)
    assert fedsim.check(model=model, data=data, **settings)["holders"]["holders"] == 4
    assert run.model.weight.dtype == torch.float64
    with pytest.raises(InputError, match=r"the classes must be named, in their order: names="):
        Data(*pairs, classes=2)
    with pytest.raises(InputError, match=r"must be one of the declared classes short, high"):
        Data(*pairs, classes=2, names=["short", "high"])
    with pytest.raises(InputError, match=r"an owner for each of 200 training examples, got 3\. Give"):
        Data(*pairs, classes=2, names=["short", "tall"], holders=["a", "b", "c"])
    with pytest.raises(InputError, match=r"must be 2, one for each as declared, got 1: short\. Name all"):
        Data(*pairs, classes=2, names=["short"])


def test_probabilities_are_no_logits(tmp_path: Path) -> None:
    """Cross entropy takes the softmax of what a model says; log probabilities are logits."""
    data = Data((INPUTS[:200], VALUES[:200, 0] > 1.0), (INPUTS[200:], VALUES[200:, 0] > 1.0), classes=2)
    settings = {**SETTINGS, "task": "classification"}

    def ends_in(last: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 2), last)

    with pytest.raises(InputError, match=r"must give logits .* sum to 1\. Leave out its last softmax"):
        fedsim.check(model=ends_in(nn.Softmax(1)), data=data, **settings)
    fedsim.check(model=ends_in(nn.LogSoftmax(1)), data=data, **settings)
    fedsim.check(model=ends_in(nn.Softplus()), data=data, **settings)
    of_its_own = {**settings, "task": OfProbabilities()}
    fedsim.check(model=ends_in(nn.Softmax(1)), data=data, **of_its_own)


@dataclass(frozen=True)
class OfProbabilities(Classification):
    """A loss that takes probabilities."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -outputs.gather(1, targets[:, None])[:, 0].log()


def test_an_optimizer_of_torch_is_none_of_ours() -> None:
    data, model = numbers(), net()
    for handed, said in (
        (torch.optim.SGD, "the class torch.optim.sgd.SGD"),
        (torch.optim.SGD(model.parameters(), 0.1), "an object of torch.optim.sgd.SGD"),
    ):
        with pytest.raises(InputError, match=f"the object handed in is {said}. Derive it"):
            fedsim.check(model=model, data=data, **{**SETTINGS, "optimizer": handed})


def test_a_task_handed_in_is_kept_as_its_settings(tmp_path: Path) -> None:
    kind = {**SETTINGS, "task": Regression(center=100.0, scale=10.0, unit="cm")}
    raised = Data((INPUTS[:200], VALUES[:200] + 100), (INPUTS[200:], VALUES[200:] + 100), values=1)
    run = fedsim.train(
        model="linear", data=raised, partition="iid", federation={"holders": 2}, **kind, out=tmp_path / "run"
    )
    expected = run.predict(INPUTS[:3]).outputs
    fedsim.given._held.clear()
    again = fedsim.load_run(tmp_path / "run")
    np.testing.assert_array_equal(again.predict(INPUTS[:3]).outputs, expected)
    assert np.all(expected > 50), "in the targets' own unit"
    fedsim.export(again, tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    found = program(torch.from_numpy(INPUTS[:3])).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_another_module_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    run = fedsim.train(model=net(), data=numbers(), partition="iid", federation={"holders": 2}, **SETTINGS)
    other = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    with pytest.raises(InputError, match="its hooks or what it keeps in attributes are others now"):
        fedsim.load_run(run.folder, other).model  # noqa: B018


def test_pictures_are_taken_as_image_folders_take_them() -> None:
    colours = Image.fromarray(RNG.integers(0, 256, (6, 5, 3)).astype(np.uint8))
    palette = colours.convert("P")
    data = Data([(palette, 0)], [(palette, 1)], classes=2)
    assert np.array_equal(data.splits.train.inputs[0], np.asarray(palette.convert("RGB")))
    with pytest.raises(InputError, match="must not be transparent"):
        Data([(Image.new("RGBA", (5, 6), (1, 2, 3, 4)), 0)], [(palette, 1)], classes=2)
    planes = np.zeros((4, 3, 8, 8), np.uint8)
    with pytest.raises(InputError, match="channels of its images in the last axis"):
        Data((planes, np.zeros(4, int)), (planes, np.zeros(4, int)), classes=2)


def test_rows_and_texts_are_predicted_as_they_were_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{x:.3f},{'a' if x > 0.5 else 'b'},{'yes' if x > 0.5 else 'no'}" for x in RNG.random(120)]
    for name, part in (("train", lines[:100]), ("test", lines[100:])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["x,kind,wet", *part]), encoding="utf-8")
    columns = {"numbers": {"x": [0, 1]}, "words": {"kind": ["a", "b"]}, "target": "wet"}
    table = {"name": "table", "root": tmp_path, "options": {**columns, "classes": ["no", "yes"]}}
    settings = {**SETTINGS, "task": "classification", "partition": "iid", "federation": {"holders": 2}}
    run = fedsim.train(model="linear", data=table, **settings)
    assert command(["predict", str(run.folder), str(tmp_path / "test.csv"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["predictions"]
    truth = [line.endswith("yes") for line in lines[100:]]
    assert np.mean([a == b for a, b in zip(said, truth, strict=True)]) == pytest.approx(run.score)


def test_inputs_that_are_no_numbers_are_not_predicted(trained: fedsim.Run) -> None:
    run = fedsim.train(model=net(), data=numbers(), partition="iid", federation={"holders": 2}, **SETTINGS)
    with pytest.raises(InputError, match="must be finite"):
        run.predict(np.full((1, 8), np.nan, np.float32))


def test_columns_have_one_order_however_they_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a row is predicted to be is what was scored, in whatever order its columns were declared."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 300), ("test", 60)):
        width, age, long = rng.uniform(-1, 1, (3, count))
        lines = [f"{w},{a},{x},{w - x}" for w, a, x in zip(width, age, long, strict=True)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["width,age,long,y", *lines]) + "\n")
    found = []
    for number, columns in enumerate((("width", "age", "long"), ("long", "width", "age"))):
        options = {"numbers": {name: [-1, 1] for name in columns}, "target": "y"}
        run = fedsim.train(
            data={"name": "table", "root": str(tmp_path), "options": options},
            task="regression",
            model="linear",
            preset="nonprivate",
            federation={"holders": 3, "partition": "iid"},
            train={"steps": 40, "expected_batch_size": 300},
            optimizer={"learning_rate": 0.5},
            monitor={"tensorboard": False, "progress": False},
            out=tmp_path / f"run{number}",
        )
        assert run.score < 0.05
        capsys.readouterr()
        assert command(["predict", str(run.folder), str(tmp_path / "test.csv"), "--json"]) == 0
        said = np.array(json.loads(capsys.readouterr().out)["predictions"], float).reshape(-1)
        wanted = [float(line.split(",")[3]) for line in (tmp_path / "test.csv").read_text().split()[1:]]
        error = float(np.sqrt(np.mean(np.subtract(said, wanted) ** 2)))
        assert error == pytest.approx(run.score, rel=1e-3)
        found.append(run)
    assert found[0].config.to_json() == found[1].config.to_json()
    assert list(found[0].config.data.options["numbers"]) == ["age", "long", "width"]
