"""Features of a network that has seen nothing real: a prior for private training without public data.

A small convolutional encoder learned to tell images of random processes apart (`random_prior_training`), in
the way of DP-RandP (Tang et al. 2023). Its weights are in the package and reproduced by one command. They are
fixed and come from no data, so an image's features depend on its own pixels alone and cost no privacy.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsim import seeds
from fedsim.data import random_features, random_images, scattering, whitening
from fedsim.validate import InputError

WEIGHTS = Path(__file__).with_name("embedded") / "random_prior.safetensors"
CHANNELS = (24, 112, 224)  # of the stages, each at half the size of the one before
GRID = 4  # features are averages over 4 x 4 parts of the image, of the last two stages
WIDTH = GRID**2 * sum(CHANNELS[1:])
WHITENING_IMAGES = 4000
BATCH = scattering.BATCH  # whose features stand beside these, batch by batch


class Encoder(nn.Module):
    """Three stages of 3x3 convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = CHANNELS
        self.first = _block(1, first, 1)
        self.second = nn.Sequential(_block(first, second, 2), _block(second, second, 1))
        self.third = nn.Sequential(_block(second, third, 2), _block(third, third, 1))

    def stages(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map (n, 1, H, W) to the outputs of the second and the third stage."""
        second = self.second(self.first(images))
        return second, self.third(second)

    def forward(self, images: Tensor) -> Tensor:
        """Map (n, 1, H, W) to (n, 224), averages over the image."""
        return self.stages(images)[1].mean((2, 3))


def output_shape(image_shape: tuple[int, ...], with_scattering: bool) -> tuple[int]:
    """Return (D,) for grey images (H, W, 1) of at least 8 x 8 pixels; raises InputError for others."""
    height, width, channels = image_shape
    if channels != 1 or min(height, width) < 8:
        raise InputError(
            "data.features=random_prior must get grey images of at least 8 x 8 pixels, got "
            f"{height} x {width} with {channels} channels. Leave data.features out."
        )
    return (WIDTH + (random_features.WIDTH if with_scattering else 0),)


def version(with_scattering: bool) -> str:
    """Return what identifies the map: its weights and constants, and the scattering beside it."""
    weights = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    own = f"random prior {weights} grid={GRID} whitened {whitening.RIDGE} by {WHITENING_IMAGES} v1"
    return f"{own}; {random_features.version()}" if with_scattering else own


def compute(images: NDArray[np.uint8], with_scattering: bool) -> Iterator[NDArray[np.float32]]:
    """Yield the features of consecutive images, batch by batch; about 5 ms an image on one core, 10 with
    scattering.

    Args:
        images: (N, H, W, 1) uint8.
        scattering: put random features of scattering beside those of the encoder, before whitening.

    Yields:
        (n, D) float32, n up to 256.
    """
    whiten = _whitening(*images.shape[1:3], with_scattering)
    for features in _features(images, with_scattering):
        yield whiten(features).numpy()


def _features(images: NDArray[np.uint8], with_scattering: bool) -> Iterator[Tensor]:
    """Yield (n, D) before whitening; the part of each stage, and that of scattering, has mean 0 and standard
    deviation 1 in a row."""
    beside: Iterator[Tensor | None] = (
        random_features.lifted(images) if with_scattering else itertools.repeat(None)
    )
    for start in range(0, len(images), BATCH):
        planes = torch.tensor(images[start : start + BATCH]).movedim(-1, 1).float() / 255
        seen = encoded(planes)
        lifted = next(beside)
        yield seen if lifted is None else torch.cat([lifted, seen], 1)


@torch.no_grad()
def encoded(images: Tensor) -> Tensor:
    """Map (n, 1, H, W) float32 within [0, 1] to what the encoder sees (n, WIDTH)."""
    stages = network().stages(images.contiguous(memory_format=torch.channels_last))
    parts = [F.adaptive_avg_pool2d(stage, GRID).flatten(1) for stage in stages]
    return torch.cat([F.layer_norm(part, part.shape[1:]) for part in parts], 1)


@functools.lru_cache
def _whitening(height: int, width: int, with_scattering: bool) -> whitening.Whitening:
    generator = seeds.torch_stream(0, "images that whiten the random prior")
    shapes = random_images.draw(WHITENING_IMAGES, height, width, generator)
    images = (255 * shapes).round().to(torch.uint8).movedim(1, -1).numpy()
    return whitening.fit(torch.cat(list(_features(images, with_scattering))))


@functools.lru_cache
def network() -> Encoder:
    """Return the encoder with its weights, in evaluation mode, read once a process."""
    network = Encoder()
    network.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return network.eval().to(memory_format=torch.channels_last)


def _block(channels: int, out: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())
