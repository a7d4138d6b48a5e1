"""Configurations: merge order, round trips, what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim import loading, models
from fedsim.config import Config
from fedsim.engine.experiment import prepare
from fedsim.method import Method
from fedsim.study import plan
from fedsim.validate import InputError
from tests.conftest import small


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_win_over_the_file_which_wins_over_what_it_extends(tmp_path: Path) -> None:
    parent = write(tmp_path / "parent.yaml", "train: {steps: 1, expected_batch_size: 2}\nseed: 3\n")
    child = write(tmp_path / "child.yaml", f"extends: {parent}\ntrain: {{steps: 4}}\n")
    config = loading.load(child, ["seed=5"])
    assert (config.train.steps, config.train.expected_batch_size, config.seed) == (4, 2.0, 5)


def test_json_and_yaml_round_trip(tmp_path: Path) -> None:
    config = loading.load("quickstart", ["model.options={a: 1}", "train.augmentations=[flip]"])
    assert loading.from_json(config.to_json()) == config
    again = loading.load(write(tmp_path / "c.yaml", loading.to_yaml(config)))
    assert again.digest() == config.digest()


def test_digest_ignores_speed_and_logging_and_nothing_else() -> None:
    base = loading.load("base")
    same = ["engine.physical_batch_size=7", "engine.threads=3", "monitor.progress=false", "title=x"]
    for override in same:
        assert loading.load("base", [override]).digest() == base.digest()
    other = [
        "seed=1",
        "federation.holders=7",
        "privacy.delta=1e-6",
        "train.steps=3",
        "optimizer.learning_rate=2",
    ]
    assert len({loading.load("base", [override]).digest() for override in other} | {base.digest()}) == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=1", "Did you mean 'train.steps'"),
        ("privacy.targetepsilon=1", "privacy.target_epsilon"),
        ("train.steps=0", "train.steps must be a positive"),
        ("train.steps=yes", "train.steps"),
        ("train=3", "command line"),
        ("seed=-1", "seed"),
        ("train.ema_decay=1", "train.ema_decay"),
        ("federation.availability=0", "federation.availability"),
    ],
)
def test_refusals_name_the_key(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loading.load("base", [override])


def test_circle_of_extends_is_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    write(a, f"extends: {b}\n")
    write(b, f"extends: {a}\n")
    with pytest.raises(InputError, match="circle"):
        loading.load(a)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold settings by name, such as title: mine, got a list"),
        ("a: [", "readable YAML file of settings by name, but: .*Mend that line"),
        ("train:\n\tsteps: 5\n", "character .* that cannot start any token, in line 2"),
        ("train: {steps: 5}\ntrain: {steps: 6}\n", "duplicate key train, in line 2"),
        ("train: 3\n", r"'train' must hold settings by name, such as \{steps: ...\}, got 3"),
        ("extends: quikstart\n", r"c.yaml: extends: .*got 'quikstart'\. Did you mean 'quickstart'"),
    ],
)
def test_unreadable_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        loading.load(write(tmp_path / "c.yaml", text))


def test_a_name_of_two_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copied a recipe and changed it means the copy, and whoever reads the pages means fedsim's."""
    monkeypatch.chdir(tmp_path)
    assert loading.find("quickstart").is_relative_to(loading.CONFIG_DIR)
    Path("quickstart.yaml").write_text("title: mine")
    with pytest.raises(
        InputError, match=r"a configuration of fedsim's and a file here. Write quickstart.yaml for"
    ):
        loading.load("quickstart")
    assert loading.load("quickstart.yaml").title == "mine"
    assert (
        loading.find("quickstart", loading.CONFIG_DIR / "compare") == loading.CONFIG_DIR / "quickstart.yaml"
    )


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(InputError, match="quickstart"):
        loading.load("quickstrat")
    with pytest.raises(InputError, match=r"There are base, quickstart, compare/\.\.\., .*tuned/\.\.\.\.$"):
        loading.load("zzz")
    with pytest.raises(InputError, match=r"name of a configuration, a path, .* got NoneType"):
        loading.loaded(None, {})  # type: ignore[arg-type]


# --- paths ----------------------------------------------------------------------------------------------


