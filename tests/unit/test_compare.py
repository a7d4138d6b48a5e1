"""Comparisons: every shipped one is valid, cells resume, tables and page say what the runs found."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import html
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.container import ErrorbarContainer

from benchmarks import compared, report, tables
from fedsim import loading, provenance
from fedsim.cli.many import runner_of
from fedsim.config import CONFIG_DIR, Config
from fedsim.data import datasets
from fedsim.data.examples import ArrayDataset
from fedsim.data.targets import Targets
from fedsim.engine.experiment import prepare
from fedsim.engine.run_folder import RunFolder
from fedsim.report import figures, markers
from fedsim.report.cells import Cell
from fedsim.report.page import About, page
from fedsim.report.table import COSTS, RESULTS, note, table
from fedsim.study import compare, taken_up
from fedsim.study.tuned import Chosen, Tuned, recipe_digest, recipe_name
from fedsim.tasks import Task
from fedsim.tasks.classification import Classification
from fedsim.tasks.multi_label import MultiLabel
from fedsim.validate import InputError, RunError
from tests.conftest import SMALL, command

SHIPPED = sorted((CONFIG_DIR / "compare").glob("*.yaml"))

TINY = """
title: tiny
recipe: base
seeds: [0, 1]
epsilons: [2, 20]
overrides: [{overrides}]
variants:
  central: []
  nonprivate: [preset=nonprivate, privacy.target_epsilon=null, privacy.clip_norm=1.0]
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return _write_tiny(tmp_path / "tiny.yaml")


