"""Runs of every task: a federation equals one holder of everything; the result leads with its headline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim.config import Config
from tests.conftest import final, small, train

RNG = np.random.default_rng(9)
SIZES = {"train": 120, "test": 40}
VOCABULARY, PLACES = 7, 5


class Bigrams(nn.Module):
    """Logits of the next token from the one before."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(num_classes, 6), nn.Linear(6, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(tokens))
        return out


def multi_label(count: int) -> tuple[Any, Any]:
    inputs = RNG.normal(size=(count, 4)).astype(np.float32)
    return inputs, (inputs[:, :3] > 0.3).astype(np.uint8)


def regression(count: int) -> tuple[Any, Any]:
    inputs = RNG.normal(size=(count, 4)).astype(np.float32)
    return inputs, 50 + 10 * inputs[:, :2] + RNG.normal(size=(count, 2))


def language_modelling(count: int) -> tuple[Any, Any]:
    inputs = RNG.integers(0, VOCABULARY, (count, PLACES))
    targets = (inputs + 1) % VOCABULARY
    targets[::3, -2:] = -100
    return inputs, targets


TASKS: dict[str, tuple[Any, list[str], str, list[str]]] = {
    "multi_label": (
        multi_label,
        ["data.options.labels=3", "model.name=linear"],
        "auc",
        ["label_accuracy", "exact_match"],
    ),
    "regression": (
        regression,
        ["data.options.values=2", "model.name=linear", "task.options={center: 50, scale: 10, unit: years}"],
        "rmse",
        ["mae"],
    ),
    "language_modelling": (
        language_modelling,
        ["data.options={tokens: 7, vocabulary: 7}", "model.name=tests.unit.test_task_runs:Bigrams"],
        "token_accuracy",
        [],
    ),
}


def config(name: str, root: Path, *overrides: str) -> Config:
    make, settings, _, _ = TASKS[name]
    if not root.exists():
        root.mkdir()
        for split, count in SIZES.items():
            for kind, values in zip(("inputs", "targets"), make(count), strict=True):
                np.save(root / f"{split}_{kind}.npy", values)
    return small(
        *(f"task={name}", "data.name=arrays", f"data.root={root}", *settings, "model.dtype=float64"),
        *("data.train_examples=null", "data.test_examples=null", "federation.partition=iid"),
        *("train.steps=4", "train.eval_every=2", "privacy.noise_multiplier=0.1", *overrides),
    )


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("name", TASKS)
def test_a_federation_equals_one_holder_of_everything(name: str, tmp_path: Path) -> None:
    _, _, headline, others = TASKS[name]
    many = train(config(name, tmp_path / "data"), tmp_path / "many")
    one = train(
        config(name, tmp_path / "data", "federation.holders=1", "federation.nodes=1"), tmp_path / "one"
    )
    torch.testing.assert_close(final(tmp_path / "many"), final(tmp_path / "one"), rtol=0, atol=1e-12)
    held = json.loads((tmp_path / "many" / "result.json").read_text())
    assert held["task"] == name
    assert held["headline"]["name"] == headline
    assert held["headline"]["higher_is_better"] is (name != "regression")
    assert held["headline"]["unit"] == ("years" if name == "regression" else "%")
    for score in (headline, *others, "loss"):
        assert many[score] == held[score] == pytest.approx(one[score], rel=1e-9)
        assert score not in held["sensitive"]
    assert held["holder_scores"] == {}
    lines = [json.loads(line) for line in (tmp_path / "many" / "metrics.jsonl").read_text().splitlines()]
    assert [headline in line["public"] for line in lines] == [False, True, False, True]


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("name", TASKS)
def test_a_run_learns_its_task(name: str, tmp_path: Path) -> None:
    """Also where holders are skewed by what the task says; texts have nothing to skew by."""
    _, _, headline, _ = TASKS[name]
    learning = ["privacy.clip_norm=10", "privacy.noise_multiplier=0.01", "optimizer.learning_rate=0.2"]
    scheme = "iid" if name == "language_modelling" else "dirichlet"
    steps = ["train.steps=40", "train.eval_every=40", f"federation.partition={scheme}"]
    result = train(config(name, tmp_path / "data", *learning, *steps), tmp_path / "run")
    score = result[headline]
    assert score < 4 if name == "regression" else score > 0.8, "chance: 14, 0.5 and 1 / 7"
