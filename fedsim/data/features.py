"""Fixed feature maps of data sets, computed once a machine and then read from disk.

A file has room for a whole data set and is filled by example (feature_file): a run fills what it uses, a node
the examples it hosts, and what one has filled the next one finds. That needs two things of a row. It is the
same bits whichever examples it was computed with, so images go through the map in fixed blocks, filled up
where they are short. And it says whose it is by a digest of its image: a node vouches for its own rows
without anybody else's, and a data set that changed never meets old features, since a file that has other
images in wanted rows is left alone and the next one of its name is taken. Map, its version and options, block
size and shapes are in the name. Files are memory-mapped, so processes share them and a node holds only the
rows it touches. Whoever asks first computes; others wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim import provenance, references
from fedsim.data import cache, feature_file
from fedsim.data.feature_file import DTYPE, Digests, FeatureFile, Ids
from fedsim.data.feature_maps import FEATURES, FeatureMap
from fedsim.data.pictures.pictures import Pictures
from fedsim.merging import Choice
from fedsim.validate import InputError

BLOCK = 1024  # images that are computed, written and kept together
LEAST = 32  # a shorter block is filled up to a multiple: kernels for fewer images round differently

Rows = NDArray[np.int64] | slice
Images = NDArray[np.uint8] | Pictures

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far the rows that one call wants are.

    Attributes:
        path: their file.
        wanted, found, computed: how many are wanted, were there at the start, and have been computed since.
    """

    path: Path
    wanted: int
    found: int
    computed: int