def test_a_path_in_a_file_starts_at_the_files_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both folders have a sibling.yaml, a data folder and weights; the working folder's are not meant."""
    for name, seed in (("mine", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        paths = "data: {root: data}\nmodel: {init_from: ../w.safetensors}\n"
        write(tmp_path / name / "sibling.yaml", f"seed: {seed}\n{paths}")
    child = write(tmp_path / "mine" / "child.yaml", "extends: sibling.yaml\ntitle: child\n")
    monkeypatch.chdir(tmp_path / "other")
    config = loading.load(child)
    assert config.seed == 1
    assert config.data.root == str(tmp_path / "mine" / "data")
    assert config.model.init_from == str(tmp_path / "w.safetensors")
    assert loading.load("../mine/child.yaml") == config
    written = loading.load(child, ["data.root=here", "model.init_from=~/w.safetensors"])
    assert written.data.root == str(tmp_path / "other" / "here")
    assert written.model.init_from == str(Path.home() / "w.safetensors")


def test_a_path_that_an_interpolation_makes_starts_there_too(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path / "parent.yaml", "title: images\n")
    child = write(tmp_path / "inner" / "c.yaml", "extends: ../parent.yaml\ndata: {root: '${title}'}\n")
    assert loading.load(child).data.root == str(tmp_path / "inner" / "images")


def test_relative_overrides_are_refused_where_the_folder_is_not_the_users() -> None:
    assert loading.load("base", ["data.root=/data"], folder=None).data.root == "/data"
    for override in ("data.root=data", "model.init_from=w.safetensors"):
        with pytest.raises(InputError, match="must be an absolute path here"):
            loading.load("base", [override], folder=None)


@pytest.mark.parametrize(
    "name", ['a "b" c', "a: b # c", "back\\slash", "ü 衣", "new\nline", "it's", "[1, 2]", "null"]
)
def test_overrides_of_a_comparison_start_at_its_folder_whatever_its_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    given = loading.located(["seed=3", "data.root=data"], folder)
    config = loading.load("base", given)
    assert config.data.root == str(folder / "data")
    assert config.seed == 3


# --- settings that nothing reads ------------------------------------------------------------------------

UNREAD = [
    ("train.augment_multiplicity=4", "train.augmentations=[]", "train.augmentations=[flip]"),
    ("model.init_sha256=abc", "model.init_from=null", "model.init_from=w"),
    ("model.reset=[head.*]", "model.init_from=null", "model.init_from=w"),
    ("privacy.stop_at_epsilon=3", "privacy.noise_multiplier=null", "privacy.noise_multiplier=1"),
    ("engine.memory_limit=8GB", "engine.physical_batch_size=64", "engine.physical_batch_size=auto"),
    ("engine.precision=bfloat16", "engine.gradients=vmap", "engine.gradients=bookkeeping"),
    ("engine.gradient_memory=low", "engine.gradients=opacus", "engine.gradients=bookkeeping"),
    ("engine.channels_last=on", "engine.gradients=vmap", "engine.gradients=bookkeeping"),
    ("engine.cuda_graphs=true", "engine.gradients=vmap", "engine.gradients=bookkeeping"),
    ("tuning.held_out_examples=5", "tuning.mode=null", "tuning={mode: free, trials: 2}"),
    ("tuning.trials=3", "tuning.mode=null", "tuning={mode: free, trials: 2}"),
    ("tuning.distribution=poisson", "tuning.mode=null", "tuning={mode: private, trials: 2}"),
]


@pytest.mark.parametrize(("setting", "beside", "reader"), UNREAD)
def test_a_setting_that_nothing_reads_is_refused(setting: str, beside: str, reader: str) -> None:
    name, choice = setting.split("=")[0], beside.split("=")[0]
    with pytest.raises(InputError, match=f"{name} is .*nothing reads it while {choice} is"):
        loading.load("base", [beside, setting])
    loading.load("base", [reader, setting])
    loading.load("base", [beside])


def test_every_conditional_setting_is_among_these() -> None:
    """Whoever declares another one tests it."""
    declared = {
        f"{section.name}.{entry.name}"
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(section.default_factory)
        for entry in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
        if "read_with" in entry.metadata
    }
    assert declared == {setting.split("=")[0] for setting, _, _ in UNREAD}


OPTIONS = [
    ("optimizer.options.beta1=0.8", "optimizer.name=sgd", "optimizer.name=adam"),
    ("optimizer.options.beta2=0.8", "optimizer.name=momentum", "optimizer.name=lamb"),
    ("optimizer.options.epsilon=1e-3", "optimizer.name=nesterov", "optimizer.name=adamw"),
    ("optimizer.options.momentum=0.5", "optimizer.name=adam", "optimizer.name=nesterov"),
    ("optimizer.options.momentum=0", "optimizer.name=sgd", "optimizer.name=momentum"),
    (
        "optimizer.schedule.options.final_fraction=0.5",
        "optimizer.schedule=constant",
        "optimizer.schedule=cosine",
    ),
    ("federation.partition.options.alpha=0.1", "federation.partition=iid", "federation.partition=dirichlet"),
    ("federation.partition.options.per_holder=3", "federation.partition=iid", "federation.partition=shards"),
    (
        "federation.partition.options.exponent=2",
        "federation.partition=shards",
        "federation.partition=power_law",
    ),
    ("data.options.classes=3", "data.name=mnist", "data.name=arrays"),
    ("data.options={classes: 3, fit: squeeze}", "data.name=arrays", "data.name=image_folder"),
    ("task.options.top_k=3", "task=regression", "task=classification"),
    ("query.options.local_epochs=2", "query=gradient", "query=holder_update"),
    ("sampler.options.groups=2", "sampler=poisson", "sampler=cyclic"),
    ("noise.options.factors=[2.0,1.0]", "noise=independent", "noise=schedule"),
    ("strategy.options.min_survivors=9", "strategy=central", "strategy=shares"),
    ("privacy.clipping.options.gamma=0.1", "privacy.clipping=flat", "privacy.clipping=normalised"),
    ("privacy.clipping.options.gamma=0.01", "privacy.clipping=per_layer", "privacy.clipping=normalised"),
    ("privacy.clipping.options.groups={}", "privacy.clipping=flat", "privacy.clipping=grouped"),
]


def refusal(*overrides: str) -> str:
    """What a run of these is refused by, such as missing files; "" where it is not."""
    try:
        prepare(small("data.root=/nowhere", *overrides))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("setting", "beside", "reader"), OPTIONS)
@pytest.mark.parametrize("way", [prepare, plan.describe], ids=["run", "plan"])
def test_an_option_that_what_is_chosen_does_not_have_is_refused(
    way: Callable[[Config], Any], setting: str, beside: str, reader: str
) -> None:
    """Whoever wrote it expects it to act; also where it stands for its default in another choice."""
    where, name = beside.partition("=")[0].removesuffix(".name"), beside.partition("=")[2]
    with pytest.raises(InputError, match=rf"{where}.options of {name}: unknown key '\w+'"):
        way(small(beside, setting))
    assert "unknown key" not in refusal(reader, setting)


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("nonprivate", ["privacy.clip_norm=0.5"]),
        ("nonprivate", ["privacy.clipping=normalised"]),
        ("nonprivate", ["query=holder_update", "engine.gradients=vmap"]),
        ("nonprivate", ["query=holder_update", "train.augmentations=[flip]"]),
        ("dp_fedavg", ["engine.precision=bfloat16"]),
        ("dp_fedavg", ["query.options.quantile_learning_rate=0.1"]),
        ("shares_dpsgd", ["engine.gradients=opacus"]),
    ],
)
def test_a_setting_that_the_strategy_does_not_read_is_refused(strategy: str, settings: list[str]) -> None:
    config = loading.load("base", [f"preset={strategy}", *settings])
    name = settings[-1].split("=")[0]
    with pytest.raises(InputError, match=f"{name} is .*(does not read it|nothing reads it)"):
        Method.of(config)
    Method.of(loading.load("base", [f"preset={strategy}", *settings[:-1]]))


@pytest.mark.parametrize("family", ["small_cnn", "wide_resnet"])
def test_options_of_a_model_that_nothing_reads_are_refused(family: str) -> None:
    model = loading.load(
        "base", [f"model.name={family}", "model.options={groups: 4, normalisation: none}"]
    ).model
    with pytest.raises(InputError, match=r"model.options.groups is 4, but nothing reads it"):
        models.skeleton(model, (1, 28, 28), 10)
