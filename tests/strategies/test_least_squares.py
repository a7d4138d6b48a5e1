"""Least squares on noisy moments: the solution, where it comes from, and what does not go with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import linalg

from fedsim.config import Config
from fedsim.data.examples import normalise
from fedsim.engine.experiment import prepare
from fedsim.validate import InputError
from tests.conftest import small, train

LS = (
    "preset=dp_ls",
    "model.name=linear",
    "model.dtype=float64",
    "train.steps=1",
    "train.expected_batch_size=400",
    "optimizer.name=sgd",
    "optimizer.options={}",
    "optimizer.learning_rate=1.0",
)
RIDGE = "learner={name: least_squares, options: {ridge: RIDGE, centred: CENTRED}}"


def of(*overrides: str, ridge: float = 0.05, centred: bool = False) -> Config:
    learner = RIDGE.replace("RIDGE", str(ridge)).replace("CENTRED", str(centred).lower())
    return small(*LS, learner, *overrides)


def rows(config: Config, clip: float | None, bias: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Features with their constant, clipped, and one-hot classes."""
    data = prepare(config).splits.train
    inputs = normalise(data.inputs, data, torch.float64).flatten(1).numpy()
    x = np.concatenate([inputs, np.full((len(inputs), 1), bias)], axis=1)
    if clip is not None:
        x *= np.minimum(1.0, clip / np.linalg.norm(x, axis=1))[:, None]
    return x, np.eye(10)[data.targets]


def head(out: Path) -> tuple[np.ndarray, np.ndarray]:
    held = load_file(out / "final.safetensors")
    return held["head.weight"].numpy(), held["head.bias"].numpy()


@pytest.mark.parametrize("bias", [1.0, 3.0])
def test_without_noise_it_is_ridge_regression(bias: float, tmp_path: Path) -> None:
    """Against the regularised least-squares problem itself, solved by scipy, not by normal equations."""
    config = of(
        "strategy=nonprivate", "privacy.noise_multiplier=null", "privacy.clip_norm=1.0",
        f"query.options.bias={bias}",
    )  # fmt: skip
    train(config, tmp_path)
    x, targets = rows(config, None, bias)
    root = np.sqrt(0.05 * 400)
    stacked = np.concatenate([x, root * np.eye(x.shape[1])])
    wanted, *_ = linalg.lstsq(stacked, np.concatenate([targets, np.zeros((x.shape[1], 10))]))
    weight, bias_found = head(tmp_path)
    assert np.abs(weight - wanted[:-1].T).max() < 1e-6
    assert np.abs(bias_found - bias * wanted[-1]).max() < 1e-6


def test_with_class_weights_it_is_one_against_all_others(tmp_path: Path) -> None:
    """sum over class l of (w.x - 1)^2 + alpha * sum over all of (w.x)^2 + r |w|^2, by scipy."""
    options = "{ridge: 0.05, centred: false, alpha: 0.7}"
    config = small(
        *LS, "strategy=nonprivate", "privacy.noise_multiplier=null", "privacy.clip_norm=1.0",
        f"learner={{name: least_squares, options: {options}}}", "query.options.per_class=true",
    )  # fmt: skip
    train(config, tmp_path)
    x, hot = rows(config, None)
    weight, bias = head(tmp_path)
    for label in range(10):
        own = x[hot[:, label] == 1]
        stacked = np.concatenate([own, 0.7**0.5 * x, (0.05 * 400) ** 0.5 * np.eye(x.shape[1])])
        right = np.concatenate([np.ones(len(own)), np.zeros(len(stacked) - len(own))])
        wanted, *_ = linalg.lstsq(stacked, right)
        assert np.abs(weight[label] - wanted[:-1]).max() < 1e-6
        assert abs(bias[label] - wanted[-1]) < 1e-6


