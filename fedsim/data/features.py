"""Fixed feature maps of whole data sets, computed once a machine and then read from disk.

The cache holds one file per (images, map): its name is a digest of both, so a changed data set or library
version never meets old features. Files are plain .npy in float16 and are memory-mapped, so processes share
them and a node holds only the rows it touches. Whoever asks first computes; others wait for it.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data import backbone, cache, random_features, scattering
from fedsim.validate import InputError

DTYPE = np.dtype("<f2")  # 11 significant bits: a relative error of at most 4.9e-4 above 6e-5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureMap:
    """A public function of one image.

    Attributes:
        version: names the map, its constants and the code that computes it.
        output_shape: (H, W, C) of an image -> shape of its features; raises InputError for images it cannot
            take.
        compute: (N, H, W, C) uint8 -> batches (n, *shape) of float features, in order.
    """

    version: Callable[[], str]
    output_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    compute: Callable[[NDArray[np.uint8]], Iterator[NDArray[np.float32]]]


FEATURES: dict[str, FeatureMap] = {
    "scattering": FeatureMap(scattering.version, scattering.output_shape, scattering.compute),
    "scattering_random": FeatureMap(
        random_features.version, random_features.output_shape, random_features.compute
    ),
    "efficientnet_lite0": FeatureMap(backbone.version, backbone.output_shape, backbone.compute),
}


def of_images(name: str, images: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Return the features of all images, memory-mapped and read-only.

    The first call for these images computes them (one to ten milliseconds for a grey 28x28 image) and writes
    2 bytes a feature to `cache.folder()`; later calls of any process only hash the images.

    Args:
        name: a key of FEATURES.
        images: (N, H, W, C) uint8.

    Returns:
        (N, *shape) float16.

    Raises:
        InputError: unknown map, inputs that are not images it can take, or a cache that cannot be written.
    """
    validate.one_of(name, FEATURES, "data.features")
    feature_map = FEATURES[name]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(
            f"data.features={name} must get uint8 images of shape (N, H, W, C), got {images.dtype} of shape "
            f"{images.shape}. Leave data.features out for data that is features already."
        )
    shape = (len(images), *feature_map.output_shape(images.shape[1:]))
    path = cache.folder() / f"{name}-{_digest(feature_map, images)}.npy"
    try:
        with cache.locked(path):
            if not path.exists():
                _log.info("computing %s features of %d images into %s", name, len(images), path)
                _write(path, shape, feature_map.compute(images))
    except OSError as error:
        raise InputError(
            f"{path}: the feature cache must be writable and have {2 * math.prod(shape) / 2**20:.0f} MiB "
            f"free: {error}. Set {cache.FOLDER_VARIABLE} to a folder that has."
        ) from error
    return _open(path, shape)


def _digest(feature_map: FeatureMap, images: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(f"{feature_map.version()} {DTYPE.str} {images.shape}".encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()[:32]


def _write(path: Path, shape: tuple[int, ...], batches: Iterator[NDArray[np.float32]]) -> None:
    """Write one .npy file batch by batch."""
    # Not through a memory map: on a full disk that ends the process with a signal instead of an error.
    with cache.written(path) as handle:
        header = {"descr": DTYPE.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, header)
        for batch in batches:
            features = batch.astype(DTYPE)
            if not np.isfinite(features).all():
                raise InputError(f"data.features: every feature must be within {DTYPE}, and finite.")
            handle.write(features.tobytes())


def _open(path: Path, shape: tuple[int, ...]) -> NDArray[np.float16]:
    try:
        array: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged: {error}. Delete it; it is computed again.") from error
    if array.shape != shape or array.dtype != DTYPE:
        raise InputError(
            f"{path} is damaged: it must hold {DTYPE} of shape {shape}, got {array.dtype} of shape "
            f"{array.shape}. Delete it; it is computed again."
        )
    return array
