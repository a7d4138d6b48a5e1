"""Sums of x x^T and of t x^T over many rows, block by block, added up in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.grads.arithmetic import float32


def second_moment(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum of w x x^T (d, d) float64 over rows (n, d); without weights (n,), which are >= 0, w = 1.

    One product in the dtype of `rows`: on a CPU numpy's, which knows that the result is symmetric and does
    half of the work. Exactly symmetric.
    """
    if weights is not None:
        rows = rows * weights.to(rows.dtype).sqrt()[:, None]
    if rows.device.type == "cpu":
        values = rows.detach().numpy()
        return torch.from_numpy(values.T @ values).double()
    with float32():
        product = (rows.t() @ rows).double()
    return (product + product.t()) / 2


def cross_moment(targets: Tensor, rows: Tensor) -> Tensor:
    """Return the sum of t x^T (k, d) float64 over targets (n, k) and rows (n, d), in the dtype of `rows`."""
    with float32():
        return (targets.to(rows.dtype).t() @ rows).double()


def by_class(labels: Tensor, rows: Tensor, classes: int) -> Tensor:
    """Return the sum of the rows (n, d) of each class, (classes, d) float64, for labels (n,) below `classes`.

    The same as the cross moment with one-hot targets.
    """
    hot = torch.nn.functional.one_hot(labels.long(), classes)
    return cross_moment(hot, rows)
