"""Configurations of the leaderboard: each trains on small files of its data set's layout, by its metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from fedsim import loading, models
from fedsim.config import CONFIG_DIR, Config
from fedsim.data import sizes
from fedsim.data.datasets import load
from fedsim.validate import InputError
from tests.conftest import command, train
from tests.unit import leaderboard_files as files

RECIPES = sorted(path.stem for path in (CONFIG_DIR / "leaderboard").glob("*_*.yaml"))
SETTINGS = ("none", "in1k", "dc2b", "any")
SMALL = (
    "train.steps=2",
    "train.expected_batch_size=4",
    "train.eval_every=2",
    "train.checkpoint_every=2",
    "federation.holders=3",
    "engine.physical_batch_size=8",
    "engine.threads=1",
    "monitor.tensorboard=false",
    "monitor.progress=false",
)
TINY = {
    "wide_resnet": ["model.options.depth=10", "model.options.width=1"],
    "nf_resnet_50": ["model.name=wide_resnet", "model.options={depth: 10, width: 1}"],
    "vit": ["model.options.options={embed_dim: 32, depth: 1, num_heads: 2}"],
    "resnetv2": ["model.options.options={layers: [1, 1, 1, 1], channels: [128, 128, 128, 128]}"],
}


def written(data: str, root: Path, patch: pytest.MonkeyPatch) -> Path:
    """Small files of a data set; returns data.root."""
    if data == "cifar10":
        return files.cifar10(root, patch)
    if data == "imagenet":
        return files.imagenet(root)
    if data == "chexpert":
        return files.chexpert(root).parent
    files.eyepacs(root / "eyepacs")
    return root


def shrunk(recipe: str, root: Path, *more: str) -> Config:
    """The recipe with what makes it small: a tiny model of its family, 32 x 32 pixels, two steps."""
    held = loading.load(f"leaderboard/{recipe}")
    kind = str(held.model.options.get("architecture", held.model.name)).split("_")[0]
    tiny = TINY[kind] if kind in TINY else TINY[held.model.name]
    size = ["data.options.size=32"] if "size" in held.data.options else []
    views = ["train.augment_multiplicity=2"] if held.train.augment_multiplicity > 1 else []
    given = [f"data.root={root}", *SMALL, *tiny, *size, *views, *more]
    return loading.load(f"leaderboard/{recipe}", given)


def public_weights(config: Config, path: Path) -> dict[str, Any]:
    """Weights as somebody else would publish them: of the same network, with a head of a thousand classes."""
    made = models.build(config.model.__class__(config.model.name, config.model.options), (3, 32, 32), 1000, 7)
    save_file(made.state_dict(), path)
    return load_file(path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_configuration_trains_on_files_of_its_layout(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epsilon_takes_no_time: None
) -> None:
    data, setting = recipe.split("_")
    root = written(data, tmp_path / "data", monkeypatch)
    config, public = shrunk(recipe, root), {}
    if config.model.init_from is not None:
        path = tmp_path / "weights.safetensors"
        public = public_weights(config, path)
        config = shrunk(recipe, root, f"model.init_from={path}")
    result = train(config, tmp_path / "run")
    assert result["steps"] == 2
    medical = data in ("chexpert", "eyepacs")
    assert result["headline"]["name"] == ("auc" if medical else "accuracy")
    assert 0.0 <= result[result["headline"]["name"]] <= 1.0
    assert (setting == "none") == (not public), "public weights in every setting but one"
    released = load_file(tmp_path / "run" / "final.safetensors")
    for name in set(released) & set(public):
        if not name.startswith("head"):
            assert np.array_equal(released[name], public[name]) == bool(config.model.freeze), name


def test_every_data_set_has_every_setting_but_for_private_data_that_would_be_public() -> None:
    names = {
        f"{data}_{setting}" for data in ("cifar10", "imagenet", "chexpert", "eyepacs") for setting in SETTINGS
    }
    assert set(RECIPES) == names - {"imagenet_in1k"}


STATUSES = {"verified", "recalled", "secondary", "computed"}
BELOW = {"cifar10": 1e-5, "imagenet": 8e-7, "chexpert": 1e-6, "eyepacs": 1e-5}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_row_says_where_it_is_from_and_how_sure_that_is(recipe: str) -> None:
    config, data = loading.load(f"leaderboard/{recipe}"), recipe.split("_")[0]
    reference, size = config.reference, sizes.of(config)
    assert {"paper", "table", "row", "epsilon", "delta", "status", "note", "accountant"} <= set(reference)
    assert config.privacy.target_epsilon == reference["epsilon"] == 8
    assert config.privacy.delta == reference["delta"] == BELOW[data]
    assert reference["status"] in STATUSES
    for claim in reference.get("claims", []):
        assert {"source", "accuracy", "accountant"} <= set(claim)
        assert (claim["status"], claim["epsilon"]) in (("verified", 8), ("secondary", 8))
    assert ("accuracy" in reference) == ("accuracy_status" in reference)
    assert size is not None, "planned without the data"
    assert size.train * config.privacy.delta < 1.1
    assert size.shape[1:] == ((32, 32) if recipe in ("cifar10_none", "cifar10_in1k") else (224, 224))
    assert config.model.init_from is None or "weights" in config.model.init_from


def test_a_plan_needs_neither_data_nor_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["check", "leaderboard/chexpert_none", "--json"]) == 0
    assert '"image_table, not read: 223414 examples of 3 x 224 x 224, 5 labels"' in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["central", "local"])
def test_the_physical_batch_is_tried_with_the_loss_of_the_task(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epsilon_takes_no_time: None
) -> None:
    root = written("chexpert", tmp_path / "data", monkeypatch)
    more = ["engine.physical_batch_size=auto", f"strategy={strategy}"]
    assert train(shrunk("chexpert_none", root, *more), tmp_path / "run")["physical_batch_size"] >= 1


def test_weights_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = written("eyepacs", tmp_path / "data", monkeypatch)
    with pytest.raises(InputError, match=r"model.init_from must be a safetensors .*resnetv2_50d_gn.ah_in1k"):
        train(shrunk("eyepacs_in1k", root), tmp_path / "run")


def test_a_run_predicts_images_of_a_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    epsilon_takes_no_time: None,
) -> None:
    root = written("eyepacs", tmp_path / "data", monkeypatch)
    train(shrunk("eyepacs_none", root), tmp_path / "run")
    capsys.readouterr()
    assert command(["predict", str(tmp_path / "run"), str(root / "eyepacs" / "test")]) == 0
    lines = capsys.readouterr().out.split("\n")[1:11]
    assert [line.split(",")[0] for line in lines][:2] == ["1_left.jpeg", "1_right.jpeg"]
    assert {line.split(",")[1] for line in lines} <= set("01234")
    (root / "eyepacs" / "test" / "0\x1b[31m.txt").write_text("no picture")
    (root / "eyepacs" / "test" / ".hidden").write_text("no picture")
    assert command(["predict", str(tmp_path / "run"), str(root / "eyepacs" / "test")]) == 0
    assert capsys.readouterr().out.split("\n")[1:11] == lines
    assert "left out: " in caplog.text
    assert "0\\x1b[31m.txt must be a readable image" in caplog.text
    (alone := tmp_path / "alone").mkdir()
    (alone / "a.txt").write_text("no picture")
    assert command(["predict", str(tmp_path / "run"), str(alone)]) == 2


@pytest.mark.parametrize("size", [32, 48])
def test_small_images_are_scaled_to_what_a_model_takes(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = files.cifar10(tmp_path, monkeypatch)
    config = loading.load("leaderboard/cifar10_dc2b", [f"data.root={root}", f"data.options.size={size}"])
    held, own = (
        load(config.data).train,
        load(loading.load("base", ["data.name=cifar10", f"data.root={root}"]).data),
    )
    assert held.inputs.shape == (20, size, size, 3)
    scaled = Image.fromarray(own.train.inputs[3]).resize((size, size), Image.Resampling.BILINEAR)
    assert np.array_equal(held.inputs[3], np.asarray(scaled))
    assert held.targets.tolist() == own.train.targets.tolist()
    with pytest.raises(InputError, match=r"data.options.size must be a positive"):
        load(loading.load("leaderboard/cifar10_dc2b", [f"data.root={root}", "data.options.size=-1"]).data)
