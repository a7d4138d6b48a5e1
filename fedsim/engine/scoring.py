"""What the released model scores: over the evaluation split, and at each holder's mix of labels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.data import examples
from fedsim.data.partition import Partition
from fedsim.engine import evaluate
from fedsim.visibility import Numbers, Public, Sensitive

EVALUATION_BATCH = 500


def scores_of(model: nn.Module, splits: examples.Splits, dtype: torch.dtype, *, held_out: bool) -> Numbers:
    """Return "accuracy" and "loss" of the model on the evaluation split: public on test data, sensitive where
    the split was `held_out` of the training examples."""
    measured = evaluate.evaluate(model, _batches(splits.test, dtype, model))
    kind = Sensitive if held_out else Public
    return {name: kind(measured[name]) for name in ("accuracy", "loss")}


def holder_accuracy(
    model: nn.Module, splits: examples.Splits, partition: Partition, dtype: torch.dtype
) -> Sensitive[dict[str, float]]:
    """Return the spread over holders of the test accuracy at each holder's own mix of labels.

    Sensitive whatever the test data: the holders' label shares are private. A label that the test set lacks
    has no accuracy: it does not count in a holder's mix, and a holder that has no other label is left out;
    with no holder left the answer is empty.
    """
    classes = splits.train.num_classes
    by_class = np.asarray(evaluate.class_accuracy(model, _batches(splits.test, dtype, model), classes))
    known = ~np.isnan(by_class)
    counts = partition.label_counts(splits.train.labels, classes)[:, known]
    counts = counts[counts.any(axis=1)]
    if not len(counts):
        return Sensitive({})
    mine = counts @ by_class[known] / counts.sum(axis=1)
    return Sensitive({f"{q}%": float(np.percentile(mine, q)) for q in (5, 50, 95)})


def _batches(
    data: examples.ArrayDataset, dtype: torch.dtype, model: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs on the model's device, and labels on the host."""
    device = next(model.parameters()).device
    for start in range(0, len(data), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        inputs = examples.normalise(data.inputs[rows], data, dtype, device)
        yield inputs, torch.from_numpy(data.labels[rows].copy())
