"""Features of the public network: the weights work, and an image's features are its own (budget: 20 s)."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from fedsim.config import DataConfig
from fedsim.data import backbone, datasets, features, silhouettes
from fedsim.data.feature_maps import FEATURES
from fedsim.merging import Choice
from fedsim.validate import InputError

MILITARY_UNIFORM = 652  # in the usual order of ImageNet's classes


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return np.array(datasets.load(DataConfig(test_examples=80)).test.inputs)


@pytest.fixture(scope="module")
def computed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.concatenate(list(backbone.compute(images)))


def test_the_network_recognises_a_photograph() -> None:
    """Grace Hopper in uniform, the picture matplotlib brings along; wrong padding or norms lose it."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    picture = Image.open(path).resize((224, 224))
    inputs = (torch.from_numpy(np.array(picture)).movedim(-1, 0).float()[None] - 127) / 128
    network = backbone.published()
    with torch.no_grad():
        chances = F.softmax(network(inputs), 1)[0]
    assert int(chances.argmax()) == MILITARY_UNIFORM
    assert chances.max() > 0.4
    assert sum(p.numel() for p in network.parameters()) == 4_652_008


def test_features_depend_on_the_image_alone(images: NDArray[np.uint8], computed: NDArray[np.float32]) -> None:
    alone = np.concatenate(list(backbone.compute(images[60:70])))
    np.testing.assert_allclose(alone, computed[60:70], atol=1e-4)
    assert computed.shape == (80, backbone.WIDTH)


def test_features_are_whitened_without_looking_at_the_images(
    images: NDArray[np.uint8], computed: NDArray[np.float32]
) -> None:
    shapes = np.concatenate(list(backbone.compute(silhouettes.draw(28, 28, 1))))
    np.testing.assert_allclose(shapes.mean(0), 0, atol=1e-4)
    before = torch.cat(list(backbone._features(backbone.published(), images))).numpy()
    shared = [np.square(rows.mean(0)).sum() / np.square(rows).sum(1).mean() for rows in (before, computed)]
    assert shared[1] < 0.7 * shared[0]


def test_colour_and_grey_images_give_the_same_where_they_are_the_same(images: NDArray[np.uint8]) -> None:
    network = backbone.published()
    grey = next(backbone._features(network, images[:4]))
    colour = next(backbone._features(network, np.repeat(images[:4], 3, axis=3)))
    torch.testing.assert_close(grey, colour)


def test_they_are_a_feature_map_of_the_registry(
    images: NDArray[np.uint8],
    computed: NDArray[np.float32],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    stored = features.of_images(Choice("efficientnet_lite0"), images[:8])
    np.testing.assert_allclose(stored.astype(np.float32), computed[:8], rtol=1e-3, atol=1e-3)


def test_missing_and_foreign_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign:
        def locate_file(self, _: str) -> Path:
            return tmp_path / "weights.pth"

    monkeypatch.setattr(metadata, "distribution", lambda _: Foreign())
    with pytest.raises(InputError, match=r"fedsim\[public\]"):
        backbone.published()
    (tmp_path / "weights.pth").write_bytes(b"other")
    with pytest.raises(InputError, match="must have sha256"):
        backbone.published()
    with pytest.raises(InputError, match="1 or 3 channels, got 2"):
        backbone.output_shape((28, 28, 2))


def test_silhouettes_are_the_same_everywhere() -> None:
    drawn = silhouettes.draw(12, 14, 3)
    assert drawn.shape == (silhouettes.COUNT, 12, 14, 3)
    np.testing.assert_array_equal(drawn, silhouettes.draw(12, 14, 3))
    covered = (drawn.max(axis=3) > 0).mean(axis=(1, 2))
    assert 0.2 < covered.mean() < 0.7
    assert covered.min() > 0


def test_last_layer_features_are_what_the_last_layer_sees(
    images: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published last layer makes of them the logits of the whole network, also for colour and size."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    network = backbone.published()
    made = FEATURES.make(Choice("efficientnet_lite0_last"))
    assert made.output_shape((28, 28, 1)) == made.output_shape((40, 30, 3)) == (1280,)
    computed = np.concatenate(list(made.compute(images)))
    assert computed.shape == (80, 1280)
    assert computed.min() >= 0
    assert computed.max() <= 6
    with torch.no_grad():
        logits = network(next(backbone.inputs(images[:8], backbone.EDGE)))
        torch.testing.assert_close(network._fc(torch.from_numpy(computed[:8])), logits, rtol=1e-3, atol=1e-3)
    stored = features.of_images(Choice("efficientnet_lite0_last"), images[60:70])
    np.testing.assert_allclose(stored.astype(np.float32), computed[60:70], rtol=1e-3, atol=1e-3)
    colour = next(made.compute(np.repeat(images[:4], 3, axis=3)))
    np.testing.assert_allclose(colour, computed[:4], rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="1 or 3 channels, got 2"):
        made.output_shape((28, 28, 2))
    assert made.version() != FEATURES.make(Choice("efficientnet_lite0")).version()
