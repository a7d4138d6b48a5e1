"""The worked examples of docs/extend.md: each plugs in from one file, and does what it says.

Keys are fixed, every bound of a statistic fails for right code with probability below 1e-6.
"""

from __future__ import annotations

import ast
import copy
import csv
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import fedsim
from fedsim import axes, models, provenance, references, seeds
from fedsim.api import _configured
from fedsim.clipping.flat import FlatClip
from fedsim.config import Config, ModelConfig
from fedsim.data import augment
from fedsim.engine.experiment import Experiment, prepare
from fedsim.grads.flat import FlatSpec
from fedsim.learners import Means
from fedsim.noise.stream import Stream
from fedsim.optimizers.base import Update
from fedsim.privacy import accountant, events
from fedsim.run import Run
from fedsim.samplers import Draw
from fedsim.strategies.base import Collected
from fedsim.tasks.multi_label import MultiLabel
from fedsim.validate import InputError, PrivateInputError
from tests.conftest import command, final

ROOT = Path(__file__).resolve().parents[2]
EXTEND = ROOT / "examples" / "extend"
PAGE = ROOT / "docs" / "extend.md"
NAMES = sorted(path.stem for path in EXTEND.glob("*.py") if path.stem != "make_data")
DELTA = 1e-3
CENTRALIZED = {"federation": {"holders": 1, "nodes": 1, "partition": "iid"}}
SMALL: dict[str, Any] = {
    "data": {"name": "fashion_mnist_subset", "train_examples": 300, "test_examples": 100},
    "model": {"name": "linear", "dtype": "float64"},
    "federation": {"holders": 6, "nodes": 2, "partition": "dirichlet"},
    "privacy": {"noise_multiplier": 1.0, "clip_norm": 0.5, "delta": DELTA},
    "train": {"steps": 6, "expected_batch_size": 60, "eval_every": 3, "checkpoint_every": 2},
    "monitor": {"tensorboard": False, "progress": False},
}
FULL = {"train": {"steps": 2, "expected_batch_size": 300, "eval_every": 2, "checkpoint_every": 1}}
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "thinned_passes": (
        "thinned_passes:ThinnedPasses",
        {"sampler": {"name": "thinned_passes:ThinnedPasses", "options": {"turns": 2}}},
    ),
    "mixer": (
        "mixer:Mixer",
        {"model": {"name": "mixer:Mixer", "dtype": "float64", "options": {"patch": 14, "width": 8}}},
    ),
    "svmlight": (
        "svmlight:SvmLight",
        {
            "data": {
                "name": "svmlight:SvmLight",
                "root": "rows",
                "options": {"features": 6, "classes": ["-1", "+1"], "owners": True},
            },
            "federation": {"holders": 5, "nodes": 2, "partition": "natural"},
        },
    ),
    "lion": ("lion:Lion", {"optimizer": {"name": "lion:Lion", "learning_rate": 0.01, "weight_decay": 0.1}}),
    "erasing": (
        "erasing:RandomErasing",
        {"train": {"augmentations": ["flip", "erasing:RandomErasing"], "augment_multiplicity": 4}},
    ),
    "macro_recall": (
        "macro_recall:MacroRecall",
        {
            "task": {
                "name": "classification",
                "options": {"metrics": ["macro_recall:MacroRecall"], "headline": "macro_recall"},
            }
        },
    ),
    "zcdp": ("zcdp:Zcdp", {**FULL, "privacy": {"accountant": "zcdp:Zcdp"}}),
    "asymmetric": (
        "asymmetric:Asymmetric",
        {
            "task": {"name": "asymmetric:Asymmetric", "options": {"absent": 2}},
            "data": {"name": "arrays", "root": "labels", "options": {"labels": 3}},
        },
    ),
    "class_means": ("class_means:ClassMeans", {**FULL, "query": "class_means:ClassMeans"}),
}


