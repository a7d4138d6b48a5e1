"""Features without real data: random images, an encoder they taught, features of one image alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import seeds
from fedsim.data import features, random_images, random_prior, random_prior_training
from fedsim.merging import Choice
from fedsim.validate import InputError


def _images(count: int, edge: int = 28, key: int = 1) -> Tensor:
    return random_images.draw(count, edge, edge, seeds.torch_stream(7, "test images", key))


def test_images_of_random_processes_are_varied_and_the_same_everywhere() -> None:
    images = _images(200)
    assert images.shape == (200, 1, 28, 28)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images, _images(200))
    assert not torch.equal(images, _images(200, key=2))
    assert 0.2 < images.std((1, 2, 3)).gt(0.1).float().mean() <= 1, "something is drawn"
    apart = (images[:100] - images[100:]).abs().mean((1, 2, 3))
    assert apart.min() > 0.01, "no two alike"
    assert random_images.draw(3, 8, 20, seeds.torch_stream(0, "x")).shape == (3, 1, 8, 20)


def test_a_view_shows_the_same_image_and_not_the_same_pixels() -> None:
    images = _images(64)
    first = random_prior_training.views(images, seeds.torch_stream(1, "views"))
    assert first.shape == images.shape
    assert (first - images).abs().mean((1, 2, 3)).min() > 0.01
    assert torch.equal(first, random_prior_training.views(images, seeds.torch_stream(1, "views")))


def test_the_loss_is_the_cross_entropy_of_finding_the_other_view() -> None:
    """Against the sum written out, one embedding at a time."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    both = torch.cat([first, second])
    both = both / both.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(10):
        others = [j for j in range(10) if j != i]
        weights = {j: math.exp(float(both[i] @ both[j]) / random_prior_training.TEMPERATURE) for j in others}
        total -= math.log(weights[(i + 5) % 10] / sum(weights.values()))
    assert float(random_prior_training.loss(first, second)) == pytest.approx(total / 10)


def test_training_gives_the_same_weights_again_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_prior_training, "BATCH", 16)
    first, second = (random_prior_training.train(3, every=10).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    drawn = random_prior.Encoder().state_dict()
    assert {name: v.shape for name, v in first.items()} == {name: v.shape for name, v in drawn.items()}


def test_the_shipped_encoder_finds_the_other_view_of_images_it_never_saw() -> None:
    images = _images(200)
    pairs = [random_prior_training.views(images, seeds.torch_stream(k, "views")) for k in range(2)]
    torch.manual_seed(0)
    found = []
    for encoder in (random_prior.network(), random_prior.Encoder().eval()):
        with torch.no_grad():
            own, other = (encoder(pair) for pair in pairs)
            own, other = (part - part.mean(0) for part in (own, other))
            near = torch.nn.functional.normalize(own) @ torch.nn.functional.normalize(other).t()
        found.append(float((near.argmax(1) == torch.arange(200)).float().mean()))
    trained, untrained = found
    assert trained > 0.15 > 2 * untrained
    assert random_prior.WEIGHTS.stat().st_size < 2e6


@pytest.mark.parametrize("scattering", [False, True])
def test_features_are_those_of_one_image_whitened_by_public_ones(
    scattering: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_prior, "WHITENING_IMAGES", 40)
    random_prior._whitening.cache_clear()
    images = (255 * _images(70)).to(torch.uint8).movedim(1, -1).numpy()
    together = np.concatenate(list(random_prior.compute(images, scattering)))
    assert together.shape == (70, *random_prior.output_shape((28, 28, 1), scattering))
    alone = np.concatenate(list(random_prior.compute(images[32:64], scattering)))
    assert np.allclose(alone, together[32:64], atol=2e-4), "whatever images are beside it"
    raw = torch.cat(list(random_prior._features(images, scattering)))
    assert np.linalg.norm(together, axis=1).mean() < raw.norm(dim=1).mean(), "whitening shortens"
    encoded = raw[:, -random_prior.WIDTH :]
    for part in encoded.split([16 * channels for channels in random_prior.CHANNELS[1:]], 1):
        assert torch.allclose(part.mean(1), torch.zeros(70), atol=1e-4)
        assert torch.allclose(part.std(1), torch.ones(70), atol=1e-2)
    random_prior._whitening.cache_clear()


def test_the_name_of_a_features_file_says_which_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = random_prior.version(True), random_prior.version(False)
    assert before[0] != before[1]
    other = tmp_path / "other.safetensors"
    other.write_bytes(random_prior.WEIGHTS.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(random_prior, "WEIGHTS", other)
    assert random_prior.version(True) != before[0]


@pytest.mark.parametrize("shape", [(28, 28, 3), (7, 28, 1)])
def test_images_it_cannot_take_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="grey images of at least 8 x 8"):
        features.of_images(Choice("random_prior"), np.zeros((4, *shape), np.uint8))
