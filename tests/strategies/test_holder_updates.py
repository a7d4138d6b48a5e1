"""Holder updates: the same clipped updates under every trust model and noise that takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsim.config import Config
from fedsim.engine.experiment import epsilons, prepare
from fedsim.visibility import shown
from tests.conftest import final, small, train

CLIPPED = ("query=holder_update", "privacy.clip_norm=0.02", "privacy.noise_multiplier=1e-9")
QUIET = ("model.name=linear", "model.dtype=float64", "train.expected_batch_size=200", "train.steps=4")


def of(*axes: str) -> Config:
    return small(*CLIPPED, *QUIET, *axes)


OTHERS = {
    "shares": ("strategy=shares", "sampler=passes"),
    "tree": ("sampler=passes", "noise=tree"),
    "nodes": ("sampler=passes", "federation.nodes=5"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_trust_model_and_noise_adds_the_same_clipped_updates(name: str, tmp_path: Path) -> None:
    """What integers cannot hold of float64 is below 1e-7."""
    result = train(of("sampler=passes"), tmp_path / "central")
    train(of(*OTHERS[name]), tmp_path / name)
    assert torch.max(torch.abs(final(tmp_path / name) - final(tmp_path / "central"))) < 1e-7
    loose = small("query=holder_update", *QUIET, "sampler=passes", "privacy.noise_multiplier=1e-14",
                  "privacy.clip_norm=1e4")  # fmt: skip
    train(loose, tmp_path / "loose")
    assert torch.max(torch.abs(final(tmp_path / "loose") - final(tmp_path / "central"))) > 1e-3, "it clips"
    assert result["trust"]["unit"] == "holder"


def test_banded_noise_adds_the_same_updates_on_its_own_draws(tmp_path: Path) -> None:
    cyclic = "sampler={name: cyclic, options: {groups: 2}}"
    train(of(cyclic), tmp_path / "independent")
    train(of(cyclic, "noise=banded"), tmp_path / "banded")
    assert torch.max(torch.abs(final(tmp_path / "banded") - final(tmp_path / "independent"))) < 1e-7


@pytest.mark.parametrize("axes", [("strategy=shares",), ("sampler=passes", "noise=tree")])
def test_both_units_are_stated(axes: tuple[str, ...]) -> None:
    config = small("query=holder_update", "train.expected_batch_size=200", *axes)
    mechanism = prepare(config).mechanism
    spent = shown(epsilons(mechanism, 6, config), public_only=False)
    assert spent["holder"].unit == "holder"
    assert spent["example"].value > spent["holder"].value
    assert mechanism.divisor == pytest.approx(5.0), "half of ten holders"
