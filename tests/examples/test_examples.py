"""The examples: short, the same as centralized, with the epsilon and the headline they are to have."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedsim import models, seeds
from fedsim.engine.experiment import prepare
from fedsim.flower import launch
from fedsim.noise.gaussian import standard_normal
from fedsim.noise.stream import Stream
from fedsim.privacy import events, ledger
from fedsim.run import Run
from fedsim.strategies.base import Collected
from fedsim.strategies.central import Central
from tests.conftest import final
from tests.flower.processes import strays

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LINES = 15
CENTRALIZED = {"holders": 1, "nodes": 1, "partition": "iid"}
# Name, unit and direction of the headline, and what the released model reaches at least.
SCRIPTS: dict[str, tuple[str, str, bool, float]] = {
    "own_module": ("accuracy", "%", True, 0.6),
    "timm_model": ("accuracy", "%", True, 0.6),
    "text_lora": ("accuracy", "%", True, 0.9),
    "table_regression": ("within_a_day", "%", True, 0.9),
    "multi_label": ("auc", "%", True, 0.95),
    "mixed_sizes": ("accuracy", "%", True, 0.95),
    "by_column": ("accuracy", "%", True, 0.75),
    "own_everything": ("accuracy", "%", True, 0.55),
}
Start = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Import scripts as they are started from their own folder, in an empty working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        patch.setenv("PYTHONPATH", str(EXAMPLES))
        yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def done(start: Start) -> Callable[[str], Run]:
    """The run of a script as it stands, made once."""
    runs: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in runs:
            runs[name] = start(name).main()
        return runs[name]

    return run


def largest_difference(one: Run, other: Run) -> float:
    """Between any two parameters, over the largest one."""
    first, second = final(one.folder).double(), final(other.folder).double()
    return float((first - second).abs().max() / second.abs().max())


def test_every_script_is_tried() -> None:
    helpers = {"data", "own_parts"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS) | helpers


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_says_what_it_does(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    after = text.splitlines()[tree.body[0].end_lineno :]
    assert sum(bool(line.strip()) for line in after) <= LINES
    assert f"examples/{name}.py" in (EXAMPLES.parent / "docs/use.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SCRIPTS)
def test_federated_equals_centralized(name: str, start: Start, done: Callable[[str], Run]) -> None:
    federated = done(name)
    assert federated.result["holders"] > 1
    central = start(name).main(out=f"runs/{name}_central", federation=CENTRALIZED)
    assert central.result["holders"] == 1
    assert largest_difference(federated, central) <= 1e-5


@pytest.mark.parametrize("name", SCRIPTS)
def test_epsilon_by_both_accountants_and_the_headline(name: str, done: Callable[[str], Run]) -> None:
    run = done(name)
    result: dict[str, Any] = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    spent, check = result["epsilon"]["example"], result["epsilon"]["example_check"]
    assert (spent["accountant"], check["accountant"]) == ("pld", "rdp")
    assert 0 < spent["value"] <= check["value"]
    target = run.config.privacy.target_epsilon
    assert target is not None
    assert 0.99 * target <= spent["value"] <= target
    headline, unit, higher, least = SCRIPTS[name]
    assert result["headline"] == {"name": headline, "unit": unit, "higher_is_better": higher}
    assert least <= result[headline] <= 1
    assert f"epsilon={run.epsilon}" in repr(run)


def test_adapters_and_head_are_all_that_is_trained(done: Callable[[str], Run]) -> None:
    run = done("text_lora")
    model = run.model
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert all("lora_" in name or ".classifier." in name for name in trained)
    assert any("lora_" in name for name in trained)
    held = load_file(run.folder / "final.safetensors")
    fresh = models.build(run.config.model, (12,), 2, run.config.seed, 512).state_dict()
    for name, value in fresh.items():
        assert torch.equal(held[name], value) is (name not in trained), name


def test_an_own_metric_is_in_the_unit_of_the_target(start: Start, done: Callable[[str], Run]) -> None:
    run = done("table_regression")
    lines = (start("data").stays() / "test.csv").read_text(encoding="utf-8").splitlines()[1:]
    cells = [line.split(",") for line in lines]
    wards = ("eyes", "heart", "surgery")
    inputs = torch.tensor(
        [[(int(c[0]) - 18) / 77 * 2 - 1, *(float(c[1] == ward) for ward in wards)] for c in cells]
    )
    off = (
        torch.from_numpy(run.predict(inputs.numpy()).outputs[:, 0])
        - torch.tensor([float(c[3]) for c in cells])
    ).abs()
    assert run.score == pytest.approx(float((off <= 1).float().mean()), abs=1e-6)
    assert run.result["mae"] == pytest.approx(float(off.mean()), rel=1e-4)


def test_labels_keep_their_order(start: Start, done: Callable[[str], Run]) -> None:
    run = done("multi_label")
    images, shown = start("data").scenes(200, 2)
    said = run.predict(images)
    assert said.names == ("red", "green", "blue")
    for label in range(3):
        assert (said.best[:, label] == shown[:, label]).mean() > 0.9


def test_a_clinic_is_a_holder(start: Start, done: Callable[[str], Run]) -> None:
    run = done("by_column")
    lines = (start("data").stays() / "train.csv").read_text(encoding="utf-8").splitlines()[1:]
    clinics = [line.split(",")[2] for line in lines]
    sizes = [clinics.count(clinic) for clinic in sorted(set(clinics))]
    assert run.result["holders"] == len(sizes) == 5
    assert run.result["largest_holder"] == max(sizes)
    holder_of = prepare(run.config).partition.holder_of
    assert [sorted(set(clinics))[holder] for holder in holder_of] == clinics


def test_two_servers_add_the_noise_that_is_accounted(done: Callable[[str], Run]) -> None:
    """In independent halves: the whole has the stated scale, and is not what one server would have added.

    False alarms: bounds of five standard errors, below 1e-5 together.
    """
    run = done("own_everything")
    mechanism = prepare(run.config).mechanism
    release, nothing, own = mechanism.release(), Collected({}, []), sys.modules["own_parts"]
    assert type(mechanism.method.trust) is own.TwoServers
    assert mechanism.event_at(0) == events.gaussian_step(mechanism.noise_multiplier, 1.0)
    std = mechanism.noise_std_of_sum(release)
    assert std == mechanism.noise_multiplier * run.config.privacy.clip_norm
    noise = [mechanism.noise(release, nothing, Stream(), 5, step)["sum"] for step in range(2)]
    again = mechanism.noise(release, nothing, Stream(), 5, 0)["sum"]
    assert np.array_equal(noise[0], again), "a step that is repeated releases nothing new"
    trusting = dataclasses.replace(mechanism, method=dataclasses.replace(mechanism.method, trust=Central()))
    central = trusting.noise(release, nothing, Stream(), 5, 0)["sum"]
    halves = [
        standard_normal(seeds.derive(5, "noise of a server", 0, server), central.size) * std * 0.5**0.5
        for server in range(2)
    ]
    np.testing.assert_allclose(noise[0], halves[0] + halves[1], rtol=1e-12, atol=1e-12)
    error = central.size**-0.5
    for values in (*noise, central):
        assert values.std() == pytest.approx(std, rel=5 * error / 2**0.5)
    for one, other in ((noise[0], central), (noise[0], noise[1]), halves):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 * error


@pytest.mark.flower
@pytest.mark.timeout(400)
def test_own_parts_under_flowers_simulation_equal_local(
    start: Start, done: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parameters and ledger as in one process; and it leaves nothing behind."""
    monkeypatch.setattr(launch, "LOOK_SECONDS", 60.0)  # the result tells the end
    simulated = start("own_everything").main(out="runs/simulated", backend="simulation")
    local = done("own_everything")
    assert largest_difference(simulated, local) <= 1e-6
    books = [ledger.read(run.folder / "ledger.jsonl") for run in (simulated, local)]
    assert books[0].header == books[1].header
    assert [r.event for r in books[0].records] == [r.event for r in books[1].records]
    assert strays() == []
