"""Probes of encoders: heads at their minimum, few of every class, captions told apart (budget: 20 s)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim import loading, models
from fedsim.data.examples import ArrayDataset
from fedsim.data.targets import END, IGNORED, Targets
from fedsim.models.captioner import Captioner
from fedsim.run import Run
from fedsim.study import probe
from fedsim.validate import InputError
from tests.conftest import command, small, train

RNG = np.random.default_rng(5)


def clusters(count: int, classes: int = 3, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    labels = RNG.integers(0, classes, count)
    centres = np.eye(classes, 6) * 4
    return torch.from_numpy(centres[labels] + spread * RNG.normal(size=(count, 6))), torch.from_numpy(labels)


def test_a_head_is_at_the_minimum_of_its_loss() -> None:
    """The gradient, written out, is zero; another decay has another head."""
    inputs, labels = clusters(60)
    for decay in (1e-3, 1e-1):
        head = probe.fitted_head(inputs, labels, 3, decay)
        chances = (inputs @ head[:-1] + head[-1]).softmax(1)
        off = chances - torch.eye(3, dtype=torch.float64)[labels]
        slope = inputs.t() @ off / 60 + decay * head[:-1]
        assert float(slope.abs().max()) < 1e-5
        assert float(off.mean(0).abs().max()) < 1e-5
    assert float((probe.fitted_head(inputs, labels, 3, 1e-3) - head).abs().max()) > 0.1


def test_scales_come_from_the_training_examples_alone() -> None:
    first, second = torch.randn(50, 4).double() * 5 + 3, torch.randn(20, 4).double()
    one, other = probe.standardised(first, second)
    torch.testing.assert_close(one.mean(0), torch.zeros(4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(one.std(0), torch.ones(4).double())
    torch.testing.assert_close(other * first.std(0) + first.mean(0), second)


def test_few_shots_are_so_many_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, labels = clusters(90)
    seen: list[Tensor] = []
    plain = probe.fitted_head

    def watched(inputs: Tensor, labels: Tensor, classes: int, decay: float) -> Tensor:
        seen.append(labels)
        return plain(inputs, labels, classes, decay)

    monkeypatch.setattr(probe, "fitted_head", watched)
    scores = [probe.few_shot(inputs, inputs, labels, labels, 3, 4, draw) for draw in (0, 0, 1)]
    assert all(torch.bincount(labels).tolist() == [4, 4, 4] for labels in seen)
    assert scores[0] == scores[1]
    assert min(scores) > 0.8
    with pytest.raises(InputError, match="class 2 has"):
        probe.few_shot(inputs, inputs, labels % 2, labels, 3, 1, 0)


def test_a_linear_probe_sees_no_test_label() -> None:
    """It learns what is there, and nothing where labels were dealt out at random."""
    inputs, labels = clusters(300, spread=0.5)
    test, wanted = clusters(200, spread=0.5)
    assert probe.linear(inputs, test, labels, wanted, 3) > 0.95
    dealt = labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert probe.linear(inputs, test, dealt, wanted, 3) < 0.6


class Knows(nn.Module):
    """Says the token that the brightness of the picture stands for, or anything."""

    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.scale, self.knows = nn.Parameter(torch.ones(())), knows

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        token = 3 + torch.round((images.mean((1, 2, 3)) + 1) / 2 * 255 / 10).long()
        said = nn.functional.one_hot(token, 20).double()[:, None].expand(-1, tokens.shape[1], -1)
        return self.scale * said * (5.0 if self.knows else 0.0)


def captioned(count: int = 60) -> ArrayDataset:
    word = RNG.integers(0, 12, count)
    images = np.repeat(word * 10, 4 * 4 * 3).astype(np.uint8).reshape(count, 4, 4, 3)
    targets = np.full((count, 3), IGNORED)
    targets[:, 0], targets[:, 1] = 3 + word, END
    targets[::7] = IGNORED
    half = (0.5, 0.5, 0.5)
    return ArrayDataset("some", images, targets, None, Targets("tokens", 20), half, half)


def test_captions_are_told_apart_by_who_knows_and_never_by_a_tie() -> None:
    data = captioned()
    found = probe.told_apart(Knows(True), data, among=4)
    assert found["right"] == 1.0
    assert found["chance"] == 0.25
    assert found["pictures"] == int((data.targets != IGNORED).any(1).sum())
    assert probe.told_apart(Knows(False), data, among=4)["right"] == 0.0
    with pytest.raises(InputError, match="different captions"):
        probe.told_apart(Knows(True), data, among=13)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("probed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSIM_CACHE", str(folder / "cache"))
        quiet = ["monitor.progress=false", "monitor.tensorboard=false"]
        train(loading.load("dpcap2024/smoke", quiet), folder / "run")
    return Run(folder / "run")


def test_pictures_of_any_size_come_as_the_run_saw_its_own(run: Run) -> None:
    features = probe.features_of(run, probe.encoder_of(run))
    images = RNG.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        expected = probe.encoder_of(run).encode(inputs).mean(1).double()
    torch.testing.assert_close(features(images), expected, rtol=1e-5, atol=1e-6)
    grey = images[..., :1]
    torch.testing.assert_close(features(grey), features(np.repeat(grey, 3, 3)))
    assert features(RNG.integers(0, 256, (2, 28, 30, 1)).astype(np.uint8)).shape == (2, 64)
    card = run.card
    drawn = models.build(card.model, card.example_shape, card.outputs, 0).eval()
    assert isinstance(drawn, Captioner)
    assert float((probe.features_of(run, drawn)(images) - expected).abs().max()) > 1e-3


def test_the_command_prints_probes_and_captions(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(run.folder.parent / "cache"))
    some = ["data.train_examples=150", "data.test_examples=60"]
    assert command(["probe", str(run.folder), *some, "--shots", "2", "--draws", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: {head: len(v) for head, v in of.items()} for name, of in found.items()} == {
        "encoder": {"linear": 1, "2 shot": 2},
        "drawn": {"linear": 2, "2 shot": 2},
        "pixels": {"linear": 1, "2 shot": 2},
    }
    assert found["pixels"]["linear"][0] > 0.5, "chance is 0.1"
    assert command(["probe", str(run.folder), "--captions", "--among", "5"]) == 0
    assert "the likeliest of 5" in capsys.readouterr().out
    assert command(["probe", str(run.folder), "data.test_examples=9", "--captions"]) == 2
    assert "no settings of data" in capsys.readouterr().err
    assert command(["probe", str(run.folder), *some, "--shots", "999", "--draws", "1"]) == 2
    assert "(--shots) need 999" in capsys.readouterr().err


def test_what_has_no_captioner_or_no_classes_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pictures with classes"):
        probe.probes(run, captioned(), captioned())
    train(small("train.steps=1"), tmp_path / "other")
    with pytest.raises(InputError, match="must hold a captioner"):
        probe.encoder_of(Run(tmp_path / "other"))
