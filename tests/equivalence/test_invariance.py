"""Nothing about how the data or the work is spread changes the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import final, small, train, without_epsilon

STEPS = "train.steps=12"
MODEL = {"float32": "mlp", "float64": "small_cnn"}
VARIANTS = {
    "1 holder": ["federation.holders=1", "federation.nodes=1"],
    "1000 holders": ["federation.holders=1000", "data.train_examples=1000"],
    "1 node": ["federation.nodes=1"],
    "5 nodes": ["federation.nodes=5"],
    "5 nodes in waves of 2": ["federation.nodes=5", "federation.nodes_per_wave=2"],
    "shards": ["federation.partition=shards"],
    "power law": ["federation.partition=power_law"],
    "physical batch 7": ["engine.physical_batch_size=7"],
    "full physical batch": ["engine.physical_batch_size=4096"],
    "opacus": ["engine.gradients=opacus"],
    "vmap": ["engine.gradients=vmap"],
}


@pytest.fixture(scope="module", autouse=True)
def _epsilon_takes_no_time() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_epsilon(patch)
        yield


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], torch.Tensor]:
    out = {}
    for dtype in ("float32", "float64"):
        for examples in (400, 1000):
            folder = tmp_path_factory.mktemp("baseline")
            base = [STEPS, f"model.dtype={dtype}", f"model.name={MODEL[dtype]}"]
            train(small(*base, f"data.train_examples={examples}"), folder)
            out[dtype, examples] = final(folder)
    return out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_parameters(
    variant: str, dtype: str, baselines: dict[tuple[str, int], torch.Tensor], tmp_path: Path
) -> None:
    config = small(STEPS, f"model.dtype={dtype}", f"model.name={MODEL[dtype]}", *VARIANTS[variant])
    train(config, tmp_path)
    expected = baselines[dtype, config.data.train_examples or 0]
    tolerance = 1e-5 if dtype == "float32" else 1e-10
    assert torch.max(torch.abs(final(tmp_path) - expected)) <= tolerance


@pytest.mark.parametrize("change", ["seed=1", "privacy.clip_norm=0.51", "train.expected_batch_size=61"])
def test_what_defines_the_run_does_change_them(
    change: str, baselines: dict[tuple[str, int], torch.Tensor], tmp_path: Path
) -> None:
    train(small(STEPS, change), tmp_path)
    assert torch.max(torch.abs(final(tmp_path) - baselines["float32", 400])) > 1e-3


def test_views_are_keyed_by_example_not_by_batch(tmp_path: Path) -> None:
    views = ["train.augment_multiplicity=3", "train.augmentations=[mirror_pad_crop,flip]", "train.steps=4"]
    train(small(*views), tmp_path / "a")
    spread = ["federation.holders=40", "federation.nodes=4", "engine.physical_batch_size=10"]
    train(small(*views, *spread), tmp_path / "b")
    assert torch.max(torch.abs(final(tmp_path / "a") - final(tmp_path / "b"))) <= 1e-5


def test_offline_holders_follow_the_key_and_not_the_nodes(tmp_path: Path) -> None:
    offline = ["federation.availability=0.5", "train.steps=6"]
    train(small(*offline), tmp_path / "a")
    train(small(*offline, "federation.nodes=5"), tmp_path / "b")
    train(small("train.steps=6"), tmp_path / "all")
    assert torch.max(torch.abs(final(tmp_path / "a") - final(tmp_path / "b"))) <= 1e-5
    assert torch.max(torch.abs(final(tmp_path / "a") - final(tmp_path / "all"))) > 1e-3
