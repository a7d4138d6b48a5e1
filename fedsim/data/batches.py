"""From a data set's examples to what a model takes: tensors, or tensors by name.

The only place that knows which arrays a data set has. Nodes pass on what comes from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.config import TrainConfig
from fedsim.data import augment
from fedsim.data.examples import ArrayDataset, normalise, wanted
from fedsim.data.pictures.pictures import Pictures

Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """What the host does for some examples.

    Attributes:
        inputs: raw, (m, K, ...), as the data set has them, of the m examples that are there.
        targets: (m, ...).
        whole: (n,) which of the examples that were asked for are there; None: all of them. The others are
            pictures that cannot be decoded, and contribute nothing.
    """

    inputs: Tensor
    targets: Tensor
    whole: NDArray[np.bool_] | None = None


def plain(
    dataset: ArrayDataset, ids: NDArray[np.int64], dtype: torch.dtype, device: torch.device
) -> tuple[Batch, Batch]:
    """Return inputs and targets (n, ...) of these examples, as they are, on `device`.

    Inputs are NaN where a picture cannot be decoded, so that what is computed of it is not finite.
    """
    found, whole = dataset.read(ids)
    inputs = normalise(found, dataset, dtype, device)
    if whole is not None:
        inputs[torch.from_numpy(~whole).to(device)] = torch.nan
    return inputs, wanted(dataset.wanted_of(ids), dtype, device)


def whole(
    dataset: ArrayDataset, ids: NDArray[np.int64] | slice, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Return inputs and targets (m, ...) of those of the examples that are there, and how many are not."""
    found, there = dataset.read(ids)
    targets = dataset.wanted_of(ids)
    if there is not None:
        found, targets = found[there], targets[there]
    lost = 0 if there is None else int((~there).sum())
    return normalise(found, dataset, dtype, device), wanted(targets, dtype, device), lost


def views(
    dataset: ArrayDataset,
    ids: NDArray[np.int64],
    train: TrainConfig,
    key: bytes,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Batch, Batch]:
    """Return inputs (m, K, ...), K augmented views an example, and targets (m, ...), on `device`, of the
    examples that are there.

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
    dataset: ArrayDataset,
    ids: NDArray[np.int64],
    train: TrainConfig,
    key: bytes,
    pinned: bool = False,
    workers: int | None = None,
) -> Prepared:
    """Return what of `views` the host does.

    Args:
        pinned: put it where a GPU fetches it from while the host goes on.
        workers: threads that decode pictures; None: one a core.
    """
    there: NDArray[np.bool_] | None = None
    asked = ids, train.augment_multiplicity, key, train.augmentations
    if isinstance(dataset.inputs, Pictures):
        raw, there = augment.views_of(dataset.inputs, *asked, workers)
    else:
        raw, there = augment.views(dataset.inputs[ids], *asked), dataset.there(ids)
    targets = dataset.wanted_of(ids)
    if there is not None:
        raw, targets = raw[there], targets[there]
    parts = torch.tensor(raw), torch.tensor(targets)  # copies: the data set is read-only
    if pinned:
        parts = parts[0].pin_memory(), parts[1].pin_memory()
    return Prepared(*parts, there)


def placed(
    parts: Prepared, dataset: ArrayDataset, dtype: torch.dtype, device: torch.device
) -> tuple[Batch, Batch]:
    """Return inputs and targets as `views` does, of what is `prepared`."""
    raw, targets = parts.inputs.to(device, non_blocking=True), wanted(parts.targets, dtype, device)
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
    return inputs, wanted(dataset.blank_targets(1), dtype, device)
