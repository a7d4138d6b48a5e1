"""Runs of every task: a federation equals one holder of everything; the result leads with its headline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedsim
from fedsim.config import Config
from fedsim.engine.experiment import prepare
from fedsim.run import Run
from fedsim.validate import InputError
from tests.conftest import final, small, train

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


class Looks(nn.Module):
    """Logits of the next token from the one before and the picture's colours."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(num_classes, 6), nn.Linear(6 + 3, num_classes)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        seen = images.mean((2, 3))[:, None].expand(-1, tokens.shape[1], -1)
        out: Tensor = self.head(torch.cat([self.read(tokens), seen], 2))
        return out

    def read(self, tokens: Tensor) -> Tensor:
        vectors: Tensor = self.embedding(tokens)
        return vectors


class Peeks(Looks):
    """The same, but it says a token by looking at it."""

    def read(self, tokens: Tensor) -> Tensor:
        vectors = super().read(tokens)
        return vectors + vectors.mean(1, keepdim=True)


def multi_label(count: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(count)
    inputs = rng.normal(size=(count, 4)).astype(np.float32)
    return inputs, (inputs[:, :3] > 0.3).astype(np.uint8)


def regression(count: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(count)
    inputs = rng.normal(size=(count, 4)).astype(np.float32)
    return inputs, 50 + 10 * inputs[:, :2] + rng.normal(size=(count, 2))


def language_modelling(count: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(count)
    inputs = rng.integers(0, VOCABULARY, (count, PLACES))
    targets = (inputs + 1) % VOCABULARY
    targets[::3, -2:] = -100
    return inputs, targets


def captioning(count: int) -> tuple[Any, Any]:
    """A colour and its word, then the end; some captions are empty, some cut."""
    rng = np.random.default_rng(count)
    word = rng.integers(0, 4, count)
    colours = np.array([[230, 0, 0], [0, 230, 0], [0, 0, 230], [230, 230, 230]])[word]
    images = np.repeat((colours + rng.integers(0, 20, (count, 3)))[:, None], 4 * 4, 1).astype(np.uint8)
    targets = np.full((count, PLACES), -100)
    targets[:, 0], targets[:, 1] = 3 + word, 2
    targets[::10] = -100
    targets[5::10] = 3 + word[5::10, None]
    return images.reshape(count, 4, 4, 3), targets


def striped(count: int) -> tuple[Any, Any]:
    """Pictures of one brightness, so that what is seen says what is hidden; classes that nobody looks at."""
    rng = np.random.default_rng(count)
    shade = rng.integers(0, 256, (count, 1, 1, 1))
    images = np.broadcast_to(shade, (count, 4, 4, 3)).astype(np.uint8)
    return np.ascontiguousarray(images), rng.integers(0, 2, count)


MASKED = (
    "model={name: masked_autoencoder, options: {size: pico, patch: 2, decoder_width: 16, decoder_depth: 1, "
    "decoder_heads: 2, own_scale: false}}"
)
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
    "captioning": (
        captioning,
        ["data.options={tokens: 8}", "model.name=tests.unit.test_task_runs:Looks"],
        "perplexity",
        ["token_accuracy"],
    ),
    "reconstruction": (
        striped,
        ["data.options={classes: 2}", MASKED],
        "squared_error",
        [],
    ),
}
FALLING = ("regression", "captioning", "reconstruction")
CAPTIONER = "model={name: captioner, options: {size: pico, patch: 2, decoder_depth: 1, places: 5}}"


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
    units = dict.fromkeys(("captioning", "reconstruction"), "")
    assert held["headline"]["higher_is_better"] is (name not in FALLING)
    assert held["headline"]["unit"] == {"regression": "years", **units}.get(name, "%")
    for score in (headline, *others, "loss"):
        assert many[score] == held[score] == pytest.approx(one[score], rel=1e-9)
        assert score not in held["sensitive"]
    assert bool(held["holder_scores"]) is (name == "reconstruction"), "whose data have classes"
    lines = [json.loads(line) for line in (tmp_path / "many" / "metrics.jsonl").read_text().splitlines()]
    assert [headline in line["public"] for line in lines] == [False, True, False, True]


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("name", TASKS)
def test_a_run_learns_its_task(name: str, tmp_path: Path) -> None:
    """Also where holders are skewed by what the task says; texts have nothing to skew by."""
    _, _, headline, _ = TASKS[name]
    count, rate = (80, 0.05) if name == "captioning" else (40, 0.2)
    learning = ["privacy.clip_norm=10", "privacy.noise_multiplier=0.01", f"optimizer.learning_rate={rate}"]
    without = ("language_modelling", "captioning", "reconstruction")
    scheme = "iid" if name in without else "dirichlet"
    steps = [f"train.steps={count}", f"train.eval_every={count}", f"federation.partition={scheme}"]
    result = train(config(name, tmp_path / "data", *learning, *steps), tmp_path / "run")
    score = result[headline]
    limit = {"regression": 4, "captioning": 2, "reconstruction": 0.1}.get(name, 0.8)
    said = f"{score}; chance: 14, 0.5, 1 / 7, 8 and 1 / 3"
    assert score < limit if name in FALLING else score > limit, said


# --- captions --------------------------------------------------------------------------------------------


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not look ahead"):
        prepare(config("captioning", tmp_path / "data", "model.name=tests.unit.test_task_runs:Peeks"))
    prepare(config("captioning", tmp_path / "data"))


def test_a_model_with_too_few_places_is_refused_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.options\.places must be at least the 5"):
        prepare(config("captioning", tmp_path / "data", CAPTIONER, "model.options.places=4"))


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("public_only", [False, True])
def test_odd_captions_are_counted_where_private_numbers_may_be(
    public_only: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = config("captioning", tmp_path / "data", "train.steps=1", f"monitor.public_only={public_only}")
    train(given, tmp_path / "run")
    held = json.loads((tmp_path / "run" / "result.json").read_text())
    counts = {"empty captions": 12, "captions cut": 12}
    assert held.get("noticed") == (None if public_only else counts)
    assert "noticed" in held["sensitive"]
    assert ("12 empty captions, 12 captions cut" in caplog.text) is (not public_only)


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("model", ["captioner", "tests.unit.test_task_runs:Looks"])
def test_a_run_writes_captions_and_exports(model: str, tmp_path: Path) -> None:
    """Greedily, as one token after the other by the whole model; padding after the end."""
    options = [] if model == "captioner" else [f"model={{name: {model}}}"]
    learning = [
        "privacy.clip_norm=10",
        "privacy.noise_multiplier=0.01",
        "train.steps=5",
        "train.eval_every=5",
    ]
    train(config("captioning", tmp_path / "data", *options, *learning), tmp_path / "run")
    run = Run(tmp_path / "run")
    images = np.load(tmp_path / "data" / "test_inputs.npy")[:7]
    said = run.predict(images)
    assert said.outputs.shape == (7, PLACES, 8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255 * 2 - 1
    exported = fedsim.export(run, tmp_path / "out")["program"]
    program = torch.export.load(exported).module()
    for row in range(7):
        read = [1]
        for place in range(PLACES):
            tokens = torch.tensor([[*read, *[0] * PLACES][:PLACES]])
            with torch.no_grad():
                logits = run.model(pixels[row : row + 1], tokens)
                outside = program(torch.from_numpy(images[row : row + 1]), {"tokens": tokens})
            torch.testing.assert_close(outside, logits, rtol=1e-9, atol=1e-9)
            token = 0 if 2 in read else int(logits[0, place].argmax())
            assert said.best[row, place] == token
            read.append(token)
