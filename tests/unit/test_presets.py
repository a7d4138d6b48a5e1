"""Methods by name: what a preset picks, what wins over it, and which name a run says it is."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedsim
from fedsim import loading, presets
from fedsim.config import CONFIG_DIR, Config
from fedsim.merging import Choice
from fedsim.method import Method
from fedsim.validate import InputError
from tests.conftest import SMALL, small

NAMES = ["central_dpsgd", "dp_fc", "dp_fedavg", "dp_fedavg_ftrl", "dp_fedavg_mf", "dp_fedavg_shares"]
NAMES += ["dp_ftrl", "dp_ls", "dp_mf", "dp_newton", "local_dpsgd", "nonprivate", "shares_dpsgd"]


def axes(config: Config) -> tuple[str, ...]:
    return config.strategy.name, config.query.name, config.sampler.name, config.noise.name


def chained(folder: Path, *texts: str, overrides: tuple[str, ...] = ()) -> Config:
    """The last of files of which each extends the one before."""
    for place, text in enumerate(texts):
        above = f"extends: {folder / f'{place - 1}.yaml'}\n" if place else ""
        (folder / f"{place}.yaml").write_text(above + text)
    return loading.load(folder / f"{len(texts) - 1}.yaml", overrides)


def test_the_methods_are_presets() -> None:
    assert presets.names(CONFIG_DIR) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_picks_a_variant_of_every_axis_and_nothing_else(name: str) -> None:
    held = presets.content(name, CONFIG_DIR)
    assert set(held) == set(presets.AXES)
    chosen, plain = loading.load("base", [f"preset={name}"]), loading.load("base")
    differs = {key for key, value in chosen.defining().items() if value != plain.defining()[key]}
    assert differs <= set(presets.AXES)
    assert chosen.method() == name
    assert Method.of(chosen).private == (name != "nonprivate")
    assert len({axes(loading.load("base", [f"preset={other}"])) for other in NAMES}) == len(NAMES)


def test_the_default_is_central_dpsgd() -> None:
    assert Config().method() == "central_dpsgd"
    assert loading.load("base", ["preset=central_dpsgd"]) == Config()


def test_what_stands_beside_a_preset_wins(tmp_path: Path) -> None:
    for text in ("preset: dp_mf\nnoise: independent\n", "noise: independent\npreset: dp_mf\n"):
        assert axes(chained(tmp_path, text)) == ("central", "gradient", "cyclic", "independent")
    for given in (["preset=dp_mf", "sampler.options.groups=7"], ["sampler.options.groups=7", "preset=dp_mf"]):
        config = loading.load("base", given)
        assert (config.sampler, config.noise) == (Choice("cyclic", {"groups": 7}), Choice("banded"))
        assert config.method() == "dp_mf", "another number of groups is the same method"


def test_what_is_said_later_wins(tmp_path: Path) -> None:
    config = chained(tmp_path, "preset: dp_ftrl\n", "query: holder_update\n")
    assert axes(config) == ("central", "holder_update", "passes", "tree")
    assert axes(chained(tmp_path, "noise: tree\n", "preset: local_dpsgd\n")) == axes(
        small("preset=local_dpsgd")
    )
    config = chained(tmp_path, "preset: dp_ftrl\n", "seed: 1\n", overrides=("preset=shares_dpsgd",))
    assert config.method() == "shares_dpsgd"
    given = "preset: shares_dpsgd\nstrategy: {options: {min_survivors: 9}}\n"
    assert chained(tmp_path, given).strategy.options == {"min_survivors": 9}
    assert chained(tmp_path, given, "preset: central_dpsgd\n").strategy.options == {}


def test_a_loaded_configuration_names_its_axes_alone() -> None:
    config = loading.load("base", ["preset=dp_ftrl"])
    assert config.preset is None
    written = ["strategy=central", "query=gradient", "sampler=passes", "noise=tree"]
    assert loading.load("base", written) == config
    assert loading.load("base", written).digest() == config.digest()
    assert loading.from_json(config.to_json()) == config


def test_a_combination_without_a_name_says_its_parts() -> None:
    config = loading.load("base", ["preset=shares_dpsgd", "sampler=cyclic"])
    assert config.method() == "shares + gradient + cyclic + independent"


def test_python_takes_presets_too(tmp_path: Path) -> None:
    plain = dict(item.split("=") for item in SMALL if item.startswith(("data", "monitor")))
    settings = {"train.steps": 1, "train.expected_batch_size": 100, "model": {"name": "linear"}}
    run = fedsim.train(
        {**plain, **settings, "privacy": {"noise_multiplier": 1.0}},
        out=tmp_path / "run",
        preset="dp_mf",
        sampler={"options": {"groups": 2}},
    )
    assert run.result["method"] == "dp_mf"
    assert run.config.sampler == Choice("cyclic", {"groups": 2})


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'dp_ftrl'"):
        loading.load("base", ["preset=dp_ftlr"])
    with pytest.raises(InputError, match="preset must be one of"):
        loading.load("base", ["preset=../base"])


def test_a_preset_that_says_more_than_the_axes_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / presets.FOLDER
    folder.mkdir()
    (folder / "more.yaml").write_text("strategy: central\nprivacy: {target_epsilon: 1}\n")
    with pytest.raises(InputError, match=r"preset more must choose .* and nothing else, got privacy"):
        presets.content("more", tmp_path)


UNSOUND = [
    (("noise=tree",), "correlates the noise of the steps of a cycle"),
    (("noise=banded",), "units whose steps are"),
    (("preset=dp_mf", "noise.options.bands=5"), "units whose steps are"),
    (("preset=dp_ftrl", "noise=banded"), "units whose steps are"),
    (("preset=dp_ftrl", "strategy=local"), "does not go with strategy=local"),
    (("preset=dp_mf", "strategy=shares"), "does not go with strategy=shares"),
    (("preset=dp_fedavg", "strategy=local"), "does not go with query=holder_update"),
    (
        ("preset=shares_dpsgd", "query={name: holder_update, options: {target_quantile: 0.5}}"),
        "does not go with strategy=shares",
    ),
]


@pytest.mark.parametrize(("chosen", "reason"), UNSOUND)
def test_choices_that_have_no_joint_guarantee_are_refused(chosen: tuple[str, ...], reason: str) -> None:
    from fedsim.engine.experiment import prepare

    with pytest.raises(InputError, match=reason):
        prepare(small(*chosen))
