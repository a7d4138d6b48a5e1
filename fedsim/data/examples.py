"""Examples with labels as plain arrays, the splits of a data set, and what a model sees of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import validate
from fedsim.validate import InputError, PrivateInputError


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """Examples with labels, and what is public about them.

    Attributes:
        name: the data set's name in the registry.
        inputs: (N, H, W, C) uint8 images, or (N, ...) float16, float32 or float64 features; read-only.
        labels: (N,) int64 in 0 .. num_classes - 1; read-only.
        groups: (N,) int64 natural owner of each example, or None where the data set has no owners.
        num_classes: number of labels: declared, never counted, since the examples are private and the model's
            shape is not.
        mean, std: C numbers each, applied to pixels on the [0, 1] scale: published constants for the standard
            sets, 0.5 and 0.5 for other images (statistics of private images would leak), empty for features.

    Raises:
        InputError: shapes, dtypes, lengths or labels that do not fit together. Whether features are finite is
            for whoever reads or makes them (`finite`); an example that is not contributes a zero gradient.
    """

    name: str
    inputs: NDArray[Any]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64] | None
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_inputs(self.name, self.inputs)
        n = len(self.inputs)
        object.__setattr__(self, "inputs", _read_only(self.inputs))
        object.__setattr__(self, "labels", _read_only(_integers(self.name, "labels", self.labels, n)))
        if self.groups is not None:
            object.__setattr__(self, "groups", _read_only(_integers(self.name, "groups", self.groups, n)))
        validate.positive(self.num_classes, f"{self.name}: num_classes")
        if n and (self.labels.min() < 0 or self.labels.max() >= self.num_classes):
            expected = (
                f"{self.name}: labels must lie in 0 .. {self.num_classes - 1} (as many classes are declared)"
            )
            remedy = "Number the classes from 0, or declare as many as there can be."
            raise PrivateInputError(
                f"{expected}, got {self.labels.min()} .. {self.labels.max()}. {remedy}",
                f"{expected}. {remedy}",
            )
        channels = self.inputs.shape[-1] if self.is_image else 0
        if (len(self.mean), len(self.std)) != (channels, channels) or not all(s > 0 for s in self.std):
            raise InputError(
                f"{self.name}: mean and std must hold {channels} numbers, std positive, "
                f"got {self.mean} and {self.std}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_image(self) -> bool:
        """Whether inputs are uint8 images (augmentable, normalised) rather than float features."""
        return self.inputs.dtype == np.uint8

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example as a model sees it: (C, H, W) for images, the feature shape otherwise."""
        shape = self.inputs.shape[1:]
        return (shape[2], shape[0], shape[1]) if self.is_image else shape

    def take(self, rows: NDArray[np.int64] | slice) -> ArrayDataset:
        """Return the given rows as a data set; a slice shares memory, an index array copies."""
        groups = None if self.groups is None else self.groups[rows]
        return dataclasses.replace(self, inputs=self.inputs[rows], labels=self.labels[rows], groups=groups)


@dataclass(frozen=True, eq=False)
class Splits:
    """A training split (private, partitioned over holders) and the split a run is evaluated on."""

    train: ArrayDataset
    test: ArrayDataset

    def __post_init__(self) -> None:
        for split, data in (("train", self.train), ("test", self.test)):
            if not len(data):
                raise InputError(f"{data.name}: the {split} split must hold at least one example, got none.")
        a, b = self.train, self.test
        if (a.inputs.shape[1:], a.inputs.dtype) != (b.inputs.shape[1:], b.inputs.dtype):
            raise InputError(
                f"{a.name}: train and test examples must have the same shape and dtype, got "
                f"{a.inputs.shape[1:]} {a.inputs.dtype} and {b.inputs.shape[1:]} {b.inputs.dtype}."
            )


def normalise(
    batch: NDArray[Any] | torch.Tensor,
    dataset: ArrayDataset,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Turn examples into what a model takes.

    Args:
        batch: (..., H, W, C) uint8 images or (...) float features; leading axes (examples, views) are free.
        dataset: where the examples come from; its mean and std are used.
        dtype: torch.float32 or torch.float64.
        device: where the result lives; images travel as bytes and are converted there.

    Returns:
        (..., C, H, W) tensor (x / 255 - mean) / std for images; features unchanged but for their dtype.
        Each value depends on its own pixel alone, so batching never changes it.
    """
    # Copies an array: those of the data set are read-only.
    tensor = batch.to(device) if isinstance(batch, torch.Tensor) else torch.tensor(batch, device=device)
    if not dataset.is_image:
        return tensor.to(dtype)
    mean, std = (
        _of_channels(tuple(map(float, values)), dtype, torch.device(device))
        for values in (dataset.mean, dataset.std)
    )
    planes = tensor.movedim(-1, -3).to(dtype, memory_format=torch.contiguous_format)
    return planes.div_(255.0).sub_(mean).div_(std)


@lru_cache(maxsize=16)
def _of_channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One value a channel, (C, 1, 1), kept: what is sent to a GPU is waited for."""
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def _check_inputs(name: str, inputs: NDArray[Any]) -> None:
    image = inputs.dtype == np.uint8 and inputs.ndim == 4
    features = inputs.dtype in (np.float16, np.float32, np.float64) and inputs.ndim >= 2
    if not (image or features) or 0 in inputs.shape[1:]:
        raise InputError(
            f"{name}: inputs must be uint8 images of shape (N, H, W, C) or float16, float32 or float64 "
            f"features of shape (N, d), got {inputs.dtype} of shape {inputs.shape}. "
            "Grey images need a last axis of length 1."
        )


def _integers(name: str, what: str, values: NDArray[Any], n: int) -> NDArray[np.int64]:
    values = np.asarray(values)
    whole = np.issubdtype(values.dtype, np.integer)
    if values.shape != (n,) or not whole or (n and int(values.max()) > np.iinfo(np.int64).max):
        raise InputError(
            f"{name}: {what} must be {n} integers below 2**63, one per example, "
            f"got {values.dtype} of shape {values.shape}."
        )
    return values.astype(np.int64, copy=False)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()  # the caller's own array keeps its flag
    view.flags.writeable = False
    return view