def _write_tiny(path: Path) -> Path:
    given = [s for s in SMALL if not s.startswith("privacy.target") and not s.startswith("privacy.noise")]
    path.write_text(TINY.format(overrides=", ".join([*given, "train.eval_every=2"])))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of six runs; `tiny.yaml` lies beside it."""
    folder = tmp_path_factory.mktemp("comparison")
    _write_tiny(folder / "tiny.yaml")
    with contextlib.redirect_stderr(io.StringIO()) as log:
        assert command(["compare", str(folder / "tiny.yaml"), "--out", str(folder / "out")]) == 0
    (folder / "log").write_text(log.getvalue())
    return folder / "out"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_comparisons_are_valid(path: Path) -> None:
    wanted = compare.load(path)
    planned = compare.cells(wanted, [])
    assert len({cell.folder for cell in planned}) == len(planned) >= 2
    for cell in planned:
        first = cell.seed == planned[0].seed and cell.epsilon in (None, planned[0].epsilon)
        if first and wanted.recipe == "quickstart":  # of the embedded data
            assert prepare(cell.config).mechanism.steps > 0


def test_runs_all_cells_once_and_reports(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, tiny, log = finished, finished.parent / "tiny.yaml", (finished.parent / "log").read_text()
    assert log.count("finished before") == 0
    assert log.count("[") == 6, "two budgets and two seeds of central, two seeds of nonprivate"
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [row["variant"] for row in rows] == ["central", "central", "nonprivate"]
    assert [row["epsilon per example"] for row in rows] == ["2", "20", "none"]
    said = r"accuracy \d+\.\d\d % \(2 seeds, no interval\)"
    assert all(re.fullmatch(said, row["score"]) for row in rows)
    text = (out / "table.md").read_text()
    assert text.startswith("At epsilon 2, central reaches a test accuracy of ")
    assert text.count("\n| central |") == 3, "two results, one line of costs"

    assert command(["compare", str(tiny), "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("finished before") == 6


def test_a_wrong_variant_is_found_before_anything_runs(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_text(tiny.read_text() + "  broken: [federation.holders=100000]\n")
    assert command(["compare", str(tiny), "--out", str(tmp_path / "out")]) == 2
    assert "variant 'broken'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "variant", "message"),
    [
        (["seed=5"], "", "seed must be 0 in this run"),
        (["privacy.target_epsilon=8"], "", "target_epsilon must be 2 in this run"),
        ([], "  other: ['privacy={target_epsilon: 9}']", "target_epsilon must be 2 in this run"),
        ([], "  other: [task.options.headline=loss]", "task must be the same"),
        ([], "  other: [data.holdout_examples=100]", "data.holdout_examples must be the same"),
        ([], "  other: [data.test_examples=50]", "data.test_examples must be the same"),
        ([], "  other: [privacy.delta=1e-3]", "privacy.delta must be the same"),
        ([], "  'a | b': []", "none of"),
        ([], '  "a\\nb": []', "no line break"),
        ([], "  '[/x]': []", "none of"),
    ],
)
def test_runs_that_are_not_what_their_row_says_are_refused(
    given: list[str],
    variant: str,
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny.write_text(f"{tiny.read_text()}{variant}\n")
    assert command(["compare", str(tiny), *given, "--out", str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


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


def test_a_comparison_that_is_not_finished_says_so(finished: Path) -> None:
    cells = [Cell(**held) for held in json.loads((finished / "cells.json").read_text())]
    assert "Unfinished: 5 of 6 runs are there." in page(cells[:5], About("t", runs=6))
    assert "Unfinished" not in page(cells, About("t", runs=6))
    assert "Unfinished" not in (finished / "report.html").read_text()


def test_runs_that_diverge_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With and without parameters that are finite: scores of guesses are no results."""
    given = ["train.steps=2", "train.eval_every=2"]
    base = [s for s in SMALL if not s.startswith(("privacy.target", "privacy.noise"))]
    path = tmp_path / "c.yaml"
    path.write_text(
        f"title: t\nrecipe: base\nseeds: [0]\nepsilons: [2]\noverrides: [{', '.join([*base, *given])}]\n"
        "variants:\n  well: []\n  nan outputs: [optimizer.learning_rate=1e30]\n"
        "  no parameters: [optimizer.learning_rate=1e39]\n  after them: [optimizer.learning_rate=0.01]\n"
    )
    assert command(["compare", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "diverged; it is left out" in capsys.readouterr().err
    said = "Diverged, and left out: nan outputs at epsilon 2, seed 0; no parameters at epsilon 2, seed 0."
    for name in ("table.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert said in text
        assert "Unfinished" not in text
    cells = json.loads((tmp_path / "out" / "cells.json").read_text())
    assert [cell["variant"] for cell in cells] == ["well", "after them"]
    path.write_text(path.read_text().replace("  well: []\n", "").replace("=0.01", "=1e39"))
    assert command(["compare", str(path), "--out", str(tmp_path / "dead")]) == 3
    assert "has a score: all diverged. Lower the learning rates" in capsys.readouterr().err


def test_rows_of_several_versions_of_the_code_are_told(finished: Path) -> None:
    cells = [Cell(**held) for held in json.loads((finished / "cells.json").read_text())]
    assert "versions of the code" not in note(cells)
    cells[-1].result.update(code_hash="other", commit="c2")
    first = cells[0].result["commit"]
    told = f"({first}: central, nonprivate; c2: {cells[-1].variant})."
    assert f"Runs of 2 versions of the code stand side by side {told}" in note(cells)


def test_unknown_key_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_text(tiny.read_text().replace("seeds:", "sedes:"))
    assert command(["compare", str(tiny)]) == 2
    assert "seeds" in capsys.readouterr().err


class Page(HTMLParser):
    """What a page shows and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]


def test_the_page_needs_nothing_but_a_browser_and_shows_plots(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "video"} & set(page.tags)
    assert not re.search(r"url\((?!#)", text), "only parts of its own plots"
    assert "@import" not in text
    assert all(address.startswith("#") for address in page.addresses), "nothing is fetched"
    assert page.tags.count("svg") == page.tags.count("figure") == 5
    for caption in ("target epsilon", "against steps at epsilon 2", "Cost of one run", "over holders"):
        assert re.search(f"<figcaption>[^<]*{caption}", text), caption
    assert page.tags.count("tr") == 4 + 3, "results and costs, with their heads"
    assert page.tags.count("th") == len(RESULTS) + len(COSTS)
    assert text.index('class="lead"') < text.index("<svg") < text.index("<table"), "words, plots, numbers"
    for said in ("width=device-width", "prefers-color-scheme: dark", "fedsim compare", "Trusted: server"):
        assert said in text, said
    assert "#000000" not in text, "what is written takes the colour of the page"


def test_the_plots_show_what_the_cells_say(finished: Path) -> None:
    cells = [Cell(**held) for held in json.loads((finished / "cells.json").read_text())]
    pictures = dict(figures.figures(cells))
    (axes,) = pictures["Accuracy against the target epsilon, with 95% intervals"].axes
    (bars,) = axes.containers
    assert isinstance(bars, ErrorbarContainer)
    drawn = bars.lines[0].get_xydata()
    for budget, accuracy in drawn:
        group = [100 * c.result["accuracy"] for c in cells if c.epsilon == budget]
        assert accuracy == pytest.approx(np.mean(group))
    assert [x for x, _ in drawn] == [2, 20]
    assert not any(len(line) for line in bars.lines[2][0].get_segments()), "no interval of two seeds"
    third = [dataclasses.replace(c, seed=2, result={**c.result, "accuracy": 0.5}) for c in cells[::2]]
    (axes,) = dict(figures.figures([*cells, *third]))[
        "Accuracy against the target epsilon, with 95% intervals"
    ].axes
    (bars,) = axes.containers
    ends = np.concatenate(bars.lines[2][0].get_segments())[:, 1]
    group = [100 * c.result["accuracy"] for c in [*cells, *third] if c.epsilon == 2]
    assert len(group) == 3
    assert ends[1] - ends[0] == pytest.approx(2 * 4.3027 * np.std(group, ddof=1) / 3**0.5, rel=1e-4)
    (axes,) = pictures["Accuracy against steps at epsilon 2"].axes
    assert len(axes.lines) == 2, "and the one without a budget beside it"
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [2, 4, 6]
    (axes,) = pictures["Accuracy over holders: median, 5% to 95%"].axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["central, 2", "central, 20", "nonprivate"]
    (axes,) = pictures["Cost of one run"].axes
    legend = axes.get_legend()
    assert legend is not None
    assert {t.get_text() for t in legend.get_texts()} == {"central", "nonprivate"}


def test_public_only_runs_are_reported_without_the_spread_over_holders(finished: Path) -> None:
    cells = [Cell(**held) for held in json.loads((finished / "cells.json").read_text())]
    for cell in cells:
        cell.result["holder_scores"] = {}
    assert {row["holders' scores, 5% to 95%"] for row in table(cells)} == {"not computed"}
    assert page(cells, About("t")).count("<svg") == 4


@pytest.fixture
def kept(finished: Path, tmp_path: Path) -> tuple[str, Path]:
    """The comparison, and a folder in which its runs are finished."""
    shutil.copytree(finished, tmp_path / "runs" / "compare" / "tiny")
    source = shutil.copy(finished.parent / "tiny.yaml", tmp_path / "holders.yaml")
    return str(source), tmp_path / "runs"


def test_a_finished_comparison_becomes_a_result_file(
    kept: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, runs = kept
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "main", lambda given: given)
    assert compared.main([source, "--out", str(runs)]) == []
    assert capsys.readouterr().err.count("finished before") == 6
    held = json.loads((tmp_path / "results" / "holders.json").read_text())
    assert set(held) == {
        "command",
        "commit",
        "hardware",
        "seeds",
        "seconds",
        "findings",
        "rows",
        "note",
        "cells",
        "search",
    }
    assert held["command"] == f"fedsim compare {source}"
    assert held["seeds"] == [0, 1]
    assert held["hardware"] == provenance.hardware()
    assert held["rows"] == list(
        csv.DictReader(io.StringIO((runs / "compare" / "tiny" / "table.csv").read_text()))
    )
    assert len(held["cells"]) == 6
    text = markers.fill(
        "a\n<!-- holders -->\nold\n<!-- end holders -->\nb",
        {"holders": report.PARTS["docs/comparisons.md"]["holders"]},
    )
    assert text.startswith("a\n<!-- holders -->\n* At epsilon 2, ")
    assert text.endswith("<!-- end holders -->\nb")
    assert "\nold\n" not in text
    assert held["rows"][0]["score"] in text
    assert "\n2 seeds, judged by public test data. " in text
    assert held["commit"] in text
    assert f"| {held['seconds'] / 60:.0f} | - |" in report.minutes()
    missing = report.PARTS["docs/comparisons.md"]["label-skew"]()
    assert "python -m benchmarks.compared label_skew" in missing


def test_a_table_is_made_of_its_own_runs_and_of_one_machine(
    kept: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, runs = kept
    one, other = sorted((runs / "compare" / "tiny" / "runs").iterdir())[:2]
    shutil.rmtree(other)
    compared.make(source, [], runs, search=False, results=tmp_path)
    assert capsys.readouterr().err.count("finished before") == 5, "what is missing is run"
    result = json.loads((one / "result.json").read_text())
    result["hardware"]["processor"] = "another"
    (one / "result.json").write_text(json.dumps(result))
    with pytest.raises(InputError, match="2 kinds of hardware"):
        compared.make(source, [], runs, search=False, results=tmp_path)


def test_what_a_search_cost_stays_with_the_settings_it_chose(tmp_path: Path) -> None:
    chosen = [Chosen("central", 2.0, ["optimizer.learning_rate=0.5"])]
    (tmp_path / "tuned.yaml").write_text(Tuned("t", "", "", 3, 100, [0], chosen).write())
    wanted = compare.Comparison(tuned=str(tmp_path / "tuned.yaml"))
    before = tmp_path / "before.json"
    assert compared.known_search(wanted, before) is None
    trial = {"variant": "central", "epsilon": 2.0, "settings": ["optimizer.learning_rate=0.5"], "score": 0.5}
    before.write_text(json.dumps({"search": {"trials": [trial]}}))
    assert compared.known_search(wanted, before) == {"trials": [trial]}
    before.write_text(json.dumps({"search": {"trials": [{**trial, "settings": []}]}}))
    assert compared.known_search(wanted, before) is None, "of other settings"


def test_a_try_leaves_results_settings_and_pages_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a reduced comparison nor a reduced search comes in place of what was measured."""
    given = [s for s in SMALL if not s.startswith(("privacy.target", "privacy.noise"))]
    config, kept, runs = tmp_path / "configs", tmp_path / "results", tmp_path / "runs"
    for folder in ("compare", "tune", "tuned"):
        (config / folder).mkdir(parents=True)
    same = {"title": "t", "recipe": "base", "overrides": given, "epsilons": [2], "variants": {"a": []}}
    (config / "compare" / "tiny.yaml").write_text(
        yaml.safe_dump({**same, "seeds": [0], "tuned": "../tuned/tiny.yaml"})
    )
    search = {"trials": 2, "holdout_examples": 50, "space": {"train.ema_decay": [0.1, 0.3, 0.5]}}
    tuning = {"title": "t", "comparison": str(config / "compare" / "tiny.yaml"), **search}
    (config / "tune" / "tiny.yaml").write_text(yaml.safe_dump(tuning))
    (config / "tuned" / "tiny.yaml").write_text("as it was")
    kept.mkdir()
    (kept / "tiny.json").write_text("as it was")
    monkeypatch.setattr(tables, "RESULTS", kept)
    monkeypatch.setattr(compared, "CONFIG_DIR", config)
    monkeypatch.setattr(loading, "CONFIG_DIR", config)
    for name in ("base.yaml", "presets"):
        (config / name).symlink_to(CONFIG_DIR / name)
    monkeypatch.setattr(report, "main", lambda given: pytest.fail("the pages are not written"))
    words = ["tiny", "--search", "--out", str(runs), "--set", "train.steps=2"]
    assert compared.main(words) == 0
    assert f"stay as they are: this went to {runs / 'results'}" in capsys.readouterr().out
    assert (config / "tuned" / "tiny.yaml").read_text() == (kept / "tiny.json").read_text() == "as it was"
    chosen = (runs / "results" / "tiny.tuned.yaml").read_text()
    assert chosen.startswith("# Written by `fedsim tune tune/tiny train.steps=2`.")
    held = json.loads((runs / "results" / "tiny.json").read_text())
    assert held["search"]["command"] == "fedsim tune tune/tiny train.steps=2"
    assert held["command"] == "fedsim compare compare/tiny train.steps=2"
    (run,) = (runs / "compare" / "t" / "runs").iterdir()
    (entry,) = Tuned.read(runs / "results" / "tiny.tuned.yaml").chosen
    assert f"ema_decay: {entry.settings[0].partition('=')[2]}" in (run / "config.yaml").read_text()
    assert compared.main([*words, "--results", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "tiny.json").is_file()
    assert compared.main([*words, "--results", str(kept)]) == 2
    assert "another folder than results/" in capsys.readouterr().err
    monkeypatch.setattr(report, "main", lambda given: 0)
    (config / "tune" / "tiny.yaml").rename(config / "tune" / "other.yaml")
    shutil.copy(runs / "results" / "tiny.tuned.yaml", config / "tuned" / "tiny.yaml")
    (kept / "tiny.json").unlink()
    assert compared.main(["tiny", "--search", "--out", str(runs)]) == 0
    assert "no configs/tune/tiny.yaml says how to search" in capsys.readouterr().out
    assert (kept / "tiny.json").is_file(), "without --set it is the result"


def test_what_a_search_left_open_stands_beside_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budgets that were not tuned, settings at an edge, and no budgets at all."""
    entries = [
        Chosen("a", 1.0, ["x=1"], 0.5, ["optimizer.learning_rate"]),
        Chosen("a", 8.0, ["x=2"], 0.5, ["optimizer.learning_rate", "privacy.clip_norm"]),
        Chosen("b", None, ["x=3"], 0.5, ["privacy.clip_norm"]),
    ]
    tuned = Tuned("t", "", "", 3, 100, [0], entries)
    asked = [("a", 0.5), ("a", 1.0), ("a", 6.0), ("b", None)]
    assert tuned.borrowed(asked) == (
        "Budgets that were not tuned have the settings of the nearest: 0.5 has those of 1, 6 has those of 8."
    )
    assert tuned.edges(asked) == (
        "At the edge of what was searched, beyond which better may lie: optimizer.learning_rate (a at "
        "epsilon 1, 8), privacy.clip_norm (a at epsilon 8; b)."
    )
    assert tuned.borrowed([("a", 1.0)]) == tuned.edges([]) == ""
    trials = [{"variant": e.variant, "epsilon": e.epsilon, "settings": e.settings} for e in entries]
    search = {"trials": trials, "seconds": 60, "holdout_examples": 2000, "command": "fedsim tune t"}
    held = {"cells": [{"variant": v, "epsilon": e} for v, e in asked]}
    (tmp_path / "tuned.yaml").write_text(tuned.write())
    known = compare.Comparison(tuned=str(tmp_path / "tuned.yaml"))
    monkeypatch.setattr(compare, "load", lambda name: known)
    said = report._search("n", {**held, "search": {**search, "epsilons": [1, 8]}})
    assert "for every variant at epsilon 1, 8, by 2,000 held-out" in said
    assert "Other budgets take the nearest. Epsilon does not count the search. At the edge of what" in said
    said = report._search("n", {**held, "search": {**search, "epsilons": []}})
    assert "for every variant, by 2,000 held-out" in said
    assert "budgets" not in said
    others = {**search, "epsilons": [], "trials": trials[:1]}
    assert "At the edge" not in report._search("n", {**held, "search": others}), "of another search"


def tuned_by(tiny: Path, entries: list[Chosen], **wrong: str) -> compare.Comparison:
    """The comparison with these settings, as a search of its recipe would have chosen them."""
    recipe = compare.load(tiny).recipe
    names = {"recipe": recipe_name(recipe), "recipe_digest": recipe_digest(recipe), **wrong}
    held = Tuned("t", trials=3, held_out_examples=100, seeds=[0], chosen=entries, **names)
    (tiny.parent / "tuned.yaml").write_text(held.write())
    if "tuned:" not in tiny.read_text():
        tiny.write_text(f"{tiny.read_text()}tuned: tuned.yaml\n")
    return compare.load(tiny)


def test_a_variant_with_a_budget_of_its_own_has_the_settings_of_the_nearest(tiny: Path) -> None:
    rates = [Chosen("own", epsilon, [f"optimizer.learning_rate={epsilon}"]) for epsilon in (0.2, 8.0)]
    known = yaml.safe_load(tiny.read_text())
    known["variants"] = {"own": ["privacy.target_epsilon=6"]}
    tiny.write_text(yaml.safe_dump(known))
    wanted = tuned_by(tiny, rates)
    planned = compare.cells(wanted, [])
    assert {cell.config.optimizer.learning_rate for cell in planned} == {8.0}
    assert {cell.epsilon for cell in planned} == {None}
    assert "6 has those of 8" in compare._chosen(wanted, planned)
    known["variants"] = {"own": ["preset=nonprivate", "privacy.target_epsilon=null"]}
    tiny.write_text(yaml.safe_dump(known))
    with pytest.raises(InputError, match=r"tuned at the budgets 0\.2, 8, and has none here"):
        compare.cells(tuned_by(tiny, rates), [])
    one = tuned_by(tiny, rates[:1])
    assert {cell.config.optimizer.learning_rate for cell in compare.cells(one, [])} == {0.2}


def test_settings_that_were_chosen_for_another_recipe_are_refused(tiny: Path) -> None:
    known = yaml.safe_load(tiny.read_text())
    entries = [Chosen(name, None, []) for name in known["variants"]]
    wanted = tuned_by(tiny, entries, recipe_digest="of another time")
    assert "was changed since its settings were chosen" in compare._chosen(wanted, compare.cells(wanted, []))
    assert "was changed" not in compare._chosen(tuned_by(tiny, entries), [])
    for other in ("quickstart/not", ""):
        with pytest.raises(InputError, match=r"settings chosen for .*, the recipe they are used with, got"):
            compare.cells(tuned_by(tiny, entries, recipe=other), [])


def test_what_a_recipe_is_called_and_what_it_sets(tmp_path: Path) -> None:
    """By its place among configurations; by its settings, in any order, but for free ones."""
    assert recipe_name(str(loading.find("smoke/dp_ls"))) == "smoke/dp_ls"
    own = tmp_path / "mine.yaml"
    found = []
    for text in (
        "train: {steps: 7, expected_batch_size: 50}",
        "title: x\ntrain: {expected_batch_size: 50, steps: 7}\nfederation: {nodes: 1}",
        "train: {steps: 8, expected_batch_size: 50}",
    ):
        own.write_text(text)
        found.append(recipe_digest(str(own)))
    assert recipe_name(str(own)) == "mine"
    assert found[0] == found[1] != found[2]


def test_the_page_of_a_tuned_comparison_says_what_its_search_left_open(tiny: Path) -> None:
    entries = [
        Chosen("central", 20.0, ["train.ema_decay=0.5"], 0.5, ["train.ema_decay"]),
        Chosen("nonprivate", None, []),
    ]
    wanted = tuned_by(tiny, entries)
    planned = compare.cells(wanted, [])
    said = compare._chosen(wanted, planned)
    assert "2 has those of 20" in said
    assert "train.ema_decay (central at epsilon 20)" in said
    assert compare._chosen(compare.Comparison(), planned) == ""
    out = tiny.parent / "out"
    assert command(["compare", str(tiny), "--out", str(out), "train.steps=2"]) == 0
    for name in ("report.html", "table.md"):
        assert said in (out / name).read_text(), name


def test_unequal_numbers_of_trials_are_told_with_whose_they_were() -> None:
    def cell(variant: str, epsilon: float | None, how: str) -> Cell:
        result = {"tuning": how, "code_hash": "h", "commit": "c", "epsilon": {}}
        return Cell(variant, epsilon, 0, result, [], [], False)

    alike = [cell("a", 1, "12 trials"), cell("b", 1, "12 trials")]
    assert note(alike).endswith(" Tuned: 12 trials.")
    unequal = [*alike, cell("old, one", 1, "200 trials"), cell("old, one", 8, "200 trials")]
    assert note(unequal).endswith(" Tuned, a; b: 12 trials. Tuned, old, one: 200 trials.")
    partly = [*alike, cell("b", 8, "14 trials"), cell("c", None, "")]
    assert note(partly).endswith(
        " Tuned, a; b at epsilon 1: 12 trials. Tuned, b at epsilon 8: 14 trials. Of c no search is known."
    )
    assert "uned" not in note([cell("a", 1, "")])


def test_a_result_of_another_shape_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every part of every page: it names the file and what it lacks."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name in [path.name for path in (CONFIG_DIR.parent / "results").glob("*.json")]:
        (tmp_path / name).write_text('{"kind": "odd", "search": null}')
    for parts in report.PARTS.values():
        for make in parts.values():
            with contextlib.suppress(InputError):
                make()  # and not with a KeyError
    assert report.main(["--check"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"/\w+\.json: a result of this kind must hold '\w+' beside kind, search", said)
    for content in ("[]", "{"):
        (tmp_path / "trust_models.json").write_text(content)
        assert report.main(["--check"]) == 2
        assert "trust_models.json: " in capsys.readouterr().err
    (tmp_path / "trust_models.json").write_text('{"cells": 5}')
    assert report.main(["--check"]) == 2
    assert "trust_models.json" in capsys.readouterr().err


def test_every_generated_table_has_its_place_and_its_comparison() -> None:
    root = CONFIG_DIR.parent
    for name, parts in report.PARTS.items():
        text = (root / name).read_text()
        for part in parts:
            assert text.count(f"<!-- {part} -->") == text.count(f"<!-- end {part} -->") == 1
    placed = {p.replace("-", "_") for p in report.PARTS["docs/comparisons.md"]} | {
        "trust_models",
        "heads_trust",
    }
    assert placed - {"minutes"} == {path.stem for path in SHIPPED} == set(compared.names())


def test_shipped_comparisons_cover_what_they_say() -> None:
    holders = {c.config.federation.holders for c in compare.cells(compare.load("compare/holders"), [])}
    assert holders == {10, 100, 1000, 10000}
    dropouts = compare.cells(compare.load("compare/dropout_rates"), [])
    rates = {c.config.strategy.options.get("dropout_rate", 0.0) for c in dropouts}
    assert rates == {0.0, 0.1, 0.15}
    assert {c.config.method() for c in dropouts} == {"central_dpsgd", "shares_dpsgd"}
    releases = {
        c.config.train.steps * c.config.strategy.options.get("local_steps", 1)
        for c in compare.cells(compare.load("compare/local_steps"), [])
    }
    assert releases == {60}, "the same noise in all of them"
    trust = {c.config.method() for c in compare.cells(compare.load("compare/trust_models"), [])}
    assert trust >= {"central_dpsgd", "shares_dpsgd", "local_dpsgd", "nonprivate"}
