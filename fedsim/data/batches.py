"""From a data set's examples to what a model takes: tensors, or tensors by name.

The only place that knows which arrays a data set has. Nodes pass on what comes from here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.config import TrainConfig
from fedsim.data import augment
from fedsim.data.examples import ArrayDataset, normalise, wanted

Batch = Tensor | Mapping[str, Tensor]


def plain(
    dataset: ArrayDataset, ids: NDArray[np.int64], dtype: torch.dtype, device: torch.device
) -> tuple[Batch, Batch]:
    """Return inputs and targets (n, ...) of these examples, as they are, on `device`."""
    inputs = normalise(dataset.inputs[ids], dataset, dtype, device)
    return inputs, wanted(dataset.targets[ids], dtype, device)


def views(
    dataset: ArrayDataset,
    ids: NDArray[np.int64],
    train: TrainConfig,
    key: bytes,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Batch, Batch]:
    """Return inputs (n, K, ...), K augmented views an example, and targets (n, ...), on `device`.

    Args:
        dataset: where the examples come from.
        ids: (n,) global ids.
        train: how many views, and by which augmentations.
        key: 32 bytes, the step's augment key.
        dtype: of floating inputs.
        device: where the result lives.
    """
    return placed(prepared(dataset, ids, train, key), dataset, dtype, device)


def prepared(
    dataset: ArrayDataset, ids: NDArray[np.int64], train: TrainConfig, key: bytes, pinned: bool = False
) -> tuple[Tensor, Tensor]:
    """Return what of `views` the host does: raw inputs (n, K, ...), as the data set has them, and targets.

    Args:
        pinned: put them where a GPU fetches them from while the host goes on.
    """
    raw = augment.views(dataset.inputs[ids], ids, train.augment_multiplicity, key, train.augmentations)
    parts = torch.tensor(raw), torch.tensor(dataset.targets[ids])  # copies: the data set is read-only
    return (parts[0].pin_memory(), parts[1].pin_memory()) if pinned else parts


def placed(
    parts: tuple[Tensor, Tensor], dataset: ArrayDataset, dtype: torch.dtype, device: torch.device
) -> tuple[Batch, Batch]:
    """Return inputs and targets as `views` does, of what is `prepared`."""
    raw, targets = parts[0].to(device, non_blocking=True), wanted(parts[1], dtype, device)
    return normalise(raw, dataset, dtype, device), targets


def placeholder(
    dataset: ArrayDataset,
    multiplicity: int,
    values: np.random.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Batch, Batch]:
    """Return inputs (1, K, ...) and a target (1,) of an example that is in no data set, of the right form."""
    shape = (1, multiplicity, *dataset.example_shape)
    if dataset.vocabulary is None:
        inputs = torch.from_numpy(values.standard_normal(shape)).to(device, dtype)
    else:
        inputs = torch.from_numpy(values.integers(dataset.vocabulary, size=shape)).to(device)
    return inputs, wanted(np.zeros_like(dataset.targets[:1]), dtype, device)
