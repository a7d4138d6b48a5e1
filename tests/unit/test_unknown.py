"""A setting that does not exist is answered with the one that was meant, or with what the file is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim import loading, presets, unknown
from fedsim.config import CONFIG_DIR
from fedsim.merging import schema_of
from fedsim.method import Method
from fedsim.strategies import STRATEGIES
from fedsim.study import compare, tune
from fedsim.validate import InputError


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("train.stps", "Did you mean 'train.steps'?"),
        ("optimiser.name", "Did you mean 'optimizer.name'?"),
        ("learning_rate", "Did you mean 'optimizer.learning_rate'?"),
        ("batch_size", "Here it is 'train.expected_batch_size'."),
        ("train.LR", "Here it is 'optimizer.learning_rate'."),
        ("epochs", "Here it is 'train.steps': an epoch is examples / expected_batch_size steps."),
        ("out", "It is an option of the command: --out."),
        ("privacy.epsilon", "Here it is 'privacy.target_epsilon'."),
        (
            "loss",
            "Here it is 'task.name': a loss of your own is the method `loss` of a class that derives from "
            "fedsim.Task.",
        ),
    ],
)
def test_the_setting_that_was_meant_is_named(key: str, answer: str) -> None:
    with pytest.raises(InputError) as caught:
        loading.load("base", [f"{key}=1"])
    assert str(caught.value) == f"command line: unknown key '{key}'. {answer}"


@pytest.mark.parametrize(
    ("name", "here"),
    [("SecAgg+", "shares"), ("ldp", "local"), ("fedavg", "preset=dp_fedavg, a choice on every axis")],
)
def test_a_choice_that_goes_by_another_name_elsewhere_is_named(name: str, here: str) -> None:
    with pytest.raises(InputError, match=rf"got {name!r}. Here it is {here}.$".replace("+", r"\+")):
        Method.of(loading.load("base", [f"strategy={name}", "privacy.noise_multiplier=1"]))


def test_choices_of_others_lead_to_some_that_exist() -> None:
    for setting, names in unknown._CHOICES.items():
        assert setting == "strategy.name"
        for here in names.values():
            preset = here.partition(",")[0].removeprefix("preset=")
            assert here in STRATEGIES.own() or preset in presets.names(CONFIG_DIR), here


def test_words_of_a_name_are_found_whole() -> None:
    valid = ["privacy.clip_norm", "privacy.clipping", "engine.memory_limit"]
    assert unknown.remedy("norm", valid) == "Did you mean 'privacy.clip_norm'?"
    assert unknown.remedy("memory", valid) == "Did you mean 'engine.memory_limit'?"
    assert unknown.remedy("emory_lim", ["a", "b"]) == "There are a, b."
    assert unknown.remedy("beta1", []) == "There are no options."


def test_what_it_is_called_elsewhere_leads_to_settings_that_exist() -> None:
    for name, here in unknown.ELSEWHERE.items():
        section, setting = here.split(".")
        assert setting in schema_of(loading.Config)[section], name


@pytest.mark.parametrize(
    ("load", "source", "kind"),
    [
        (loading.load, "compare/trust_models", "a comparison, which `fedsim compare` runs"),
        (loading.load, "tune/quickstart", "a search for settings, which `fedsim tune` makes"),
        (compare.load, "quickstart", "a recipe, which `fedsim run` trains"),
        (compare.load, "tune/quickstart", "a search for settings, which `fedsim tune` makes"),
        (tune.load, "quickstart", "a recipe, which `fedsim run` trains"),
    ],
)
def test_a_file_of_another_kind_is_told_with_its_command(load: object, source: str, kind: str) -> None:
    assert callable(load)
    with pytest.raises(InputError, match=kind):
        load(source)


def test_no_file_is_taken_for_another_kind() -> None:
    """Every shipped recipe, comparison and search loads as what it is (test_layers and others load them)."""
    own = list(schema_of(loading.Config))
    for path in CONFIG_DIR.rglob("*.yaml"):
        keys = list(loading.read(Path(path)))
        if path.parent.name not in ("compare", "tune", "tuned"):
            assert not unknown.another_kind(keys, own), path
