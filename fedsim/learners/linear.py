"""What learners of one linear layer share."""

from __future__ import annotations

from fedsim.grads.flat import FlatSpec
from fedsim.heads.linear import LinearHead
from fedsim.queries.base import Query
from fedsim.validate import InputError

OPTIMIZER_SETTINGS = (
    "optimizer.learning_rate",
    "optimizer.name",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "optimizer.warmup_epochs",
    "optimizer.schedule",
    "optimizer.scale_with_batch",
    "train.ema_decay",
)
"""What a learner that solves does not read."""


def linear_head(query: Query, layout: FlatSpec, learner: str) -> LinearHead:
    """Return the one linear layer that a model is, with the constant entry of the query's rows.

    Raises:
        InputError: the model is another.
    """
    shapes = layout.shapes
    if len(shapes) != 2 or len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
        raise InputError(
            f"learner={learner} makes the weights (k, d) and biases (k,) of one linear layer, but the "
            f"model's trainable parameters have shapes {list(shapes)}. Use model.name=linear."
        )
    return LinearHead(shapes[0][0], shapes[0][1], float(getattr(query, "bias", 0.0)))
