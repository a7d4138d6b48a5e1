"""Scattering features: a fixed map of images, so it costs no privacy and no training.

Two layers of Morlet wavelets with modulus and averaging over 2^J = 4 pixels, in L = 8 directions (Bruna and
Mallat 2013; Oyallon et al. 2019), computed by kymatio. Tramer and Boneh 2021 ("Differentially private
learning needs better features") showed that a linear or small convolutional model on these features beats
end-to-end networks at small epsilon. Every filter is a mathematical constant: an example's features depend
on its own pixels alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.validate import InputError

SCALE = 2  # J: features are averaged over 2**J x 2**J pixels
DIRECTIONS = 8  # L
PER_CHANNEL = 1 + SCALE * DIRECTIONS + DIRECTIONS**2 * SCALE * (SCALE - 1) // 2  # orders 0, 1, 2: 81
BATCH = 256  # images at once: about 60 MB of working memory for grey 28x28


def output_shape(image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the feature shape (81 C, H // 4, W // 4) of one image of shape (H, W, C).

    Raises:
        InputError: an edge below 4 pixels.
    """
    height, width, channels = image_shape
    if min(height, width) < 2**SCALE:
        raise InputError(
            f"data.features=scattering must get images of at least {2**SCALE} x {2**SCALE} pixels, got "
            f"{height} x {width}. Leave data.features out."
        )
    return PER_CHANNEL * channels, height // 2**SCALE, width // 2**SCALE


def version() -> str:
    """Return what identifies the map: its constants and the version of the library that computes it."""
    return f"scattering J={SCALE} L={DIRECTIONS} kymatio={metadata.version('kymatio')}"


def compute(images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
    """Yield the features of consecutive images, batch by batch.

    Args:
        images: (N, H, W, C) uint8; values are taken on the [0, 1] scale, without any other normalisation.

    Yields:
        (n, 81 C, H // 4, W // 4) float32, n up to 256; in each input channel's block of 81 first the average,
        then 16 first-order and 64 second-order coefficients. Independent of the batch they were computed in.
    """
    shape = output_shape(images.shape[1:])
    transform = _transform(images.shape[1], images.shape[2])
    with torch.no_grad():
        for start in range(0, len(images), BATCH):
            planes = torch.tensor(images[start : start + BATCH]).movedim(-1, 1)
            values = planes.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
            yield transform(values).reshape(-1, *shape).numpy()


@functools.lru_cache(maxsize=4)
def _transform(height: int, width: int) -> Any:
    # kymatio.torch also imports the 3D transform, which needs a function that scipy 1.17 no longer has.
    from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

    return ScatteringTorch2D(J=SCALE, shape=(height, width), L=DIRECTIONS)
