"""Choices: short names, which options go and which stay, and round trips."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedsim import loading
from fedsim.config import Config
from fedsim.merging import Choice, choices, dotlist
from fedsim.validate import InputError


def chained(folder: Path, *texts: str, overrides: tuple[str, ...] = ()) -> Config:
    """The last of files of which each extends the one before."""
    for place, text in enumerate(texts):
        above = f"extends: {folder / f'{place - 1}.yaml'}\n" if place else ""
        (folder / f"{place}.yaml").write_text(above + text)
    return loading.load(folder / f"{len(texts) - 1}.yaml", overrides)


def test_all_that_is_chosen_is_known() -> None:
    assert set(choices(Config)) == {
        *("data", "data.features", "task", "model", "federation.partition", "strategy", "optimizer"),
        *("query", "sampler", "noise", "learner", "privacy.clipping", "optimizer.schedule"),
    }


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=3", "train.steps=7", "seed=4", "title=a: b"],
        ["data.root=null", "data.root=", "title='5'", "title=1e-3", "model.fix=true", "a.b=${data.root}"],
        ["optimizer={name: adam, options: {a: {b: 1, c: [1, 2]}}}", "optimizer.options.a.b=[{x: 1}, two]"],
        ["task.options={a: {b: 1}, c: 2}", "task.options={a: {d: 3}, c: {e: 4}}", "task.options.a={b: 5}"],
        ["odd=7", "odd.steps=8", "odd.more={1: a, 2.5: b}", "odd.more={1: c}"],
    ],
)
def test_overrides_become_what_omegaconf_makes_of_them(overrides: list[str]) -> None:
    """A later mapping changes, and does not replace, an earlier one."""
    expected = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    assert OmegaConf.to_container(dotlist(overrides)) == expected
    first = OmegaConf.to_container(OmegaConf.from_dotlist(overrides[:1]))
    assert OmegaConf.to_container(dotlist(overrides[:1])) == first, "what is read twice is not one thing"


@pytest.mark.parametrize("text", ["iid", "{name: iid}", "{name: iid, options: {}}"])
def test_a_short_name_means_the_default_options(text: str, tmp_path: Path) -> None:
    config = chained(tmp_path, f"federation: {{partition: {text}}}\n")
    assert config.federation.partition == Choice("iid", {})
    assert config.federation.holders == 100
    assert loading.load("base", [f"federation.partition={text}"]).federation.partition == Choice("iid", {})


def test_whole_sections_may_be_a_short_name(tmp_path: Path) -> None:
    config = chained(tmp_path, "task: regression\nfederation: {partition: natural}\n")
    assert (config.task, config.federation.partition) == (Choice("regression"), Choice("natural"))


SHARDS = "federation: {partition: {name: shards, options: {per_holder: 3}}}\n"


def test_options_of_the_variant_before_go_with_its_name(tmp_path: Path) -> None:
    for text in ("{name: power_law}", "power_law"):
        named = chained(tmp_path, SHARDS, f"federation: {{partition: {text}}}\n")
        assert named.federation.partition == Choice("power_law", {})
    other = chained(tmp_path, SHARDS, "federation: {partition: {name: power_law, options: {exponent: 2}}}\n")
    assert other.federation.partition == Choice("power_law", {"exponent": 2})
    override = chained(tmp_path, SHARDS, overrides=("federation.partition=iid",))
    assert override.federation.partition == Choice("iid", {})


def test_options_of_sections_go_and_their_other_settings_stay(tmp_path: Path) -> None:
    above = "optimizer: {name: momentum, options: {momentum: 0.5}, learning_rate: 0.3, schedule: cosine}\n"
    config = chained(tmp_path, above, "optimizer: {name: adam}\n")
    o = config.optimizer
    assert (o.name, o.options, o.learning_rate, o.schedule) == ("adam", {}, 0.3, Choice("cosine"))


def test_options_stay_where_the_name_does(tmp_path: Path) -> None:
    for text in ("holders: 7", "partition: {name: shards}", "partition: {options: {per_holder: 3}}"):
        kept = chained(tmp_path, SHARDS, f"federation: {{{text}}}\n")
        assert kept.federation.partition == Choice("shards", {"per_holder": 3}), text
    above = "federation: {partition: {name: dirichlet, options: {alpha: 2.0}}}\n"
    both = chained(tmp_path, above, "federation: {partition: {options: {concentration: per_class}}}\n")
    assert both.federation.partition.options == {"alpha": 2.0, "concentration": "per_class"}
    again = chained(tmp_path, above, "federation: {partition: dirichlet}\n")
    assert again.federation.partition == Choice("dirichlet", {}), "a name alone means its defaults"


@pytest.mark.parametrize(
    ("overrides", "name", "options"),
    [
        (["X=shards", "X.options.per_holder=2"], "shards", {"per_holder": 2}),
        (["X.options.per_holder=2", "X=shards"], "shards", {"per_holder": 2}),
        (["X.name=shards", "X.options.per_holder=2"], "shards", {"per_holder": 2}),
        (["X=shards", "X.options.per_holder=2", "X=iid"], "iid", {}),
        (
            ["X=shards", "X.options.per_holder=2", "X.name=power_law", "X.options.exponent=2"],
            "power_law",
            {"exponent": 2},
        ),
        (["X=shards", "X.options.per_holder=2", "X=shards"], "shards", {"per_holder": 2}),
        (["X={name: shards}", "X.options.per_holder=2"], "shards", {"per_holder": 2}),
        (["X={name: shards, options: {per_holder: 2}}"], "shards", {"per_holder": 2}),
        (["X=iid", "X.options={alpha: 1}"], "iid", {"alpha": 1}),
        (["X.options.alpha=1"], "dirichlet", {"alpha": 1}),
    ],
)
def test_names_and_options_on_the_command_line(
    overrides: list[str], name: str, options: dict[str, object]
) -> None:
    given = [item.replace("X", "federation.partition", 1) for item in overrides]
    assert loading.load("base", given).federation.partition == Choice(name, options)


def test_a_later_optimizer_drops_the_options_of_the_one_before() -> None:
    given = ["optimizer.name=momentum", "optimizer.options.momentum=0.5", "optimizer.name=sgd", "seed=2"]
    config = loading.load("base", given)
    assert (config.optimizer.name, config.optimizer.options, config.seed) == ("sgd", {}, 2)


def test_features_are_nothing_or_a_choice(tmp_path: Path) -> None:
    assert loading.load("base").data.features is None
    for text in ("scattering", "{name: scattering}"):
        config = chained(tmp_path, "seed: 1\n", f"data: {{features: {text}}}\n")
        assert config.data.features == Choice("scattering", {})
    assert (
        chained(tmp_path, "data: {features: scattering}\n", "data: {features: null}\n").data.features is None
    )
    assert chained(tmp_path, "data: {features: scattering}\n", "seed: 1\n").data.features == Choice(
        "scattering"
    )


def test_round_trips_keep_every_choice(tmp_path: Path) -> None:
    config = loading.load(
        "base",
        [
            *("federation.partition=shards", "federation.partition.options.per_holder=3"),
            *("task={name: regression, options: {scale: 2.0, metrics: [a.b:c]}}", "data.features=scattering"),
            *("optimizer.name=adam", "optimizer.options.beta1=0.5", "optimizer.schedule=linear"),
            *("model.options={a: {b: [1, 2]}}", "data.options.classes=3"),
        ],
    )
    assert loading.from_json(config.to_json()) == config
    (tmp_path / "c.yaml").write_text(loading.to_yaml(config))
    again = loading.load(tmp_path / "c.yaml")
    assert again == config
    assert again.digest() == config.digest()
    assert isinstance(again.federation.partition, Choice)


def test_options_change_the_digest() -> None:
    digests = {
        loading.load("base", given).digest()
        for given in (
            [],
            ["task.options.top_k=2"],
            ["federation.partition.options.alpha=2"],
            ["task=regression"],
        )
    }
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federation.partition.nam=iid", "Did you mean 'federation.partition.name'"),
        ("federation.partition.option=3", "federation.partition.options"),
        ("task.optoins.top_k=3", "unknown key 'task.optoins.top_k'"),
        (
            "federation.partition.options=3",
            "'federation.partition.options' must hold settings by name.* got 3",
        ),
        (
            "federation.partition=[iid]",
            r"'federation.partition.name' must be one word or text, got \['iid'\]",
        ),
        ("train.steps=1e3", "'train.steps' must be a whole number, such as 100, got 1000.0"),
        ("optimizer.learning_rate=0,5", "'optimizer.learning_rate' must be a number, .*, got '0,5'"),
        ("monitor.tensorboard=maybe", "'monitor.tensorboard' must be true or false, got 'maybe'"),
        ("train.augmentations=flip", r"'train.augmentations' must be a list, such as \[a, b\], got 'flip'"),
        ("train=5", r"'train' must hold settings by name, such as \{steps: ...\}, got 5"),
        ("train.augmentations=[flip", r"got 'train.augmentations=\[flip': expected ',' or '\]'.* Close its"),
        ("train.steps", "must look like key.path=value, got 'train.steps'. Leave no blanks around ="),
        ("federation.partition=null", "federation.partition"),
    ],
)
def test_malformed_choices_are_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loading.load("base", [override])


@pytest.mark.parametrize("number", ["010", "-0100", "08", "1:40", "1:30.5", "0_10"])
def test_numbers_of_other_bases_are_refused(number: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 0100 as 64 and 1:40 as 100."""
    with pytest.raises(InputError, match=rf"override .*: {number} must be a decimal number"):
        loading.load("base", [f"train.steps={number}"])
    with pytest.raises(InputError, match=rf"override .*: {number} must be a decimal number"):
        dotlist([f"data.options={{train: {number}}}"])
    (file := tmp_path / "own.yaml").write_text(f"extends: base\n# from 010 on\ntrain: {{steps: {number}}}\n")
    with pytest.raises(InputError, match=rf"own.yaml: {number} must be a decimal number"):
        loading.load(file)


def test_numbers_in_quotes_times_and_fractions_are_what_they_were() -> None:
    held = dotlist(["title='010'", "a=0.05", "b=-0", "c=1e-05", "d=x:010", "e=2026-01-02"])
    assert list(held.values()) == ["010", 0.05, 0, 1e-05, "x:010", "2026-01-02"]
