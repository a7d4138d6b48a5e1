"""Numpy arrays from an .npz file or a folder of .npy files.

Four axes mean images, channels last, whatever the dtype: (N, H, W, C). Bytes stay bytes and are normalised
like other images; floats are taken as they are, their channels moved to the front as models expect them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data import rows
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.sources import SOURCES
from fedsim.data.sources.base import Source, declared_one
from fedsim.data.targets import Targets
from fedsim.partitions.base import as_numbers
from fedsim.validate import InputError, PrivateInputError, with_place

NEEDED = ("train_inputs", "train_targets", "test_inputs", "test_targets")
NAMES = (*NEEDED, "train_groups")
CHANNELS = 4  # at most, in an axis that is taken for one of channels
BLOCK = 2**24  # values looked at in one go: 128 MiB in float64


@SOURCES.register("arrays")
@dataclass(frozen=True)
class Arrays(Source):
    """Numpy arrays from an .npz file or a folder of .npy files: images, features or tokens.

    data.root is the file, or the folder, whose arrays are memory-mapped. It holds train_inputs,
    train_targets, test_inputs, test_targets, and train_groups, any words or numbers, where examples have
    owners.

    Attributes:
        classes, labels, values, tokens: exactly one declares the targets: classes there can be, (N,); labels
            an example can have, (N, labels) of 0 and 1; values it has, (N, values); tokens, (N, places).
        vocabulary: number of tokens there can be, where the inputs are tokens (N, places).
        names: of the classes, labels or values; classes may then be these words.
    """

    classes: int | None = None
    labels: int | None = None
    values: int | None = None
    tokens: int | None = None
    vocabulary: int | None = None
    names: list[str] = field(default_factory=list)

    def load(self, root: Path) -> Splits:
        """See `Source.load`.

        Raises:
            InputError: no declaration, arrays that are missing, unreadable, of a wrong shape or dtype or not
                finite, or targets that are not as declared; names the array.
        """
        arrays = _read(root)
        missing = [name for name in NEEDED if name not in arrays]
        if missing:
            raise InputError(
                f"arrays: data.root must be an .npz file or a folder of .npy files with {', '.join(NEEDED)} "
                f"(and train_groups where examples have owners), got {root} without {', '.join(missing)}."
            )
        declared = declared_one(
            "arrays", classes=self.classes, labels=self.labels, values=self.values, tokens=self.tokens
        )
        declared = Targets(declared.kind, declared.size, tuple(self.names))
        try:
            return Splits(*(_split(name, arrays, declared, self.vocabulary) for name in ("train", "test")))
        except InputError as error:
            raise with_place(error, after=f" Read from {root}.") from error


def _split(
    name: str, arrays: Mapping[str, NDArray[Any]], declared: Targets, vocabulary: int | None
) -> ArrayDataset:
    inputs, targets = _native(arrays[f"{name}_inputs"]), _native(arrays[f"{name}_targets"])
    if not inputs.ndim:
        raise InputError(f"{name}_inputs must have an axis of examples, got a single {inputs.dtype}.")
    if inputs.ndim == 4:
        check_channels_last(f"{name}_inputs", inputs.shape)
    half: tuple[float, ...] = ()
    if inputs.dtype == np.uint8 and vocabulary is None:
        half = (0.5,) * inputs.shape[-1] if inputs.ndim == 4 else ()
    elif np.issubdtype(inputs.dtype, np.floating):
        finite(inputs, f"{name}_inputs")
        inputs = np.moveaxis(inputs, -1, 1) if inputs.ndim == 4 else inputs
    groups = arrays.get(f"{name}_groups")
    try:
        if targets.dtype.kind == "U":
            targets = rows.classes_of_words(targets, declared, "arrays: targets")
        if groups is not None and groups.dtype.kind not in "iu":
            groups = as_numbers(groups)
        return ArrayDataset("arrays", inputs, targets, groups, declared, half, half, vocabulary)
    except InputError as error:
        raise with_place(error, before=f"The {name} split of ") from error


def check_channels_last(what: str, shape: tuple[int, ...]) -> None:
    """Raise InputError for images (N, H, W, C) whose channels seem to stand elsewhere."""
    height, width, channels = shape[1:]
    axis = 1 if height <= CHANNELS < channels or width == channels != height else 2
    if axis == 1 or width <= CHANNELS < channels:
        raise InputError(
            f"{what} must have the channels of its images in the last axis, (N, H, W, C), got shape {shape}, "
            f"whose axis {axis} of length {shape[axis]} looks like the channels. Give numpy.moveaxis(x, 1, "
            "-1); a uint8 tensor of torch is taken as (N, C, H, W)."
        )


def finite(values: NDArray[Any], what: str) -> None:
    """Refuse floats that are NaN, infinite or beyond float32, a block of rows at a time.

    Raises:
        InputError: names `what` and the first row (example) that has one.
    """
    rows = max(1, BLOCK // max(1, math.prod(values.shape[1:])))
    for start in range(0, len(values), rows):
        block = values[start : start + rows]
        block = (np.abs(block) <= np.finfo(np.float32).max).reshape(len(block), -1)
        if not block.all():
            row = start + int(np.argmin(block.all(axis=1)))
            expected, remedy = f"{what} must be finite in float32", "Mend or leave out such examples."
            raise PrivateInputError(
                f"{expected}, but row {row} holds NaN, infinity or more than that. {remedy}",
                f"{expected}. {remedy}",
            )


def _read(root: Path) -> Mapping[str, NDArray[Any]]:
    """Read an .npz into memory, or map the .npy files of a folder (an .npz cannot be memory-mapped)."""
    try:
        if root.is_file():
            archive = np.load(root, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("It is a single array; save it into a folder of .npy files.")
            with archive:
                return {name: archive[name] for name in NAMES if name in archive}
        paths = {name: root / f"{name}.npy" for name in NAMES}
        return {
            name: np.load(path, mmap_mode="r", allow_pickle=False)
            for name, path in paths.items()
            if path.exists()
        }
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for damaged files
        raise InputError(
            f"arrays: {root} must hold plain numeric numpy arrays (no object arrays). "
            f"{str(error) or type(error).__name__}"
        ) from error


def _native(values: NDArray[Any]) -> NDArray[Any]:
    """Return the values in this machine's byte order, which torch needs."""
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))