def joined(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by section, later ones on top; data and task replace what was there."""
    out: dict[str, Any] = {}
    for one in settings:
        for section, value in one.items():
            whole = section in ("data", "task", "model") or not isinstance(value, Mapping)
            out[section] = value if whole else {**out.get(section, {}), **value}
    return out


def settings_of(name: str, *more: Mapping[str, Any]) -> dict[str, Any]:
    return joined(SMALL, PARTS[name][1] if name in PARTS else {}, *more)


def config_of(name: str, *more: Mapping[str, Any]) -> Config:
    chosen = settings_of(name, *more)
    known = {section: chosen.pop(section, None) for section in ("model", "data", "task")}
    return _configured("base", known["model"], known["data"], known["task"], None, chosen)


def experiment(name: str, *more: Mapping[str, Any]) -> Experiment:
    return prepare(config_of(name, *more))


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with small data, and the examples' folder on the path, as when started there."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("work")
        patch.chdir(folder)
        patch.setattr(sys, "path", [str(EXTEND), *sys.path])
        patch.setenv("PYTHONPATH", os.pathsep.join([str(EXTEND), str(ROOT)]))
        example("make_data").main()
        yield folder
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def done(work: Path) -> Callable[[str], Run]:
    """The run of an example, made once."""
    runs: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in runs:
            runs[name] = fedsim.train("base", out=f"runs/{name}", **settings_of(name))
        return runs[name]

    return run


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def difference(one: Run, other: Run) -> float:
    """Between any two parameters, over the largest one."""
    first, second = final(one.folder).double(), final(other.folder).double()
    return float((first - second).abs().max() / second.abs().max())


def test_every_example_is_tried() -> None:
    assert set(NAMES) == {*PARTS, "predict_csv"}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_one_short_file_that_says_what_it_relies_on(name: str) -> None:
    text = (EXTEND / f"{name}.py").read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) or ""
    assert "Guarantee: " in said
    assert "Source: " in said or name == "predict_csv"
    assert len(text.splitlines()) <= 130
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert not imported & (set(NAMES) - {name}), "one file"


@pytest.mark.parametrize("name", PARTS)
def test_check_names_it_and_its_file_is_in_the_code_hash(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = PARTS[name][0]
    chosen = config_of(name)
    assert chosen.references() == (reference,)
    plan = fedsim.check("base", **settings_of(name))
    assert plan["own_code"] == {reference: provenance.reference_hash(reference)}
    assert references.sources(reference) == {f"{name}.py": EXTEND / f"{name}.py"}
    before = provenance.reference_hash(*chosen.references())
    assert provenance.code_hash(reference) != provenance.code_hash()
    shutil.copy(EXTEND / f"{name}.py", tmp_path)
    held = sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name)
    try:
        assert provenance.reference_hash(reference) == before
        with open(tmp_path / f"{name}.py", "a", encoding="utf-8") as handle:
            handle.write("# changed\n")
        assert provenance.reference_hash(reference) not in ("", before)
    finally:
        sys.modules[name] = held


@pytest.mark.parametrize("name", PARTS)
def test_federated_equals_centralized(name: str, done: Callable[[str], Run]) -> None:
    """In float64; whatever the holders, nodes and physical batches."""
    federated = done(name)
    assert federated.result["holders"] > 1
    other = settings_of(name, CENTRALIZED, {"engine": {"physical_batch_size": 7}})
    central = fedsim.train("base", out=f"runs/{name}_central", **other)
    assert difference(federated, central) <= (1e-9 if name != "svmlight" else 1e-5)
    assert federated.score == pytest.approx(central.score, abs=1e-6)


@pytest.mark.parametrize("name", PARTS)
def test_interrupted_and_resumed_it_is_the_same_bit_for_bit(name: str, done: Callable[[str], Run]) -> None:
    class Stop(Exception):
        pass

    whole = done(name)
    at = whole.result["steps"] - 1

    def stop(step: int, numbers: object) -> None:
        if step == at:
            raise Stop

    with pytest.raises(Stop):
        fedsim.train("base", out=f"runs/{name}_stopped", callbacks=[stop], **settings_of(name))
    resumed = fedsim.train("base", out=f"runs/{name}_stopped", resume=True, **settings_of(name))
    assert torch.equal(final(resumed.folder), final(whole.folder))


# 1. The sampler.


def test_the_event_of_a_pass_is_one_poisson_draw_at_the_rate_of_a_turn(done: Callable[[str], Run]) -> None:
    """By hand: 300 examples, 60 a step, 2 turns: rate 2 * 60 / 300 once a pass, of which 6 steps have 3."""
    mechanism = experiment("thinned_passes").mechanism
    of_a_pass = events.gaussian_step(1.0, 0.4)
    for step in range(6):
        wanted = of_a_pass if step % 2 == 0 else events.sequence([])
        assert mechanism.event_at(step) == wanted
    by_hand = accountant.epsilon(events.composed(of_a_pass, 3), DELTA)
    assert done("thinned_passes").epsilon == by_hand.value
    assert mechanism.total_event(5) == events.composed(of_a_pass, 3), "a pass that is cut short counts whole"
    poisson = events.composed(events.gaussian_step(1.0, 0.2), 6)
    assert by_hand.value != pytest.approx(accountant.epsilon(poisson, DELTA).value, rel=0.01)


def test_units_are_drawn_as_the_event_of_a_pass_says() -> None:
    turns, share, units, passes = 4, 0.1, 20_000, 12
    sampler = example("thinned_passes").ThinnedPasses(turns)
    said = sampler.participation(share, share * units, units)
    assert (said.period, said.rate, said.share) == (4, 0.4, 0.1)
    ids = np.arange(units)
    taken = np.stack(
        [
            sampler.selected(Draw(step, share, units, sampler.keys(7, step)), ids)
            for step in range(turns * passes)
        ]
    ).reshape(passes, turns, units)
    assert taken.sum(1).max() == 1, "once a pass"
    for one in taken.sum(1).sum(1):
        assert stats.binomtest(int(one), units, 0.4).pvalue > 1e-8
    for first, second in ((0, 1), (0, 7), (5, 6)):
        both = taken[first].any(0) & taken[second].any(0)
        assert stats.binomtest(int(both.sum()), units, 0.16).pvalue > 1e-8, "passes are independent"
        places = np.histogram2d(taken[first].argmax(0)[both], taken[second].argmax(0)[both], bins=turns)[0]
        assert stats.chisquare(places.ravel()).pvalue > 1e-8, "and so are the turns"


def test_turns_that_no_rate_goes_with_are_refused() -> None:
    with pytest.raises(InputError, match=r"turns must be 1 \.\. 5, got 6"):
        experiment(
            "thinned_passes", {"sampler": {"name": "thinned_passes:ThinnedPasses", "options": {"turns": 6}}}
        )


# 2. The model.


def gradients(model: nn.Module, loss: Any, inputs: Tensor, targets: Tensor, bound: float) -> Tensor:
    """The clipped gradient sum, one example at a time by plain autograd."""
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=inputs.dtype)
    for one, target in zip(inputs, targets, strict=True):
        model.zero_grad()
        loss(model(one[None]), target[None]).sum().backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        total += flat * min(1.0, bound / (float(flat.norm()) + 1e-6))
    return total


def test_the_models_clipped_sum_is_that_of_one_example_at_a_time() -> None:
    config = ModelConfig("mixer:Mixer", {"patch": 4, "width": 8, "depth": 2}, "float64")
    model = models.build(config, (3, 8, 12), 5, 1)
    draws = torch.Generator().manual_seed(1)
    inputs = torch.randn(9, 3, 8, 12, generator=draws, dtype=torch.float64)
    targets = torch.arange(9) % 5
    found = fedsim.clipped_gradient_sum(model, inputs[:, None], targets, FlatClip(0.3), engine="bookkeeping")
    loss = nn.CrossEntropyLoss(reduction="none")
    by_hand = gradients(copy.deepcopy(model), loss, inputs, targets, 0.3)
    torch.testing.assert_close(found.sum, by_hand, rtol=1e-9, atol=1e-12)


def test_the_model_starts_where_the_seed_says_and_refuses_a_patch_that_does_not_fit() -> None:
    config = ModelConfig("mixer:Mixer", {"patch": 7})
    first, again, other = (models.build(config, (1, 28, 28), 10, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    with pytest.raises(InputError, match="patch must divide"):
        models.build(ModelConfig("mixer:Mixer", {"patch": 5}), (1, 28, 28), 10, 1)


# 3. The source.


def test_rows_are_read_as_written_and_owners_hold_them() -> None:
    found = experiment("svmlight")
    lines = Path("rows/train.svm").read_text(encoding="utf-8").splitlines()[2:]
    wanted = np.zeros((300, 6), np.float32)
    for row, line in enumerate(lines):
        for cell in line.partition("#")[0].split()[2:]:
            place, value = cell.split(":")
            wanted[row, int(place) - 1] = float(value)
    np.testing.assert_array_equal(found.splits.train.inputs, wanted)
    assert found.splits.train.targets.tolist() == [int(line.startswith("+1")) for line in lines]
    owners = ["abcde".index(line.split()[1][4:]) for line in lines]
    assert found.partition.holder_of.tolist() == owners


def test_the_command_predicts_rows_of_the_format(
    done: Callable[[str], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = done("svmlight")
    assert command(["predict", str(run.folder), "rows/test.svm", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    inputs = experiment("svmlight").splits.test.inputs
    assert said["predictions"] == run.predict(inputs).best.tolist()
    assert run.score == np.mean(run.predict(inputs).best == experiment("svmlight").splits.test.targets)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("+1 7:1", r"indices must be 1 \.\. 6"),
        ("+1 0:1", r"indices must be 1 \.\. 6"),
        ("+1 x:1", r"indices must be 1 \.\. 6"),
        ("+1 1:much", "values must hold numbers"),
        ("+1 1:nan", "values must be finite"),
        ("+1 1:1e99", "values must be finite"),
        ("3 1:1", "labels must be one of the declared classes -1, \\+1"),
    ],
)
def test_rows_that_are_not_as_declared_are_refused_and_told_only_where_they_may_be(
    line: str, expected: str, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.svm").write_text(f"-1 1:2\n{line}\n", encoding="utf-8")
    source = example("svmlight").SvmLight(6, ["-1", "+1"])
    with pytest.raises(PrivateInputError, match=expected) as caught:
        source.load(tmp_path)
    assert re.search(expected, caught.value.public)
    assert "got" not in caught.value.public


def test_features_and_classes_are_declared() -> None:
    with pytest.raises(InputError, match="must declare features"):
        example("svmlight").SvmLight()


# 4. The optimizer.


def test_lion_is_the_published_rule() -> None:
    rng = np.random.default_rng(5)
    start, gradients = rng.normal(size=20), rng.normal(size=(6, 20))
    rule = example("lion").Lion(0.8, 0.95)
    params, slots = torch.from_numpy(start), {"momentum": torch.zeros(20, dtype=torch.float64)}
    by_hand, moment = start.copy(), np.zeros(20)
    for number, gradient in enumerate(gradients, start=1):
        step = Update(0.1 / number, number, 0.2, FlatSpec(("x",), ((20,),), (20,)))
        params = rule.updated(params, torch.from_numpy(gradient), slots, step)
        mixed = 0.8 * moment + 0.2 * gradient
        by_hand = by_hand - 0.1 / number * (np.sign(mixed) + 0.2 * by_hand)
        moment = 0.95 * moment + 0.05 * gradient
        np.testing.assert_allclose(params.numpy(), by_hand, rtol=1e-12)
    with pytest.raises(InputError, match=r"optimizer\.options\.beta2"):
        example("lion").Lion(0.9, 1.5)


# 5. The augmentation.


def erased(
    count: int, views: int, key: bytes, ids: np.ndarray[Any, Any] | None = None, **options: Any
) -> Any:
    images = np.zeros((count, 20, 30, 1), np.uint8)
    chosen = np.arange(count) if ids is None else ids
    named = [{"name": "erasing:RandomErasing", "options": {"grey": 255, **options}}]
    return augment.views(images, chosen, views, key, named)[..., 0] > 0


def test_a_view_follows_from_its_example_its_step_and_its_number_alone() -> None:
    key, ids = seeds.derive(1, "augment", 3), np.array([900, 3, 17, 44])
    all_of_them = erased(4, 6, key, ids)
    for row, one in enumerate(ids):
        np.testing.assert_array_equal(erased(1, 6, key, np.array([one]))[0], all_of_them[row])
    np.testing.assert_array_equal(erased(4, 2, key, ids), all_of_them[:, :2])
    assert not np.array_equal(erased(4, 6, seeds.derive(1, "augment", 4), ids), all_of_them)


def test_what_is_erased_is_a_rectangle_of_the_stated_size_by_the_stated_chance() -> None:
    count, views = 5_000, 3
    found = erased(
        count, views, seeds.derive(2, "augment", 0), chance=0.4, smallest=0.1, largest=0.3, aspect=0.5
    )
    area = found.sum((2, 3))
    some = area > 0
    assert stats.binomtest(int(some.sum()), some.size, 0.4).pvalue > 1e-8
    height, width = found.any(3).sum(2), found.any(2).sum(2)
    np.testing.assert_array_equal(area, height * width)
    assert 0.08 <= area[some].min() / 600 <= 0.12
    assert 0.27 <= area[some].max() / 600 <= 0.32
    assert area[some].mean() / 600 == pytest.approx(0.2, abs=0.005)
    form = np.log(height[some] / width[some])
    assert np.abs(form).max() <= math.log(2.0) + 0.15
    assert form.mean() == pytest.approx(0.0, abs=0.03)
    for one, other in ((some[:, 0], some[:, 1]), (some[:, 1], some[:, 2]), (some[:-1, 0], some[1:, 0])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5.5 / count**0.5, "views and examples are independent"
    top, left = found.any(3).argmax(2)[some], found.any(2).argmax(2)[some]
    assert abs(np.corrcoef(top, left)[0, 1]) < 5.5 / some.sum() ** 0.5


def test_pixels_beside_the_rectangle_stay() -> None:
    images = np.random.default_rng(1).integers(0, 255, (50, 12, 12, 3)).astype(np.uint8)
    named = [{"name": "erasing:RandomErasing", "options": {"chance": 1.0, "grey": 255}}]
    found = augment.views(images, np.arange(50), 2, seeds.derive(1, "augment", 0), named)
    grey = (found == 255).all(-1)
    assert grey.any((2, 3)).all()
    np.testing.assert_array_equal(found[~grey], np.broadcast_to(images[:, None], found.shape)[~grey])


# 6. The metric.


def test_macro_recall_is_that_of_the_predictions(done: Callable[[str], Run]) -> None:
    run, test = done("macro_recall"), experiment("macro_recall").splits.test
    right = run.predict(test.inputs).best == test.targets
    by_hand = np.mean([right[test.targets == label].mean() for label in np.unique(test.targets)])
    assert run.result["macro_recall"] == pytest.approx(by_hand, abs=1e-12)
    assert run.score == run.result["macro_recall"]
    assert run.score != pytest.approx(run.result["accuracy"], abs=1e-6)
    assert run.headline == fedsim.tasks.Metric("macro_recall", "%")
    assert [line["macro_recall"] for line in run.metrics if "macro_recall" in line][-1] == run.score


def test_a_class_without_examples_does_not_count() -> None:
    meter = example("macro_recall").MacroRecall()
    meter.add(torch.eye(4)[[0, 0, 1]], torch.tensor([0, 1, 1]))
    meter.add(torch.eye(4)[[2]], torch.tensor([0]))
    assert meter.result() == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_a_metric_is_public_on_test_data_and_sensitive_on_held_out_examples(
    done: Callable[[str], Run],
) -> None:
    assert "macro_recall" not in done("macro_recall").result["sensitive"]
    held = joined(SMALL, {"data": {**SMALL["data"], "holdout_examples": 100}}, PARTS["macro_recall"][1])
    held = joined(held, {"train": {"steps": 1, "eval_every": 1}})
    run = fedsim.train("base", out="runs/held", **held)
    assert "macro_recall" in run.result["sensitive"]
    public = fedsim.train("base", out="runs/public", **joined(held, {"monitor": {"public_only": True}}))
    assert "macro_recall" not in public.result
    assert not [path for path in public.folder.rglob("metrics*") if b"macro_recall" in path.read_bytes()]


# 7. The prediction job.


def test_a_prediction_job_needs_the_folder_of_the_run_alone(
    done: Callable[[str], Run], tmp_path: Path
) -> None:
    run = done("erasing")
    images = experiment("erasing").splits.test.inputs
    folder = shutil.copytree(run.folder, tmp_path / "moved")
    (folder / "config.yaml").unlink()
    np.save(tmp_path / "images.npy", images)
    nothing = {**os.environ, "FEDSIM_DATA": str(tmp_path / "nowhere"), "PYTHONPATH": str(ROOT)}
    job = [sys.executable, str(EXTEND / "predict_csv.py"), "moved", "images.npy", "said.csv"]
    subprocess.run(job, cwd=tmp_path, env=nothing, check=True)
    with open(tmp_path / "said.csv", encoding="utf-8", newline="") as handle:
        table = list(csv.DictReader(handle))
    said = run.predict(images)
    assert [int(line["input"]) for line in table] == list(range(len(images)))
    assert [line["class"] for line in table] == [
        said.names[best] if said.names else str(best) for best in said.best
    ]
    shown = [float(line["probability"]) for line in table]
    np.testing.assert_allclose(shown, said.outputs.max(1), atol=6e-5)
    assert np.mean(said.best == experiment("erasing").splits.test.targets) == pytest.approx(run.score)
    with open(folder / "final.safetensors", "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\x55")
    with pytest.raises(InputError):
        example("predict_csv").main(folder, tmp_path / "images.npy", tmp_path / "again.csv")


# 8. The accountant.


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("delta", [1e-8, 1e-3])
def test_zcdp_is_its_formula_and_bounds_the_exact_epsilon(sigma: float, times: int, delta: float) -> None:
    event = events.composed(events.gaussian_step(sigma, 1.0), times)
    rho = times / (2 * sigma**2)
    for examples in (1, 3):
        found = accountant.holder_epsilon_of_event(event, delta, examples, "zcdp:Zcdp")
        group = examples**2 * rho
        assert found.value == pytest.approx(group + 2 * math.sqrt(group * math.log(1 / delta)), rel=1e-12)
        exact = accountant.holder_epsilon_of_event(event, delta, examples, "pld")
        assert exact.value is not None
        assert found.value >= exact.value
    assert accountant.epsilon(event, delta, "zcdp:Zcdp").accountant == "zcdp:Zcdp"


def test_releases_of_different_noise_add_up() -> None:
    event = events.sequence([events.gaussian_step(2.0, 1.0)] * 3 + [events.gaussian_step(1.0, 1.0)])
    rho = 3 / 8 + 1 / 2
    found = accountant.epsilon(event, DELTA, "zcdp:Zcdp").value
    assert found == pytest.approx(rho + 2 * math.sqrt(rho * math.log(1000)), rel=1e-12)


def test_zcdp_refuses_sampling_and_integer_noise_and_the_answer_says_so() -> None:
    zcdp = example("zcdp").Zcdp()
    refused = {
        events.gaussian_step(1.0, 0.1): ("rdp", "zCDP is not amplified by sampling"),
        events.fixed_size_step(1.0, 100, 10): ("rdp", "zCDP is not amplified by sampling"),
        events.renyi_gaussian_step(1.0, 1.0): ("rdp_integer", "whole Renyi orders"),
        events.renyi_gaussian_step(1.0, 0.1): ("rdp_integer", "zCDP is not amplified by sampling"),
    }
    for event, (answers, reason) in refused.items():
        assert reason in zcdp.supports(event)
        found = accountant.epsilon(event, DELTA, "zcdp:Zcdp")
        assert found.accountant == answers
        assert f"zcdp:Zcdp has no answer: {zcdp.supports(event)}" in found.note
        assert found.value == accountant.epsilon(event, DELTA, answers).value
    assert zcdp.supports(events.composed(events.gaussian_step(1.0, 1.0), 9)) == ""


def test_noise_is_calibrated_by_it_and_its_answer_is_that_of_the_run(done: Callable[[str], Run]) -> None:
    run = done("zcdp")
    rho = 2 / 2
    assert run.epsilon == pytest.approx(rho + 2 * math.sqrt(rho * math.log(1000)), rel=1e-12)
    spent, check = run.result["epsilon"]["example"], run.result["epsilon"]["example_check"]
    assert (spent["accountant"], check["accountant"]) == ("zcdp:Zcdp", "pld")
    assert check["value"] < spent["value"]
    target = {"privacy": {"noise_multiplier": None, "target_epsilon": 3.0}}
    mechanism = experiment("zcdp", target).mechanism
    rho = (math.sqrt(3.0 + math.log(1000)) - math.sqrt(math.log(1000))) ** 2
    assert mechanism.noise_multiplier == pytest.approx(math.sqrt(2 / (2 * rho)), rel=1e-4)


# 9. The task.


def test_the_asymmetric_loss_is_the_published_one_an_example() -> None:
    draws = torch.Generator().manual_seed(2)
    outputs = 3 * torch.randn(30, 4, generator=draws, dtype=torch.float64)
    targets = torch.randint(0, 2, (30, 4), generator=draws)
    module = example("asymmetric")
    plain = module.Asymmetric(present=0, absent=0, margin=0.0).loss(outputs, targets)
    torch.testing.assert_close(plain, MultiLabel().loss(outputs, targets))
    found = module.Asymmetric(present=1, absent=4, margin=0.1).loss(outputs, targets)
    for row in range(30):
        by_hand = 0.0
        for output, target in zip(outputs[row].tolist(), targets[row].tolist(), strict=True):
            p = 1 / (1 + math.exp(-output))
            q = max(p - 0.1, 0.0)
            by_hand -= (1 - p) * math.log(p) if target else q**4 * math.log(1 - q)
        assert float(found[row]) == pytest.approx(by_hand, rel=1e-9)


def test_the_clipped_sum_of_the_loss_is_that_of_one_example_at_a_time() -> None:
    task = example("asymmetric").Asymmetric(present=0, absent=2)
    model = models.build(ModelConfig("mlp", {"hidden": [6]}, "float64"), (5,), 3, 1)
    draws = torch.Generator().manual_seed(3)
    inputs = torch.randn(12, 5, generator=draws, dtype=torch.float64)
    targets = torch.randint(0, 2, (12, 3), generator=draws)
    found = fedsim.clipped_gradient_sum(
        model, inputs[:, None], targets, FlatClip(0.2), loss=task.loss, engine="bookkeeping"
    )
    by_hand = gradients(copy.deepcopy(model), task.loss, inputs, targets, 0.2)
    torch.testing.assert_close(found.sum, by_hand, rtol=1e-9, atol=1e-12)


def test_the_headline_of_the_task_is_whether_the_first_label_is_there(done: Callable[[str], Run]) -> None:
    run, test = done("asymmetric"), experiment("asymmetric").splits.test
    first = run.predict(test.inputs).outputs.argmax(1)
    assert run.headline == fedsim.tasks.Metric("first_right", "%")
    assert run.score == pytest.approx(float(test.targets[np.arange(100), first].mean()), abs=1e-9)
    assert {"auc", "label_accuracy", "exact_match"} <= set(run.result)


# 10. The query and its learner.


class Here:
    """A node that holds these examples and draws all of them."""

    outputs = 3

    def __init__(self, inputs: Tensor, classes: Tensor) -> None:
        self._held = inputs, classes

    def drawn(self, task: object) -> np.ndarray[Any, Any]:
        return np.arange(len(self._held[0]))

    def plain(self, ids: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        return self._held[0][ids], self._held[1][ids]


def sums_of(query: Any, inputs: Tensor, classes: Tensor, clip: FlatClip) -> dict[str, np.ndarray[Any, Any]]:
    arrays: dict[str, np.ndarray[Any, Any]] = query.sums(Here(inputs, classes), SimpleNamespace(), clip)[0]
    return arrays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_an_example_moves_the_noised_sums_by_what_the_event_says(dtype: torch.dtype, share: float) -> None:
    """Brute force over neighbours: each example of hostile data removed, all parts over their noise."""
    clip, sigma = FlatClip(0.7), 1.3
    query = example("class_means").ClassMeans(share)
    draws = torch.Generator().manual_seed(4)
    inputs = torch.randn(40, 2, 4, generator=draws, dtype=torch.float64)
    lengths = [0.0, 1e-30, 0.1, 0.7, 0.7000001, 1.0, 50.0, 1e18]
    inputs *= (torch.tensor(lengths * 5, dtype=torch.float64) / inputs.flatten(1).norm(dim=1))[:, None, None]
    inputs[7, 1, 2], inputs[20, 0, 0], inputs[30] = math.nan, math.inf, -math.inf
    inputs, classes = inputs.to(dtype), torch.arange(40) % 3
    shape = SimpleNamespace(parameters=27, features=8, outputs=3, dtype=np.dtype(np.float64))
    parts = query.statistic(shape, clip, {}).parts
    stds = {p.name: m * p.bound for p, m in zip(parts, query.multipliers(sigma, 40.0), strict=True)}
    whole = sums_of(query, inputs, classes, clip)
    assert set(whole) == set(stds)
    assert all(len(whole[p.name]) == p.length and np.isfinite(whole[p.name]).all() for p in parts)
    longest = 0.0
    for left_out in range(40):
        rest = torch.arange(40) != left_out
        less = sums_of(query, inputs[rest], classes[rest], clip)
        moved = {name: np.linalg.norm(whole[name] - less[name]) for name in whole}
        for part in parts:
            assert moved[part.name] <= part.bound * (1 + 1e-6)
        longest = max(longest, math.sqrt(sum((moved[name] / stds[name]) ** 2 for name in moved)))
    assert longest <= 1 / sigma * (1 + 1e-6)
    assert longest >= 1 / sigma * (1 - 1e-4), "and no noise is wasted"


@pytest.mark.parametrize("strategy", ["central", "shares", "local"])
def test_with_hardly_any_noise_the_head_is_the_nearest_class_mean(strategy: str) -> None:
    quiet = {"privacy": {"noise_multiplier": 1e-7, "clip_norm": 5.0}, "strategy": strategy}
    run = fedsim.train("base", out=f"runs/means_{strategy}", **settings_of("class_means", quiet))
    train, test = (getattr(experiment("class_means").splits, split) for split in ("train", "test"))

    def plain(data: Any) -> np.ndarray[Any, Any]:
        return ((data.inputs.astype(np.float64) / 255 - data.mean[0]) / data.std[0]).reshape(len(data), -1)

    clipped = plain(train)
    clipped *= np.minimum(1.0, 5.0 / np.linalg.norm(clipped, axis=1))[:, None]
    means = np.stack([clipped[train.targets == label].mean(0) for label in range(10)])
    nearest = ((plain(test)[:, None] - means) ** 2).sum(2).argmin(1)
    weights = run.model.state_dict()["head.weight"].numpy()
    np.testing.assert_allclose(weights, means, atol=1e-4)
    assert (run.predict(test.inputs).best == nearest).mean() >= 0.99


@pytest.mark.parametrize("strategy", ["central", "local"])
def test_a_step_of_the_query_is_one_gaussian_release(strategy: str) -> None:
    mechanism = experiment("class_means", {"strategy": strategy}).mechanism
    assert mechanism.total_event(2) == events.composed(events.gaussian_step(1.0, 1.0), 2)
    stds = mechanism.release().noise_stds
    assert stds == pytest.approx({"sums": 0.5 / math.sqrt(0.9), "counts": 1.0 / math.sqrt(0.1)})


def test_the_noise_of_both_parts_is_independent_and_as_stated() -> None:
    mechanism = experiment("class_means").mechanism
    release = mechanism.release()
    steps = [mechanism.noise(release, Collected({}, []), Stream(), 5, step) for step in range(200)]
    counts = np.stack([step["counts"] for step in steps])
    first = np.stack([step["sums"][:10] for step in steps])
    for values, name in ((counts, "counts"), (first, "sums")):
        assert values.std() == pytest.approx(release.noise_stds[name], rel=5.5 / math.sqrt(2 * values.size))
    assert abs(np.corrcoef(counts.ravel(), first.ravel())[0, 1]) < 5.5 / counts.size**0.5


def test_the_learner_goes_on_from_its_state_and_takes_a_small_count_for_its_noise() -> None:
    """By hand: counts 1 and 8 a step with noise 3; over 2 steps the first one's 2 are below 3 sqrt(2)."""
    module, none = example("class_means"), torch.zeros(6, dtype=torch.float64)
    means = Means(
        {"sums": np.array([1.0, 2.0, 16.0, 8.0]), "counts": np.array([1.0, 8.0])}, "sums", {"counts": 3.0}
    )
    whole, first, second = module.Nearest(), module.Nearest(), module.Nearest()
    whole.init(none)
    first.init(none)
    whole.update(none, means, 0)
    first.update(none, means, 0)
    second.load_state_dict(*first.state_dict())
    head = whole.update(none, means, 1)
    assert torch.equal(second.update(none, means, 1), head)
    least = 3 * math.sqrt(2)
    mean = [2 / least, 4 / least, 2.0, 1.0]
    biases = [-(mean[0] ** 2 + mean[1] ** 2) / 2, -2.5]
    np.testing.assert_allclose(head.numpy(), [*mean, *biases], rtol=1e-12)


@pytest.mark.parametrize(
    "more",
    [
        {"task": {"name": "multi_label"}},
        {"privacy": {"clipping": "per_layer"}},
        {"model": {"name": "mlp"}},
        {"optimizer": {"name": "adam"}},
        {"noise": "tree"},
        {"learner": "optimizer"},
    ],
)
def test_what_does_not_go_with_the_query_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        experiment("class_means", more)


# The page.


def blocks() -> list[tuple[str, str, str]]:
    """(what stands before the block, its language, its content) of every block of the page."""
    found = re.findall(r"(<!-- .*? -->\n)?```(\w*)\n(.*?)```\n", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [(before.strip(), language, content) for before, language, content in found]


def words(code: str) -> str:
    """Code without its line breaks and indentation, which the page has in its own way."""
    return " ".join(code.split())


def test_code_on_the_page_is_that_of_the_files() -> None:
    seen = set()
    for before, language, content in blocks():
        if language != "python" or before == "<!-- run by the tests -->":
            continue
        told = re.fullmatch(r"<!-- of examples/extend/(\w+\.(?:py|yaml)) -->", before)
        assert told, f"which file is this of? {content[:60]}"
        file = (EXTEND / told[1]).read_text(encoding="utf-8")
        for part in re.split(r"^ *\.\.\.\n", content, flags=re.MULTILINE):
            assert words(part) in words(file), f"{told[1]} has no {part[:200]!r}"
        seen.add(told[1].removesuffix(".py"))
    assert seen == set(NAMES), "every example has its core on the page"


def test_python_on_the_page_runs(work: Path) -> None:
    (content,) = (content for before, _, content in blocks() if before == "<!-- run by the tests -->")
    held: dict[str, Any] = {}
    exec(content, held)
    assert held["run"].result["steps"] == 3
    (name,) = held["run"].config.references()
    assert name.startswith("given:"), "whose digest is in its name"


def test_commands_on_the_page_can_be_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that train are checked by the dry run, which needs everything but the steps."""
    lines = [
        line
        for _, language, text in blocks()
        if language == "sh"
        for line in text.replace("\\\n", "").splitlines()
    ]
    assert len(lines) >= len(NAMES)
    named = set()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words == ["python", "make_data.py"]:  # as the fixture did
            continue
        if words[:2] == ["python", "predict_csv.py"] or words[:2] == ["fedsim", "predict"]:
            named |= {"predict_csv"} if words[0] == "python" else set()
            continue
        assert words[:2] == ["fedsim", "run"], line
        end = words.index("--out") if "--out" in words else len(words)
        chosen = [str(EXTEND / word) if word.endswith(".yaml") else word for word in words[2:end]]
        assert command(["check", *chosen, "--json"]) == 0, line
        own = json.loads(capsys.readouterr().out)["plan"]["own_code"]
        assert own, line
        named |= {name.partition(":")[0] for name in own}
    assert named == set(NAMES)


def test_the_table_of_the_page_has_every_axis() -> None:
    page = PAGE.read_text(encoding="utf-8")
    settings = {registry.setting for registry in axes.registries()} | {"model.name", "monitor.writers"}
    rows = re.findall(r"^\| `([\w.]+)` \| (.*)\|$", page, re.MULTILINE)
    assert {setting for setting, _ in rows} == settings | {"task.options.metrics"}
    for registry in axes.registries():
        (row,) = (text for setting, text in rows if setting == registry.setting)
        assert f"`{registry.base.__name__}`" in row, registry.setting
        module = registry.base.__module__.replace(".", "/")
        assert f"{module}.py" in row, registry.setting
