"""What a run takes as public stands in its result and in its plan; what an epsilon hides, beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import fedsim
from fedsim.cli import show
from fedsim.data.targets import Targets
from fedsim.engine.assumed import assumed_public
from fedsim.privacy import accountant, events
from fedsim.report import claim
from tests.conftest import small, train

RNG = np.random.default_rng(2)
RUN: dict[str, Any] = {
    "federation": {"holders": 2, "partition": "iid"},
    "privacy": {"noise_multiplier": 1.0},
    "train": {"steps": 1, "expected_batch_size": 10},
    "monitor": {"tensorboard": False, "progress": False},
}
ALWAYS = [
    "the number of training examples that are used, and of holders",
    "the test split, by which released models are judged",
]


def table(folder: Path, **more: Any) -> dict[str, Any]:
    for split in ("train", "test"):
        lines = [f"{x:.3f},{'a' if x > 0.5 else 'b'},{x * 2:.2f}" for x in RNG.random(20)]
        (folder / f"{split}.csv").write_text("\n".join(["age,ward,days", *lines]), encoding="utf-8")
    columns = {"numbers": {"age": [0, 1]}, "words": {"ward": ["a", "b"]}, "target": "days"}
    return {"name": "table", "root": str(folder), "options": {**columns, **more}}


def test_ranges_and_words_of_columns_and_the_test_split(tmp_path: Path) -> None:
    given = {"data": table(tmp_path, target_range=[0, 5]), "task": "regression", "model": "linear", **RUN}
    wanted = [
        *ALWAYS,
        "the form of the targets, as declared or listed: 1 value, with their names",
        "the declared ranges of age",
        "the declared words of ward",
        "the declared range of days",
    ]
    assert fedsim.check(**given)["assumed_public"] == wanted
    run = fedsim.train(**given, out=tmp_path / "run")
    assert run.result["assumed_public"] == wanted


def test_held_out_examples_are_no_public_test_split(tmp_path: Path) -> None:
    held = train(small("data.holdout_examples=50", "data.test_examples=50", "train.steps=1"), tmp_path / "a")
    assert not any("test split" in line for line in held["assumed_public"])
    assert "accuracy" in held["sensitive"]
    cap = "federation.examples_per_holder_at_most=7"
    capped = train(small(cap, "train.steps=1"), tmp_path / "b")["assumed_public"]
    assert any("at_most" in line for line in capped)
    assert any("test split" in line for line in capped)


def test_texts_features_and_weights_that_are_taken_as_public() -> None:
    for split in ("train", "test"):
        Path(f"{split}.csv").write_text("text,target\n" + "hallo welt,yes\nso nicht,no\n" * 10)
    text = {"name": "text", "root": ".", "options": {"classes": ["no", "yes"], "places": 4}}
    said = fedsim.check(data=text, model="bag_of_words", **RUN)["assumed_public"]
    assert "the vocabulary of 4096 tokens" in said
    features = small("data.features=scattering", "model.name=linear")
    said = assumed_public(features, Targets("class", 10))
    assert "the feature map scattering, and what it was made from" in said
    assert "the form of the targets, as declared or listed: 10 classes" in said
    begun = assumed_public(small("model.init_from=weights.safetensors"), Targets("class", 10))
    assert any("weights that training starts from" in line for line in begun)
    inputs, labels = RNG.normal(size=(30, 3)).astype(np.float32), RNG.integers(0, 2, 30)
    data = fedsim.Data((inputs, labels), (inputs, labels), classes=2)
    said = fedsim.check(data=data, model=nn.Linear(3, 2), **RUN)["assumed_public"]
    assert "the weights that the module from Python came with" in said


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("unit", "value", "relation", "meaning"),
    [
        ("example", 3.0, events.ADD_REMOVE, "hides whether one example took part"),
        ("example", 3.0, events.REPLACE, "hides which of two examples took part"),
        ("holder", 8.0, events.ADD_REMOVE, "hides whether a holder took part, with all its examples"),
        ("holder", 8.0, events.REPLACE, "hides which of two holders took part, with all their examples"),
        (
            "holder",
            101.0,
            events.ADD_REMOVE,
            "does not hide whether a holder took part, with all its examples",
        ),
        ("example", None, events.ADD_REMOVE, "does not hide whether one example took part"),
        ("example", float("inf"), events.ADD_REMOVE, "does not hide whether one example took part"),
    ],
)
def test_an_epsilon_says_what_it_hides(unit: str, value: float | None, relation: str, meaning: str) -> None:
    spent = {
        "unit": unit,
        "value": value,
        "relation": relation,
        "delta": 1e-5,
        "accountant": "pld",
        "note": "",
    }
    assert claim.meaning(spent) == meaning
    ((label, text),) = show.epsilons({unit: spent})
    assert label == f"epsilon per {unit}"
    assert text.splitlines()[1:] == [meaning]
    ((label, text),) = show.epsilons({f"{unit}_check": spent}, [f"epsilon.{unit}"])
    assert label == f"epsilon per {unit}, again"
    assert text.splitlines()[1:] == []
    assert "sensitive" in show.epsilons({unit: spent}, [f"epsilon.{unit}"])[0][1]


def test_what_hides_nobody_is_the_same_number_everywhere() -> None:
    assert claim.MEANINGLESS_ABOVE == accountant.MEANINGLESS_ABOVE
