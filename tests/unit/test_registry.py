"""Registries: what can be chosen, from inside and outside, with typed options; what is refused."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from fedsim import axes, models, registry
from fedsim.clipping import CLIPPING
from fedsim.config import ModelConfig
from fedsim.data.sources import SOURCES
from fedsim.merging import Choice
from fedsim.optimizers import OPTIMIZERS
from fedsim.optimizers.sgd import Momentum
from fedsim.partitions import PARTITIONS
from fedsim.registry import Registry, check_choice
from fedsim.schedules import SCHEDULES
from fedsim.schedules.base import Schedule
from fedsim.tasks import TASKS
from fedsim.validate import InputError

ALL = [CLIPPING, OPTIMIZERS, PARTITIONS, SCHEDULES, SOURCES, TASKS]
HERE = "tests.unit.test_registry"


@dataclass(frozen=True)
class Steps(Schedule):
    """Halves the rate `times` times.

    Attributes:
        times: how often.
    """

    times: int = 2

    def factor(self, progress: float) -> float:
        """See `Schedule.factor`."""
        return float(0.5 ** int(progress * (self.times + 1)))


READY = Steps(1)


def made(power: float) -> Any:
    return lambda progress: (1 - progress) ** power


def number() -> int:
    return 3


def test_names_are_fedsims_own() -> None:
    assert list(OPTIMIZERS.own()) == ["adam", "adamw", "lamb", "sgd", "momentum", "nesterov"]
    assert set(SCHEDULES.names()) == {"constant", "linear", "cosine"}
    assert set(TASKS.names()) == {
        "captioning",
        "classification",
        "multi_label",
        "reconstruction",
        "regression",
        "language_modelling",
    }
    assert set(PARTITIONS.names()) >= {"iid", "power_law", "shards", "dirichlet", "natural", "file"}


@pytest.mark.parametrize("axis", ALL, ids=lambda r: r.axis)
def test_every_variant_says_what_it_is_and_has_plain_options(axis: Registry[Any]) -> None:
    for name, (line, options) in axis.described().items():
        assert line.endswith("."), name
        assert issubclass(axis.find(name), axis.base)
        for option, default in options.items():
            assert default is None or isinstance(default, bool | int | float | str | list | dict), option


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(InputError, match=r"optimizer.name.*Did you mean 'nesterov'.*package.module:Object"):
        OPTIMIZERS.make(Choice("nesterow"))


def test_options_are_typed() -> None:
    assert OPTIMIZERS.make(Choice("momentum", {"momentum": "0.8"})) == Momentum(0.8)
    with pytest.raises(InputError, match=r"optimizer.options of momentum: unknown key 'momentun'.*momentum"):
        OPTIMIZERS.make(Choice("momentum", {"momentun": 0.8}))
    with pytest.raises(
        InputError, match=r"optimizer.options of momentum: 'momentum' must be a number.*got 'much'"
    ):
        OPTIMIZERS.make(Choice("momentum", {"momentum": "much"}))
    with pytest.raises(InputError, match=r"optimizer.schedule.options.final_fraction must be"):
        SCHEDULES.make(Choice("linear", {"final_fraction": 2}))


def test_objects_from_outside() -> None:
    """A class, an instance, and a function that makes what is adapted."""
    assert SCHEDULES.make(Choice(f"{HERE}:Steps", {"times": 3})) == Steps(3)
    assert SCHEDULES.make(Choice(f"{HERE}:READY")) is READY
    assert SCHEDULES.make(Choice(f"{HERE}:made", {"power": 2})).factor(0.5) == 0.25


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (f"{HERE}:number", {}, r"must name a fedsim.schedules.base.Schedule .*but .*number gives int"),
        ("fedsim.optimizers.sgd:Sgd", {}, "must name a fedsim.schedules.base.Schedule .*gives Sgd"),
        (f"{HERE}:READY", {"times": 2}, "options must be empty for .*READY"),
        (f"{HERE}:Steps", {"time": 2}, "unknown key 'time'"),
        (f"{HERE}:made", {"powr": 2}, "must fit made"),
        (f"{HERE}:Stepz", {}, "Did you mean 'Steps'"),
        ("no_such_module:Thing", {}, "there is no module"),
    ],
)
def test_a_foreign_object_of_the_wrong_kind_is_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        SCHEDULES.make(Choice(name, options))


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package that offers a schedule named steps."""
    points = {"fedsim.schedules": [metadata.EntryPoint("steps", f"{HERE}:Steps", "fedsim.schedules")]}
    points["fedsim.models"] = [metadata.EntryPoint("plain", "torch.nn:Linear", "fedsim.models")]
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: points.get(group, []))
    registry.entry_points.cache_clear()
    yield
    registry.entry_points.cache_clear()


def test_entry_points_are_chosen_by_their_name(offered: None) -> None:
    assert SCHEDULES.names()[-1] == "steps"
    assert SCHEDULES.make(Choice("steps", {"times": 5})) == Steps(5)
    with pytest.raises(InputError, match="Did you mean 'steps'"):
        SCHEDULES.make(Choice("step"))
    assert "steps" not in OPTIMIZERS.names()
    with pytest.raises(InputError, match=r"optimizer\.name must be one of"):
        OPTIMIZERS.make(Choice("steps"))


def test_models_of_installed_packages_are_built_and_listed(offered: None) -> None:
    config = ModelConfig("plain", {"in_features": 4, "out_features": 3})
    assert models.build(config, (4,), 3, 0).weight.shape == (3, 4)
    assert models.skeleton(config, (4,), 3).weight.is_meta
    assert axes.offered()["model.name"] == {"plain": "torch.nn:Linear"}
    assert axes.offered()["optimizer.schedule"] == {"steps": f"{HERE}:Steps"}


@pytest.mark.parametrize(
    "setting", ["strategy.name", "query.name", "sampler.name", "noise.name", "privacy.clipping"]
)
def test_every_strategy_says_what_it_is(setting: str) -> None:
    said = [about for about, _ in axes.described()[setting].values()]
    assert len(said) > 1
    assert all(said)
    assert len(set(said)) == len(said)


def test_a_new_file_in_a_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "things_of_test"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from fedsim.registry import Registry\nTHINGS = Registry('thing.name', 'things_of_test', object)\n"
    )
    text = (
        "from dataclasses import dataclass\nfrom things_of_test import THINGS\n"
        "@THINGS.register('{0}')\n@dataclass(frozen=True)\nclass Thing:\n"
        "    '''The {0} thing.\n\n    More.\n    '''\n"
        "    size: int\n    tags: list = None\n"
    )
    for name in ("second", "first"):
        (package / f"{name}.py").write_text(text.format(name))
    monkeypatch.syspath_prepend(str(tmp_path))
    things = importlib.import_module("things_of_test").THINGS
    try:
        assert things.names() == ["first", "second"]
        assert things.described()["first"] == ("The first thing.", {"size": "needed", "tags": None})
        with pytest.raises(AssertionError, match="registered twice"):
            things.register("first")(object)
    finally:
        for name in [name for name in sys.modules if name.startswith("things_of_test")]:
            del sys.modules[name]


def test_lists_of_choices() -> None:
    assert check_choice("sgd", "x") == Choice("sgd")
    assert check_choice({"name": "a", "options": {"b": 1}}, "x") == Choice("a", {"b": 1})
    for wrong in (3, {"options": {}}, {"name": "a", "option": {}}, None):
        with pytest.raises(InputError, match="x must list names or"):
            check_choice(wrong, "x")
