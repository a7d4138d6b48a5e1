"""Studies: by which examples models are judged, runs without a score, names, and what records say of runs."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedsim import loading
from fedsim.cli.many import runner_of
from fedsim.config import Config
from fedsim.data import datasets
from fedsim.data.examples import ArrayDataset
from fedsim.data.targets import Targets
from fedsim.engine.run_folder import RunFolder
from fedsim.report.cells import Cell
from fedsim.study import compare, taken_up
from fedsim.tasks import Task
from fedsim.tasks.classification import Classification
from fedsim.tasks.multi_label import MultiLabel
from fedsim.validate import InputError, RunError
from tests.conftest import command


def _arrays(path: Path, targets: str = "", inputs: int = 0, images: bool = False) -> Path:
    """Arrays of three classes with 120 and 60 examples; other targets, or others of the same inputs."""
    rng = np.random.default_rng(inputs)
    held = {
        "train_inputs": rng.uniform(-1, 1, (120, 5)).astype(np.float32),
        "train_targets": np.arange(120) % 3,
        "test_inputs": rng.uniform(-1, 1, (60, 5)).astype(np.float32),
        "test_targets": np.arange(60) // 20,
    }
    if targets == "test":
        held["test_targets"][:5] = 2
    elif targets == "order":
        held["test_targets"] = held["test_targets"][::-1]
    elif targets == "train":
        held["train_targets"] = held["train_targets"][::-1]
    elif targets == "one":
        held["test_targets"][:] = 1
    np.savez(path, **held)
    return path


RECIPE = {
    "data": {"name": "arrays", "root": "a.npz", "options": {"classes": 3}},
    "model": {"name": "linear"},
    "federation": {"holders": 4, "partition": "iid"},
    "privacy": {"noise_multiplier": 1.0, "delta": 1.0e-4},
    "train": {"steps": 2, "expected_batch_size": 30, "eval_every": 2, "checkpoint_every": 2},
    "monitor": {"tensorboard": False},
}


def _comparison(folder: Path, variants: dict[str, list[str]], **more: object) -> Path:
    """A comparison on arrays in `folder`; its runs take a second each."""
    if not (folder / "a.npz").exists():
        _arrays(folder / "a.npz")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    content = {"title": "t", "recipe": "recipe.yaml", "seeds": [0], "variants": variants, **more}
    (path := folder / "c.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("targets", "setting"),
    [
        ("test", "data.root"),
        ("order", "data.root"),
        ("train", "data.root"),
        ("test", "options"),
    ],
)
def test_variants_judged_by_other_examples_are_refused_before_anything_runs(
    targets: str, setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever setting makes them others: what is compared is their targets, one by one."""
    changes = [f"data.root={_arrays(tmp_path / 'b.npz', targets)}"]
    overrides = ["data.holdout_examples=50"] if targets == "train" else []
    if setting == "options":
        for name, last in (("train", "b"), ("test", "b"), ("hard", "a")):
            rows = "".join(f"{i / 9},{'ab'[i % 2] if i < 9 else last}\n" for i in range(10))
            (tmp_path / f"{name}.csv").write_text(f"x,y\n{rows}")
        read = "{train: train.csv, test: test.csv, numbers: {x: [-1, 1]}, target: y, classes: [a, b]}"
        overrides = ["data.name=table", f"data.options={read}", f"data.root={tmp_path}"]
        overrides += ["train.expected_batch_size=5", "federation.holders=2", "privacy.delta=1e-6"]
        changes = ["data.options.test=hard.csv"]
    path = _comparison(tmp_path, {"same": [], "other": changes}, overrides=overrides)
    if setting == "options":
        held = yaml.safe_load(path.read_text())
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "data": {}}))
        path.write_text(yaml.safe_dump(held, sort_keys=False))
    assert command(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "variant 'other': the " in said
    assert "their targets are others than those of 'same'" in said
    assert not (tmp_path / "out").exists()


def test_other_inputs_of_the_same_examples_are_compared_and_told(tmp_path: Path) -> None:
    """What a model is shown of an example is a choice: features, columns, sizes; and a copy is no other."""
    shutil.copy(_arrays(tmp_path / "a.npz"), tmp_path / "copy.npz")
    other = _arrays(tmp_path / "b.npz", inputs=1)
    variants = {
        "own": [],
        "copy": [f"data.root={tmp_path / 'copy.npz'}"],
        "others": [f"data.root={other}"],
        "fewer to train on": ["data.train_examples=100"],
    }
    path = _comparison(tmp_path, variants)
    assert command(["compare", str(path), "--out", str(tmp_path / "out")]) == 0
    said = "Models see other inputs of the same examples: own, copy, fewer to train on; others."
    for name in ("report.html", "table.md"):
        assert said in (tmp_path / "out" / name).read_text()
    del variants["others"]
    path = _comparison(tmp_path, variants)
    assert command(["compare", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "other inputs" not in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("split", ["class", "labels", "values", "tokens"])
def test_targets_have_one_digest_whatever_they_are_kept_in(split: str) -> None:
    """Classes beside pictures come in small integers; the inputs are no part of it."""
    kinds = {
        "class": (Targets("class", 3), np.array([0, 2, 1])),
        "labels": (Targets("labels", 2), np.array([[0, 1], [1, 1], [0, 0]], np.uint8)),
        "values": (Targets("values", 1), np.array([[0.5], [1.5], [-1.0]], np.float32)),
        "tokens": (Targets("tokens", 7), np.array([[1, 6], [2, -100], [0, 0]])),
    }
    declared, targets = kinds[split]
    inputs = np.zeros((3, 4), np.float32)
    held = ArrayDataset("d", inputs, targets, None, declared)
    assert held.digest_of_targets() == dataclasses.replace(held, inputs=inputs + 1).digest_of_targets()
    assert held.digest() != dataclasses.replace(held, inputs=inputs + 1).digest()
    assert held.take(np.array([1, 0, 2])).digest_of_targets() != held.digest_of_targets()
    assert held.take(slice(2)).digest_of_targets() != held.digest_of_targets()
    if split == "class":
        small = dataclasses.replace(held)
        object.__setattr__(small, "targets", targets.astype(np.uint8))
        assert small.digest_of_targets() == held.digest_of_targets()


def test_runs_over_data_that_change_meanwhile_do_not_stand_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = _comparison(tmp_path, {"a": []}, seeds=[0, 1]), tmp_path / "out"
    train = runner_of("local")

    def runner(config: Config, folder: RunFolder) -> dict[str, Any]:
        if config.seed == 1:
            _arrays(tmp_path / "a.npz", "test")
            datasets._load.cache_clear()
        return train(config, folder)

    with pytest.raises(RunError, match="the data changed meanwhile"):
        compare.run(compare.load(path), [], out, runner, io.StringIO())
    assert len(json.loads((out / "cells.json").read_text())) == 1


@pytest.mark.parametrize(
    ("task", "targets", "defined"),
    [
        (Classification(auc="macro"), [1, 1, 1], False),
        (Classification(auc="macro"), [1, 1, 0], True),
        (Classification(auc="macro"), [1], False),
        (Classification(), [1, 1, 1], True),
        (MultiLabel(), [[0, 1], [0, 1]], False),
        (MultiLabel(), [[0, 1], [0, 0]], True),
    ],
)
def test_an_area_is_not_defined_where_all_examples_are_alike(
    task: Task, targets: list[Any], defined: bool
) -> None:
    given = torch.tensor(targets)
    outputs = torch.randn(len(targets), 2 if given.ndim > 1 else 3)
    meter = task.meter()
    meter.add(outputs, given)
    assert bool(task.undefined(given.numpy())) != defined
    assert np.isnan(meter.result().get("auc", 0.0)) != defined, "the meter is the oracle"


@pytest.mark.parametrize("study", ["compare", "repeat", "tune"])
def test_a_headline_that_no_model_can_have_is_refused_before_anything_runs(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _arrays(tmp_path / "a.npz", "one")
    area = ["task.options.auc=macro", "task.options.headline=auc"]
    path = _comparison(tmp_path, {"a": [], "b": ["optimizer.learning_rate=0.1"]}, overrides=area)
    words = [study, str(path)]
    if study == "repeat":
        words = [study, str(tmp_path / "recipe.yaml"), *area]
    if study == "tune":
        content = {"recipe": "recipe.yaml", "overrides": area, "holdout_examples": 1, "trials": 1}
        content["space"] = {"optimizer.learning_rate": [0.1, 1]}
        (tmp_path / "tune.yaml").write_text(yaml.safe_dump(content))
        words = [study, str(tmp_path / "tune.yaml")]
    assert command([*words, "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "auc must be defined on the" in said
    assert "task.options.headline" in said
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_score_is_left_out_with_the_reason_and_its_row_is_marked(
    kept: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one whose own metric is not a number: nothing of the data tells that before."""
    source, out = kept[0], kept[1] / "compare" / "tiny"
    paths = sorted((out / "runs").glob("*/result.json"))
    for path in paths[:1]:
        path.write_text(json.dumps({**json.loads(path.read_text()), "accuracy": None}))
    assert command(["compare", source, "--out", str(out)]) == 0
    lost = "central at epsilon 2, seed 0"
    assert paths[0].parent.name.startswith("central-eps2-seed0")
    text = (out / "table.md").read_text()
    assert f"Accuracy is not defined, and left out: {lost}." in text
    assert "Diverged" not in text
    assert "Unfinished" not in text
    assert "(1 of 2 seeds, no interval)" in text
    assert "2 seeds, fewer where a row says so, judged by" in text
    for path in paths:
        path.write_text(json.dumps({**json.loads(path.read_text()), "accuracy": None}))
    assert command(["compare", source, "--out", str(out)]) == 3
    assert "accuracy is not defined. Judge by more examples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variants", "epsilons", "message"),
    [
        (["site a", "site_a"], [1], "'site a' and 'site_a' look the same in names of folders"),
        (["a", "a "], [1], "look the same in a table"),
        (["a  b", "a b"], [1], "look the same in a table"),
        (["A", "a"], [1], "look the same in a table"),
        (["a/b", "a:b"], [1], "names of folders"),
        ([f"{'x' * 100}a", f"{'x' * 100}b"], [1], "names of files"),
        (["a"], [1, 1.0000001], "epsilons must differ in their first six digits"),
    ],
)
def test_names_that_would_share_a_place_are_refused(
    variants: list[str], epsilons: list[float], message: str, tmp_path: Path
) -> None:
    path = _comparison(tmp_path, {name: [] for name in variants}, epsilons=epsilons)
    with pytest.raises(InputError, match=message):
        compare.load(path)


def test_no_two_runs_have_one_folder_and_folders_of_before_are_found(tmp_path: Path) -> None:
    """A variant with a budget in its name, and one at that budget, that differ in what changes no result."""
    own = ["privacy={target_epsilon: 1, noise_multiplier: null}", "privacy.target_epsilon=1"]
    variants = {"a": ["privacy.noise_multiplier=null"], "a-eps1": [*own, "federation.nodes=1"]}
    variants["a"] = []
    path = _comparison(tmp_path, variants, epsilons=[1], overrides=["privacy.noise_multiplier=null"])
    with pytest.raises(
        InputError, match="that of 'a at epsilon 1, seed 0' and of 'a-eps1, seed 0' is a-eps1-"
    ):
        compare.cells(compare.load(path), [])
    names = {"the recipe": [], "0% silent, 30 of 30": ["train.steps=3"], "ReLU for tanh": ["train.steps=4"]}
    path = _comparison(tmp_path, names, epsilons=[2.7], overrides=["privacy.noise_multiplier=null"])
    found = [cell.folder.rpartition("-")[0] for cell in compare.cells(compare.load(path), [])]
    before = ["the_recipe-eps2.7-seed0", "0_silent_30_of_30-eps2.7-seed0", "ReLU_for_tanh-eps2.7-seed0"]
    assert found == before


def test_records_say_what_finished_runs_were_made_with(
    kept: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not what a later command asks for: settings that change no result do not make runs anew."""
    source, out = kept[0], kept[1] / "compare" / "tiny"
    asked = ["federation.nodes=5", "engine.physical_batch_size=32", "monitor.progress=false"]
    assert command(["compare", source, *asked, "--out", str(out)]) == 0
    said = "(finished before, engine.physical_batch_size=64, federation.nodes=2)"
    assert capsys.readouterr().err.count(said) == 6
    page = (out / "report.html").read_text()
    assert "nodes=5" not in page
    assert "size=32" not in page
    again = shlex.join(["fedsim", "compare", source, "monitor.progress=false"])
    made = "engine.physical_batch_size=64 federation.nodes=2"
    assert f"<code>{html.escape(f'{again} {made}')}</code>" in page
    assert "Finished before, otherwise than is asked now: central at epsilon 2, seed 0, " in page
    gone = next((out / "runs").glob("central-eps20-seed1-*"))
    shutil.rmtree(gone)
    assert command(["compare", source, *asked, "--out", str(out)]) == 0
    cells = [Cell(**held) for held in json.loads((out / "cells.json").read_text())]
    for cell in cells:
        fresh = (cell.variant, cell.epsilon, cell.seed) == ("central", 20.0, 1)
        assert ("federation.nodes=5" in cell.settings) == fresh
        assert ("federation.nodes=2" in cell.settings) != fresh
        assert cell.result["nodes"] == (5 if fresh else 2)
    page = (out / "report.html").read_text()
    for seed, nodes in ((0, 2), (1, 5)):
        row = page.partition(f"Settings of central, epsilon 20, seed {seed}</dt>")[2].partition("</dd>")[0]
        assert f"federation.nodes={nodes}<" in row, "runs of one row that differ are told apart"
    everywhere = page.partition("settings of all rows</dt>")[2].partition("</dd>")[0]
    assert "federation.nodes=5" not in everywhere
    assert "<code>monitor.progress=false</code>" in everywhere


def test_a_row_does_not_claim_settings_that_an_override_replaced(tmp_path: Path) -> None:
    path = _comparison(tmp_path, {"a": ["optimizer.learning_rate=0.1", "train.steps=3"]})
    (cell,) = compare.cells(compare.load(path), ["optimizer.learning_rate=5"])
    assert cell.settings == ["train.steps=3"]
    (cell,) = compare.cells(compare.load(path), ["optimizer={name: sgd}"])
    assert cell.settings == ["optimizer.learning_rate=0.1", "train.steps=3"], "it is merged, and says no rate"
    assert cell.config.optimizer.learning_rate == 0.1


@pytest.mark.parametrize(
    ("held", "asked"),
    [
        ({}, {}),
        ({"engine.physical_batch_size": 7}, {"engine.physical_batch_size": "auto"}),
        ({"monitor.public_only": False}, {}),
        ({"title": "other"}, {}),
    ],
)
def test_what_is_left_to_the_run_is_no_difference(
    held: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    noise = {"privacy.noise_multiplier": 1.0}
    folder.write_config(loading.loaded({}, {**noise, **held}))
    wanted = loading.loaded({}, {**noise, **asked})
    assert taken_up.otherwise(folder, wanted) == {}, "an unfinished run is made as asked"
    folder.write_result({})
    assert taken_up.otherwise(folder, wanted) == {}
    folder.write_config(loading.loaded({}, {**noise, **held, "engine.threads": 3}))
    assert taken_up.otherwise(folder, wanted) == {"engine.threads": 3}
