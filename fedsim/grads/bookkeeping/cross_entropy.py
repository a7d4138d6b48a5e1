"""Cross entropy, which vmap takes apart into many small operations."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fedsim.grads.bookkeeping.mode import Rule, Watch


def cross_entropy(watch: Watch, func: Any, input: Tensor, target: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Shortcut of `F.cross_entropy` of logits (n, classes) and labels (n,), one value a row."""
    level = watch.level
    given = {name for name, value in named.items() if value is not None}
    plain = not rest and given <= {"reduction", "ignore_index", "label_smoothing"}
    plain = plain and named.get("reduction") == "none" and watch.is_rows(input) and watch.is_rows(target)
    if not plain or input.dim() != 2 or target.dim() != 1 or target.is_floating_point():
        result: Tensor = func(input, target, *rest, **named)
        return result
    with level:
        logits, labels = level.lower(input), level.lower(target)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **named)
        losses = losses.view(labels.shape)
    return level.lift(losses)


SHORTCUTS: dict[Any, Rule] = {F.cross_entropy: cross_entropy}
