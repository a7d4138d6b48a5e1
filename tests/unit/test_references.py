"""Objects of the user's own: found, built as they are, in the code hash, and run by nodes only if allowed."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import models, provenance, references
from fedsim.config import ModelConfig
from fedsim.engine.setup import node_for, setup_of
from fedsim.flower import launch
from fedsim.method import Method
from fedsim.run import Run
from fedsim.strategies.base import Trust
from fedsim.study import plan
from fedsim.validate import InputError, RunError
from tests.conftest import final, small, train
from tests.unit.test_run import stop_at

MODULE = """
import numpy as np
import torch
from torch import nn
from fedsim.strategies.central import Central

class Net(nn.Module):
    def __init__(self, num_classes, input_shape, width=8, scale=0.3):
        super().__init__()
        size, head = int(np.prod(input_shape)), nn.Linear(width, num_classes)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.Tanh(), head)
        nn.init.normal_(self.body[1].weight, std=scale)
        self.body[3].bias.data.fill_(float(np.random.rand()))

    def forward(self, inputs):
        return self.body(inputs)

class Own(Central):
    pass

def a_number(**options):
    return 3

def fails():
    raise ValueError("no such luck")

class Outer:
    Inner = Net
"""
SHAPE = (1, 6, 6)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_things.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "own_package" / "nets.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "needs_more.py").write_text("import a_package_that_nobody_has\n", encoding="utf-8")
    (tmp_path / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(references, "_resolved", set())
    yield tmp_path
    for name in ("own_things", "own_package", "own_package.nets", "needs_more", "broken"):
        sys.modules.pop(name, None)


def own(name: str = "own_things:Net", **options: object) -> ModelConfig:
    return ModelConfig(name, dict(options))


@pytest.mark.usefixtures("folder")
def test_a_model_keeps_what_its_constructor_draws() -> None:
    before = random.getstate(), np.random.get_state()[1].sum(), torch.get_rng_state()  # noqa: NPY002
    model, again, other = (models.build(own(scale=0.5), SHAPE, 3, seed) for seed in (1, 1, 2))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].sum() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(model.body[1].weight, other.body[1].weight)
    assert not torch.equal(model.body[3].bias, other.body[3].bias)
    assert float(model.body[1].weight.std()) == pytest.approx(0.5, rel=0.1)
    assert len(set(model.body[3].bias.tolist())) == 1


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["own_things:Outer.Inner", "own_package.nets:Net"])
def test_objects_are_found_in_classes_and_packages(name: str) -> None:
    assert models.skeleton(own(name), SHAPE, 3).body[1].weight.is_meta
    assert models.build(own(name, width=5), SHAPE, 3, 0).body[1].out_features == 5


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("own_things:Nett", {}, "own_things has no 'Nett'. Did you mean 'Net'?"),
        ("own_thing:Net", {}, "there is no module 'own_thing'"),
        ("own_things:", {}, "must be package.module:Object"),
        ("own things:Net", {}, "must be package.module:Object"),
        ("needs_more:Net", {}, "Install what it needs"),
        ("broken:Net", {}, "importing broken fails by ZeroDivisionError"),
        ("own_things:Net", {"widht": 3}, "model.options must fit Net"),
        ("own_things:a_number", {}, "must name something that makes a torch.nn.Module"),
        ("own_things:fails", {}, "fails fails by ValueError: no such luck"),
        ("smal_cnn", {}, "small_cnn.*Or name an object of your own"),
    ],
)
def test_what_is_wrong_is_said(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        models.build(own(name, **options), SHAPE, 3, 0)


@pytest.mark.usefixtures("folder")
def test_layers_that_mix_examples_are_refused_as_in_any_model(folder: Path) -> None:
    text = MODULE + "\ndef mixing():\n    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36))\n"
    (folder / "own_things.py").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="BatchNorm1d at '1'"):
        models.build(own("own_things:mixing"), SHAPE, 3, 0)


def test_the_source_is_part_of_the_code_hash(folder: Path) -> None:
    names = "own_things:Net", "own_package.nets:Net"
    before = [provenance.code_hash(name) for name in names]
    assert provenance.code_hash() not in before
    assert set(references.sources(names[1])) == {"own_package/__init__.py", "own_package/nets.py"}
    for file in (folder / "own_things.py", folder / "own_package" / "__init__.py"):
        file.write_text(file.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    provenance.code_hash.cache_clear()
    after = [provenance.code_hash(name) for name in names]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert references.installed("torch.nn:Linear")
    assert list(references.sources("torch.nn.modules.linear:Linear")) == ["torch/nn/modules/linear.py"]
    assert [p.name for p in references.sources("torch:compile").values()] == ["__init__.py"]
    (folder / "own_package" / "__init__.py").unlink()
    sys.modules.pop("own_package"), sys.modules.pop("own_package.nets")
    assert list(references.sources(names[1])) == ["own_package/nets.py"]
    assert not references.installed(names[1])
    assert not references.installed(names[0])


def test_a_run_with_a_model_and_a_strategy_of_ones_own(folder: Path) -> None:
    names = "model.name=own_things:Net", "strategy.name=own_things:Own"
    train(small(*names), folder / "own")
    train(small(names[0]), folder / "central")
    assert torch.equal(final(folder / "own"), final(folder / "central"))
    assert isinstance(Method.of(small(*names)).trust, Trust)
    assert plan.describe(small(*names))["method"] == "own_things:Own + gradient + poisson + independent"
    with pytest.raises(InputError, match=r"strategy\.name must name a fedsim\.strategies\.base\.Trust"):
        Method.of(small("strategy.name=own_things:a_number"))


def test_a_node_runs_only_what_it_was_told_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends a configuration must not choose what a node executes."""
    mark = folder / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    setup = setup_of(small("model.name=evil:Net"))
    with pytest.raises(InputError, match="runs no code it was not told of, but is sent evil:Net"):
        node_for(setup, 0)
    assert not mark.exists()
    monkeypatch.setenv(references.ALLOWED, "own_things:Net, own_things:Own")
    node = node_for(setup_of(small("model.name=own_things:Net", "engine.threads=1")), 0)
    assert isinstance(node.model.body, nn.Sequential)
    sys.modules.pop("evil", None)