_watcher: ContextVar[Callable[[Progress], None] | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(by: Callable[[Progress], None]) -> Iterator[None]:
    """Within the block, tell `by` about every file that is asked for: at the start, and after each block."""
    token = _watcher.set(by)
    try:
        yield
    finally:
        _watcher.reset(token)


def of_images(
    choice: Choice, images: NDArray[np.uint8], rows: Rows = slice(None), name: str | None = None
) -> NDArray[np.float16]:
    """Return the features of images, memory-mapped and read-only.

    The first call for these images computes them (one to ten milliseconds for a grey 28x28 image) and writes
    2 bytes a feature to `cache.folder()`; later calls of any process only hash the images. Stopped in the
    middle, it goes on after the last finished block.

    Args:
        choice: the map and its options.
        images: (N, H, W, C) uint8.
        rows: those that are wanted; no others are looked at, and the others of the result may be zero.
        name: what keeps the files of data sets of equal size apart; None: a digest of all images.

    Returns:
        (N, *shape) float16.

    Raises:
        InputError: unknown map, inputs that are not images it can take, or a cache that cannot be written.
    """
    return file_of(choice, images, rows, name).array()


def file_of(choice: Choice, images: Images, rows: Rows = slice(None), name: str | None = None) -> FeatureFile:
    """Return the file that `of_images` maps, with the rows in it.

    Pictures in files (then with a name) are decoded a block at a time; one that cannot be has NaN as
    features.
    """
    feature_map = FEATURES.make(choice)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(
            f"data.features={choice.name} must get uint8 images of shape (N, H, W, C), got {images.dtype} of "
            f"shape {images.shape}. Leave data.features out for data that is features already."
        )
    shape = (len(images), *feature_map.output_shape(images.shape[1:]))
    ids = np.arange(len(images), dtype=np.int64)[rows]
    wanted = feature_file.digests(images, ids)
    own = provenance.reference_hash(choice.name) if references.is_reference(choice.name) else ""
    stem = f"{file_name(choice.name)}-{_digest(feature_map, own, images, name)}"
    for again in itertools.count():
        path = cache.folder() / (f"{stem}-{again}.npy" if again else f"{stem}.npy")
        try:
            if (file := _filled(path, shape, feature_map, images, ids, wanted)) is not None:
                return file
        except OSError as error:
            raise InputError(
                f"{path}: the feature cache must be writable and have {2 * math.prod(shape) / 2**20:.0f} MiB "
                f"free: {error}. Set {cache.FOLDER_VARIABLE} to a folder that has. What is finished stays."
            ) from error
    raise AssertionError  # count() does not end


def file_name(name: str) -> str:
    """Return the name of a map, which may be a reference, as part of a file's."""
    return re.sub(r"[^\w.-]+", "_", name)


def _digest(feature_map: FeatureMap, source: str, images: Images, name: str | None) -> str:
    blocks = f"blocks of {BLOCK} and {LEAST}"
    if isinstance(images, Pictures):
        blocks += f" {images.how}"
    digest = hashlib.sha256(
        f"{feature_map.version()}{source} {feature_map} {DTYPE.str} {blocks} {images.shape} {name}".encode()
    )
    if name is None and not isinstance(images, Pictures):
        digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()[:32]


def _filled(
    path: Path,
    shape: tuple[int, ...],
    feature_map: FeatureMap,
    images: Images,
    ids: Ids,
    wanted: Digests,
) -> FeatureFile | None:
    """Return the file with the wanted rows, computed where they are not there; None: it has other images."""
    file = FeatureFile(path, shape)
    watcher = _watcher.get() or (lambda _: None)
    missing = _missing(file, ids, wanted)
    if missing is None:
        return None
    if not missing.any() and path.exists():
        watcher(Progress(path, len(ids), len(ids), 0))
        return file
    with cache.locked(path):
        missing = _missing(file, ids, wanted)  # another process may have been at it
        if missing is None:
            return None
        left = np.flatnonzero(missing)
        found = len(ids) - len(left)
        watcher(Progress(path, len(ids), found, 0))
        if len(left):
            _log.info("computing %s into %s", feature_map, path)
        needed = len(left) * math.prod(shape[1:]) * DTYPE.itemsize
        if (free := shutil.disk_usage(path.parent).free) < needed:
            raise OSError(
                f"{needed / 2**20:.0f} MiB are still to be written, and {free / 2**20:.0f} are free"
            )
        with file.writing() as writing:
            for start in range(0, len(left), BLOCK):
                places = left[start : start + BLOCK]
                writing.add(ids[places], wanted[places], _features(feature_map, images, ids[places]))
                watcher(Progress(path, len(ids), found, min(start + BLOCK, len(left))))
    return file


def _missing(file: FeatureFile, ids: Ids, wanted: Digests) -> NDArray[np.bool_] | None:
    """Return which of the wanted rows are not there; None where one is another image's."""
    held = file.held()[ids]
    missing = (held == 0).all(1)
    return None if (held != wanted).any(1)[~missing].any() else missing


def _features(feature_map: FeatureMap, images: Images, ids: Ids) -> NDArray[np.float16]:
    """Return the features of these rows as they are stored, NaN for pictures that cannot be decoded."""
    if not isinstance(images, Pictures):
        return _block(feature_map, images[ids])
    pixels, whole = images.read(ids)
    found = _block(feature_map, pixels)
    found[~whole] = np.nan
    return found


def _block(feature_map: FeatureMap, images: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Return the features of up to BLOCK images as they are stored, the same bits beside any others."""
    n = len(images)
    filled = np.concatenate([images, np.repeat(images[-1:], -n % LEAST, 0)])
    with np.errstate(over="ignore", invalid="ignore"):
        features = np.concatenate([batch.astype(DTYPE) for batch in feature_map.compute(filled)])
    wanted = (len(filled), *feature_map.output_shape(images.shape[1:]))
    if features.shape != wanted:
        raise InputError(
            f"data.features: compute() of {type(feature_map).__name__} must yield a row of output_shape() "
            f"for every image in order, {wanted} in all, got {features.shape}."
        )
    features = features[:n]
    if not np.isfinite(features).all():
        raise InputError(f"data.features: every feature must be within {DTYPE}, and finite.")
    return features