def test_clipped_rows_and_every_step_count(tmp_path: Path) -> None:
    """Two whole passes of two steps: the mean moments of rows of norm 5, everybody twice; no noise to see."""
    half = ["sampler=passes", "train.expected_batch_size=200", "train.steps=4"]
    config = of(*half, "privacy.clip_norm=5", "privacy.noise_multiplier=1e-12")
    train(config, tmp_path)
    x, targets = rows(config, 5.0)
    second, first = x.T @ x / 400, targets.T @ x / 400
    wanted = linalg.solve(second + 0.05 * np.eye(x.shape[1]), first.T)
    assert np.abs(head(tmp_path)[0] - wanted[:-1].T).max() < 1e-6
    loose, _ = rows(config, None)
    assert np.abs(loose - x).max() > 0.1, "the clip matters"


@pytest.mark.parametrize("holders", [1, 10, 400])
def test_it_does_not_depend_on_the_partition(holders: int, tmp_path: Path) -> None:
    noise = "privacy.noise_multiplier=0.5"
    train(of(noise), tmp_path / "ten")
    other = [
        f"federation.holders={holders}",
        f"federation.nodes={min(3, holders)}",
        "federation.partition=iid",
    ]
    train(of(noise, *other), tmp_path / "other")
    for one, two in zip(head(tmp_path / "ten"), head(tmp_path / "other"), strict=True):
        assert np.abs(one - two).max() < 1e-8


def test_shares_add_what_central_trust_adds(tmp_path: Path) -> None:
    """What integers cannot hold of float64 is below 1e-6 of it; noise too small to see."""
    quiet = ["privacy.noise_multiplier=1e-9", "privacy.clip_norm=5"]
    train(of(*quiet), tmp_path / "central")
    train(of(*quiet, "strategy=shares", "federation.nodes=3"), tmp_path / "shares")
    for one, two in zip(head(tmp_path / "central"), head(tmp_path / "shares"), strict=True):
        assert np.abs(one - two).max() < 1e-6


def test_centred_targets_change_no_decision(tmp_path: Path) -> None:
    scores = []
    for centred in (False, True):
        out = tmp_path / str(centred)
        config = of("privacy.noise_multiplier=0.01", "privacy.clip_norm=10", centred=centred)
        train(config, out)
        weight, bias = head(out)
        x, _ = rows(config, None)
        scores.append(x[:, :-1] @ weight.T + bias)
    assert (scores[0].argmax(1) == scores[1].argmax(1)).all()
    assert np.abs(scores[1].mean(1)).max() < 1e-9 < np.abs(scores[0].mean(1)).max()


def test_local_noise_is_known_to_the_learner() -> None:
    """It is what denoising and ridge follow from: ten holders add ten times the variance."""
    central, local = (prepare(of(axis)).mechanism for axis in ("strategy=central", "strategy=local"))
    for name in ("second", "first"):
        one = central.stds_of_sums(central.release())[name]
        assert local.stds_of_sums(local.release())[name] == pytest.approx(one * 10**0.5)


def test_a_large_epsilon_and_a_small_one_both_give_numbers(tmp_path: Path) -> None:
    """With the ridge from the noise: a matrix lost in it still gives finite weights, and less of them."""
    lengths = []
    for sigma in (0.01, 100.0):
        config = small(*LS, f"privacy.noise_multiplier={sigma}", "privacy.clip_norm=10")
        train(config, tmp_path / str(sigma))
        weight, _ = head(tmp_path / str(sigma))
        assert np.isfinite(weight).all()
        lengths.append(np.linalg.norm(weight))
    assert lengths[1] < lengths[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=mlp"], "one linear layer.*model.name=linear"),
        (["privacy.clipping=normalised"], "clips rows of features flat"),
        (["train.augmentations=[flip]"], "query = moments does not read it"),
        (["optimizer.learning_rate=0.5"], "learner = least_squares does not read it"),
        (["learner=optimizer"], "learner=optimizer needs sum, but query=moments gives first, second"),
        (["query=gradient", RIDGE.replace("RIDGE", "1.0").replace("CENTRED", "true")], "needs second, first"),
        (["query.options.second_share=1.5"], "second_share must be between"),
        (["query.options.bias=-1"], "bias must be between"),
        (["query.options.per_class=true"], "second moments of every class are for alpha"),
        (
            ["learner={name: least_squares, options: {alpha: 1.0}}"],
            "second moments of every class are for alpha",
        ),
        (["learner={name: least_squares, options: {ridge: 0.0}}"], "ridge must be a positive"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(small(*LS, *overrides))
