"""Random features on top of scattering: a fixed nonlinear map that makes a linear head a kernel machine.

z = max(0, R s - t) with s the scattering features of one example, normalised in groups of channels, and R a
Gaussian matrix drawn once and for all from a fixed key: an arc-cosine kernel with a threshold (Cho and Saul
2009), approximated by random features (Rahimi and Recht 2007). z is standardised over its own entries, then
whitened by images that are nobody's (`whitening`). Like scattering it is a public function of one example's
pixels and costs no privacy; DP-SGD's noise on the head depends on the length of z, not on how many entries it
has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedsim import seeds
from fedsim.data import scattering, silhouettes, whitening

WIDTH = 6000
THRESHOLD = 0.5  # in standard deviations of R s: about a third of the entries are above zero
CHANNELS_A_GROUP = 3


def output_shape(image_shape: tuple[int, ...]) -> tuple[int]:
    """Return (WIDTH,) for images that scattering takes; raises InputError for others."""
    scattering.output_shape(image_shape)
    return (WIDTH,)


def version() -> str:
    """Return what identifies the map: its constants and the version of the scattering below it."""
    own = f"width={WIDTH} threshold={THRESHOLD} groups of {CHANNELS_A_GROUP} whitened {whitening.RIDGE} v1"
    return f"random {own}; {scattering.version()}"


def compute(images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
    """Yield the features of consecutive images, batch by batch.

    Args:
        images: (N, H, W, C) uint8, as for scattering.

    Yields:
        (n, WIDTH) float32.
    """
    whiten = _whitening(*images.shape[1:])
    for batch in lifted(images):
        yield whiten(batch).numpy()


def lifted(images: NDArray[np.uint8]) -> Iterator[Tensor]:
    """Yield the features before whitening: (n, WIDTH) float32 of mean 0 and standard deviation 1 in a row."""
    shape = scattering.output_shape(images.shape[1:])
    width = math.prod(shape)
    matrix = torch.randn((width, WIDTH), generator=seeds.torch_stream(0, "random features"))
    matrix /= math.sqrt(width)
    with torch.no_grad():
        for batch in scattering.compute(images):
            scattered = F.group_norm(torch.from_numpy(batch), shape[0] // CHANNELS_A_GROUP)
            yield F.layer_norm(F.relu(scattered.flatten(1) @ matrix - THRESHOLD), (WIDTH,))


@functools.lru_cache
def _whitening(height: int, width: int, channels: int) -> whitening.Whitening:
    return whitening.fit(torch.cat(list(lifted(silhouettes.draw(height, width, channels)))))
