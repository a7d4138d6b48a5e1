"""Sample captions with their pictures: what the model says, to whom it may be shown (budget 15 s)."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedsim.data.examples import ArrayDataset
from fedsim.data.targets import END, IGNORED, Targets
from fedsim.engine.board import _cell
from fedsim.engine.samples import FEW, samples_of
from fedsim.report.samples import page
from fedsim.run import Run
from fedsim.study import probe
from fedsim.tasks.captioning import Captioning
from fedsim.tasks.classification import Classification
from fedsim.types import Sample
from fedsim.visibility import Public, Sensitive
from tests.conftest import train
from tests.unit.test_task_runs import CAPTIONER, config

RNG = np.random.default_rng(2)
WORDS = ("<pad>", "<begin>", "<end>", "<unknown>", "\u2581a", "\u2581dog", "\u2581ca", "t")


class Says(torch.nn.Module):
    """Says the token that the picture's first pixel names, then the end."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        word = (images[:, 0, 0, 0] * 0.5 + 0.5).mul(255).round().long()
        logits = torch.zeros(*tokens.shape, len(WORDS), dtype=torch.float64)
        logits[torch.arange(len(images)), 0, word] = 1.0
        logits[:, 1:, END] = 1.0
        return logits + self.one


def data(count: int = 9, seed: int = 0) -> ArrayDataset:
    rng = np.random.default_rng(seed)
    images = np.zeros((count, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = 4 + np.arange(count) % 4
    targets = np.full((count, 5), IGNORED)
    targets[:, 0], targets[:, 1] = rng.integers(4, 8, count), END
    targets[3] = [4, 6, 7, END, IGNORED]
    targets[4] = IGNORED
    half = (0.5, 0.5, 0.5)
    return ArrayDataset("some", images, targets, None, Targets("tokens", 8, WORDS), half, half)


def test_samples_are_what_the_model_says_of_the_first_pictures() -> None:
    """Also of a picture whose caption is empty, and whatever the captions are."""
    held = data()
    found = samples_of(Says(), Captioning(), held, torch.float64, held_out=False)
    assert isinstance(found, Public)
    assert [sample.said for sample in found.value] == ["a", "dog", "ca", "t", "a", "dog"][:FEW]
    assert found.value[3].own == "a cat"
    assert found.value[4].own == ""
    for row, sample in enumerate(found.value):
        np.testing.assert_array_equal(sample.image, held.read(slice(None))[0][row])
    others = samples_of(Says(), Captioning(), data(seed=1), torch.float64, held_out=True)
    assert isinstance(others, Sensitive)
    assert [s.said for s in others.value] == [s.said for s in found.value]
    assert [s.own for s in others.value] != [s.own for s in found.value]


def test_a_task_that_says_nothing_in_words_has_none() -> None:
    held = data()
    classes = ArrayDataset(
        "some", held.inputs, np.zeros(9, int), None, Targets("class", 4), held.mean, held.std
    )
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    assert samples_of(model, Classification(), classes, torch.float32, held_out=False) is None


def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), {"images": 0, "tensors": 0}).Reload()


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize(("held_out", "public_only"), [(False, True), (True, False), (True, True)])
def test_samples_are_written_as_the_scores_are(held_out: bool, public_only: bool, tmp_path: Path) -> None:
    """Of test data always; of held-out training examples where private numbers may be."""
    overrides = ["monitor.tensorboard=true", f"monitor.public_only={public_only}", CAPTIONER]
    overrides += ["data.holdout_examples=20"] if held_out else []
    train(config("captioning", tmp_path / "data", *overrides), tmp_path / "run")
    events = events_of(tmp_path / "run")
    tags = [tag for tag in (*events.Tags()["images"], *events.Tags()["tensors"]) if "samples" in tag]
    kind = "sensitive" if held_out else "public"
    pictures = [f"{kind}/samples/{number}" for number in range(FEW)]
    expected = sorted([*pictures, f"{kind}/samples/text_summary"])
    assert sorted(tags) == ([] if held_out and public_only else expected)
    if not tags:
        return
    assert [event.step for event in events.Images(pictures[0])] == [2, 4], "wherever it is evaluated"
    assert (events.Images(pictures[0])[0].width, events.Images(pictures[0])[0].height) == (4, 4)
    table = events.Tensors(f"{kind}/samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    run = Run(tmp_path / "run")
    if not held_out:
        images = np.load(tmp_path / "data" / "test_inputs.npy")[:FEW]
        said = Captioning().targets_in_words(run.predict(images).best, run.card.targets)
        targets = np.load(tmp_path / "data" / "test_targets.npy")[:FEW]
        own = Captioning().targets_in_words(targets, run.card.targets)
        lines = [f"| {n} | {a or '-'} | {b or '-'} |" for n, (a, b) in enumerate(zip(said, own, strict=True))]
        assert table.splitlines()[2:] == lines


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize(("held_out", "public_only"), [(False, True), (True, False), (True, True)])
def test_the_page_of_a_run_shows_its_last_samples(held_out: bool, public_only: bool, tmp_path: Path) -> None:
    """Of test data; of held-out training examples only where private numbers may be, and then it says so."""
    given = [f"monitor.public_only={public_only}", *(["data.holdout_examples=20"] if held_out else [])]
    train(config("captioning", tmp_path / "data", *given), tmp_path / "run")
    path = tmp_path / "run" / "samples.html"
    assert path.exists() is not (held_out and public_only)
    if not path.exists():
        return
    content = path.read_text()
    assert "Samples after 4 steps" in content
    assert ("not to be published" in content) is held_out
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", content)
    assert len(pictures) == FEW
    if not held_out:
        expected = np.load(tmp_path / "data" / "test_inputs.npy")
        for picture, image in zip(pictures, expected, strict=False):
            found = Image.open(io.BytesIO(base64.b64decode(picture)))
            np.testing.assert_array_equal(np.asarray(found), image)


def test_a_page_shows_words_as_they_are() -> None:
    sample = Sample(np.zeros((4, 2, 1), np.uint8), "<b>a dog", "a & b")
    content = page(3, [sample, Sample(sample.image, "", "x")], public=True)
    assert "<td>&lt;b&gt;a dog</td><td>a &amp; b</td>" in content
    assert "<td>-</td><td>x</td>" in content
    assert 'width="80" height="160"' in content


def test_words_do_not_leave_their_cell() -> None:
    assert _cell("a | b\n<b>*c*") == r"a \| b \<b\>\*c\*"
    assert _cell(" ") == "-"


@pytest.mark.usefixtures("epsilon_takes_no_time")
def test_who_brings_a_writer_gets_samples(tmp_path: Path) -> None:
    given = [f"monitor.writers=[{json.dumps('tests.unit.test_samples:Keeps')}]", "monitor.public_only=true"]
    train(config("captioning", tmp_path / "data", *given), tmp_path / "run")
    assert [record.samples is not None for record in Keeps.records] == [False, True, False, True]


class Keeps:
    """A writer of records."""

    records: list[Any] = []  # noqa: RUF012

    def write(self, record: Any) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


class Blinks(ArrayDataset):
    """Every other picture cannot be decoded."""

    def read(self, rows: Any, workers: int | None = None) -> Any:
        found, _ = super().read(rows)
        there = np.arange(len(self))[rows] % 2 == 0
        return found, None if there.all() else there


def test_pictures_that_cannot_be_decoded_are_no_samples_and_not_told_apart() -> None:
    held = data(8)
    some = Blinks("some", held.inputs, held.targets, None, held.declared, held.mean, held.std)
    found = samples_of(Says(), Captioning(), some, torch.float64, held_out=False)
    assert found is not None
    assert [sample.said for sample in found.value] == ["a", "ca", "a"]
    assert [sample.own for sample in found.value][2] == ""
    apart = probe.told_apart(Says(), some, among=2)
    assert apart["pictures"] == 3.0, "rows 0, 2, 6: row 4 has no caption"