@pytest.mark.parametrize("setting", ["strategy", "query", "sampler", "noise"])
def test_a_node_imports_no_part_of_a_method_it_was_not_told_of(setting: str, folder: Path) -> None:
    (folder / "evil.py").write_text("open('mark', 'w').close()\n", encoding="utf-8")
    with pytest.raises(InputError, match="runs no code it was not told of, but is sent evil:Part"):
        node_for(setup_of(small(f"{setting}=evil:Part")), 0)
    assert not (folder / "mark").exists()
    sys.modules.pop("evil", None)


def test_a_node_imports_no_metric_it_was_not_told_of(folder: Path) -> None:
    (folder / "evil.py").write_text("open('mark', 'w').close()\n", encoding="utf-8")
    sent = setup_of(small("task.options.metrics=[evil:measure]"))
    with pytest.raises(InputError, match="runs no code it was not told of, but is sent evil:measure"):
        node_for(sent, 0)
    assert not (folder / "mark").exists()
    sys.modules.pop("evil", None)


def test_the_module_of_a_metric_goes_along(folder: Path) -> None:
    config = small("task.options.metrics=[own_things:a_number]")
    assert config.references() == ("own_things:a_number",)
    assert provenance.code_hash(*config.references()) != provenance.code_hash()
    assert (launch._stage(folder / "base", config) / "own_things.py").is_file()


def test_a_run_goes_on_with_the_code_it_was_started_with(folder: Path) -> None:
    config = small("model.name=own_things:Net")
    with pytest.raises(RunError):
        train(config, folder / "run", client=stop_at(3))
    source = folder / "own_things.py"
    before = source.read_text(encoding="utf-8")
    source.write_text(before.replace("nn.Tanh()", "nn.ReLU()"), encoding="utf-8")
    with pytest.raises(InputError, match="is not what the run was started with"):
        train(config, folder / "run", resume=True)
    source.write_text(before, encoding="utf-8")
    train(config, folder / "run", resume=True)
    sys.modules.pop("own_things")
    source.write_text(before.replace("nn.Tanh()", "nn.ReLU()"), encoding="utf-8")
    with pytest.raises(InputError, match="must be as it was for the run"):
        Run(folder / "run").model  # noqa: B018
