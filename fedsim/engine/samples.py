"""What the released model says of a few examples, in words, to be looked at beside their pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedsim.data.examples import ArrayDataset, normalise, wanted
from fedsim.engine import evaluate
from fedsim.grads import arithmetic
from fedsim.tasks import Task
from fedsim.types import Sample
from fedsim.visibility import Public, Sensitive, Tagged

FEW = 6


@arithmetic.float32()
def samples_of(
    model: nn.Module, task: Task, data: ArrayDataset, dtype: torch.dtype, *, held_out: bool
) -> Tagged[tuple[Sample, ...]] | None:
    """Return the first FEW pictures of the evaluation split, what the model says of each (`Task.in_words`,
    token after token, the likeliest) and what its target says; None where the task says nothing in words.

    They are as public as the scores: Public of test data, Sensitive where the split was `held_out` of the
    training examples. Pictures that cannot be decoded are left out.
    """
    if not data.is_image or not task.speaks:
        return None
    rows = slice(0, FEW)
    found, there = data.read(rows)
    targets = data.wanted_of(rows)
    if there is not None:
        found, targets = found[there], targets[there]
    if not len(found):
        return None
    device = next(model.parameters()).device
    with evaluate.evaluating(model):
        shown = normalise(found, data, dtype, device)
        # Blank ones: what a caption is must not reach the model that is to say it.
        blank = wanted(data.blank_targets(len(found)), dtype, device)
        said = task.in_words(task.answered(model, shown, blank).cpu(), data.declared)
    own = task.targets_in_words(targets, data.declared)
    made = tuple(
        Sample(np.ascontiguousarray(image), *words) for image, *words in zip(found, said, own, strict=True)
    )
    return (Sensitive if held_out else Public)(made)
