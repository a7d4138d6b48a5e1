"""Fixed feature maps of whole data sets, computed once a machine and then read from disk.

The cache holds one file per (images, map): its name is a digest of both, so a changed data set or library
version never meets old features. Files are plain .npy in float16 and are memory-mapped, so processes share
them and a node holds only the rows it touches. Whoever asks first computes; others wait for it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.data import cache
from fedsim.data.feature_maps import FEATURES, FeatureMap
from fedsim.merging import Choice
from fedsim.validate import InputError

DTYPE = np.dtype("<f2")  # 11 significant bits: a relative error of at most 4.9e-4 above 6e-5

_log = logging.getLogger(__name__)


def of_images(choice: Choice, images: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Return the features of all images, memory-mapped and read-only.

    The first call for these images computes them (one to ten milliseconds for a grey 28x28 image) and writes
    2 bytes a feature to `cache.folder()`; later calls of any process only hash the images.

    Args:
        choice: the map and its options.
        images: (N, H, W, C) uint8.

    Returns:
        (N, *shape) float16.

    Raises:
        InputError: unknown map, inputs that are not images it can take, or a cache that cannot be written.
    """
    feature_map, name = FEATURES.make(choice), file_name(choice.name)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(
            f"data.features={choice.name} must get uint8 images of shape (N, H, W, C), got {images.dtype} of "
            f"shape {images.shape}. Leave data.features out for data that is features already."
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


def file_name(name: str) -> str:
    """Return the name of a map, which may be a reference, as part of a file's."""
    return re.sub(r"[^\w.-]+", "_", name)


def _digest(feature_map: FeatureMap, images: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(f"{feature_map.version()} {feature_map} {DTYPE.str} {images.shape}".encode())
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
