"""What queries of a linear head on features share: rows of bounded norm, blocks, parts (Mehta et al. 2023).

An example's features, with a constant entry for the bias, are one row x, clipped to norm C, which is
privacy.clip_norm (fedsim.heads.rows). The model is one linear layer, whose weights and biases are W on such
rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim import validate
from fedsim.clipping.base import ClipRule
from fedsim.config import Config
from fedsim.grads.flat import get_flat, set_flat, spec
from fedsim.heads import rows as bounded
from fedsim.heads.linear import LinearHead
from fedsim.heads.parts import Layout
from fedsim.heads.rows import Rows
from fedsim.queries.base import NodeView, Query
from fedsim.queries.statistic import Part, Statistic
from fedsim.rules import ENGINE_SETTINGS
from fedsim.tasks import TASKS
from fedsim.tasks.classification import Classification
from fedsim.types import ClippedSum
from fedsim.validate import InputError

_UNBOUNDED = 1e12  # longer than any row of finite features that were normalised


@dataclass(frozen=True)
class FeatureQuery(Query):
    """A query whose contributions are functions of an example's features and class.

    Attributes:
        bias: constant entry of every row, which counts in its norm; 0 for none.
    """

    bias: float = 1.0

    measures_loss = False
    unread = (*ENGINE_SETTINGS, "train.augment_multiplicity", "train.augmentations")

    def __post_init__(self) -> None:
        validate.in_range(self.bias, 0.0, 1e6, "query.options.bias")

    def check(self, config: Config) -> None:
        """See `Query.check`."""
        if (clipping := config.privacy.clipping.name) != "flat":
            validate.conflicts(
                f"query {config.query.name} clips rows of features flat, got privacy.clipping={clipping}.",
                "Use flat.",
            )
        task = TASKS.find(config.task.name)
        own_loss = isinstance(task, type) and getattr(task, "loss", None) is not Classification.loss
        if isinstance(task, type) and issubclass(task, Classification):
            if own_loss or config.task.options.get("label_smoothing"):
                validate.conflicts(
                    f"query {config.query.name} has a loss of its own, but task={config.task.name} "
                    f"{'defines one' if own_loss else 'smooths labels'}.",
                    "Leave it out, or use query=gradient.",
                )
        else:
            validate.conflicts(
                f"query {config.query.name} needs one class an example, but task is {config.task.name}.",
                "Use task=classification, or query=gradient.",
            )

    def check_model(self, model: nn.Module, example_shape: tuple[int, ...], outputs: int) -> None:
        """See `Query.check_model`: it must be x -> W x + b on the example itself, whatever W and b are."""
        layout, features = spec(model), math.prod(example_shape)
        shapes = layout.shapes
        linear = shapes == ((outputs, features), (outputs,))
        if linear:
            start, generator = get_flat(model), torch.Generator().manual_seed(0)
            made_up = torch.randn(start.numel(), generator=generator).to(start)
            inputs = torch.randn(4, *example_shape, generator=generator).to(start)
            weights, biases = layout.split(made_up)
            set_flat(model, made_up)
            try:
                with torch.no_grad():
                    found = model(inputs)
            finally:
                set_flat(model, start)
            wanted = inputs.flatten(1) @ weights.t() + biases
            linear = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)
        if not linear:
            raise InputError(
                f"query {type(self).__name__} needs a model that is one linear layer on the {features} "
                f"numbers of an example, weights ({outputs}, {features}) and biases ({outputs},), got "
                f"another, with trainable parameters of shapes {list(shapes)}. Use model.name=linear, and "
                "put what comes before the layer into data.features."
            )

    def rows(self, clip: ClipRule) -> Rows:
        """Return how features become rows; as good as unclipped where nothing is private."""
        return Rows(clip.sensitivity if math.isfinite(clip.sensitivity) else _UNBOUNDED, self.bias)

    def statistic_of(self, layout: Layout, clip: ClipRule) -> Statistic:
        """Return the parts of a layout as a statistic, the first one the main part."""
        return Statistic(
            tuple(
                Part(
                    part.name,
                    part.length,
                    np.dtype(np.float64),
                    part.bound if math.isfinite(clip.sensitivity) else math.inf,
                    f"noise of {part.name}" if place else "noise",
                )
                for place, part in enumerate(layout.parts)
            )
        )

    def blocks(self, node: NodeView, ids: NDArray[np.int64]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (place in ids, features (n, d0), classes (n,)), a block in memory at a time; one at least."""
        for start in range(0, max(1, len(ids)), bounded.BLOCK):
            place = slice(start, start + bounded.BLOCK)
            inputs, labels = node.plain(ids[place])
            yield place, inputs.flatten(1), labels

    def result(self, count: int, bound: float, norms: list[Tensor]) -> ClippedSum:
        """Return the statistics of so many examples, whose norms before clipping are given."""
        nothing = torch.zeros(0, dtype=torch.float64)
        return ClippedSum(nothing, count, bound, torch.cat(norms), nothing)

    def row_norms(self, features: Tensor) -> Tensor:
        """Return the norms (n,) float64 of rows before clipping."""
        lengths = torch.linalg.vector_norm(features, dim=1, dtype=torch.float64).cpu()
        return torch.hypot(lengths, torch.full_like(lengths, self.bias))

    def weights(self, node: NodeView) -> Tensor:
        """Return W (k, d) float64 of rows, which a node's model, one linear layer, has."""
        flat = node.parameters().double().cpu()
        return LinearHead(node.outputs, len(flat) // node.outputs - 1, self.bias).rows(flat)
