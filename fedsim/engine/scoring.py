"""What the released model scores: over the evaluation split, and at each holder's mix of labels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.data import batches, examples
from fedsim.data.partition import Partition
from fedsim.data.pictures.pictures import Pictures
from fedsim.data.targets import IGNORED
from fedsim.engine import evaluate
from fedsim.engine.ahead import ahead
from fedsim.tasks import Task
from fedsim.validate import InputError, PrivateInputError
from fedsim.visibility import Numbers, Public, Sensitive

EVALUATION_BATCH = 500
LOOKED_AT = 16


def scores_of(
    model: nn.Module, task: Task, splits: examples.Splits, dtype: torch.dtype, *, held_out: bool
) -> Numbers:
    """Return the task's metrics and "loss" of the model on the evaluation split: public on test data,
    sensitive where the split was `held_out` of the training examples.

    Pictures that cannot be decoded are no examples; "undecodable_test" counts them where there are any."""
    lost: list[int] = []
    measured = evaluate.evaluate(model, _batches(splits.test, dtype, model, lost), task)
    kind = Sensitive if held_out else Public
    if any(lost):
        measured["undecodable_test"] = float(sum(lost))
    return {name: kind(value) for name, value in measured.items()}


def check(data: examples.ArrayDataset, *, held_out: bool) -> None:
    """Refuse an evaluation split of which no example counts: no picture of it can be decoded, or no caption
    has a token. It is looked at up to the first that does.

    Args:
        data: the split.
        held_out: whether it is of the training examples, so that a message must say nothing of it.

    Raises:
        InputError: says what is wrong with the first.
    """
    why = ""
    for start in range(0, len(data), LOOKED_AT):
        rows = np.arange(start, min(start + LOOKED_AT, len(data)))
        if data.declared.kind == "tokens":
            rows = rows[(data.wanted_of(rows) != IGNORED).any(1)]
            why = why or "the first of them has no word that counts"
        if not len(rows):
            continue
        _, there = data.read(rows)
        if there is None or there.any():
            return
        why = data.inputs.said(int(rows[0])) if isinstance(data.inputs, Pictures) else why
    expected = f"{data.name}: evaluation must have an example that counts, a picture that can be decoded"
    expected += " and a caption with a word" if data.declared.kind == "tokens" else ""
    remedy = "Mend its files, or set other ones."
    message = f"{expected}, got none of {len(data)}{why and f': {why}'}. {remedy}"
    raise PrivateInputError(message, f"{expected}. {remedy}") if held_out else InputError(message)


def holder_scores(
    model: nn.Module, task: Task, splits: examples.Splits, partition: Partition, dtype: torch.dtype
) -> Sensitive[dict[str, float]]:
    """Return the spread over holders of the headline metric at each holder's own mix of classes.

    Sensitive whatever the test data: the holders' class shares are private. A class that the test set lacks
    has no score: it does not count in a holder's mix, and a holder that has no other class is left out; with
    no holder left, and for targets that are no classes, the answer is empty.
    """
    declared = splits.train.declared
    if declared.kind != "class":
        return Sensitive({})
    by_class = evaluate.by_class(model, _batches(splits.test, dtype, model), task, declared.size)
    known = ~np.isnan(by_class)
    classes = splits.train.targets
    assert isinstance(classes, np.ndarray)  # only tokens may be no array
    counts = partition.label_counts(classes, declared.size)[:, known]
    counts = counts[counts.any(axis=1)]
    if not len(counts):
        return Sensitive({})
    mine = counts @ by_class[known] / counts.sum(axis=1)
    return Sensitive({f"{q}%": float(np.percentile(mine, q)) for q in (5, 50, 95)})


def _batches(
    data: examples.ArrayDataset, dtype: torch.dtype, model: nn.Module, lost: list[int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets on the model's device, pictures decoded ahead; `lost` gets how many could not be."""
    device = next(model.parameters()).device

    def read(start: int) -> tuple[Tensor, Tensor, int]:
        return batches.whole(data, slice(start, start + EVALUATION_BATCH), dtype, device)

    starts = range(0, len(data), EVALUATION_BATCH)
    lazy = isinstance(data.inputs, Pictures)
    for inputs, targets, missing in ahead(read, starts) if lazy else map(read, starts):
        if lost is not None:
            lost.append(missing)
        yield inputs, targets
