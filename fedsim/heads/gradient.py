"""Gradient of a logistic loss at public weights, in the directions of a public map.

What one example adds is r x^T with its residuals r (k,) and its row x. With a map M (d, d), symmetric, the
example's row is M x, clipped to norm 1, and the weights are those of x: scores W x are the scores of W M^-1
on M x, so that steps along the sum times M are plain gradient steps on mapped rows. The clip is a factor c of
the example, of its scores too.

The sum over mapped rows is the sum over rows, times M once at the end: only the lengths |M x| need a product
of d^2 for every example, and they are the same at every step. Lengths are float64 throughout, for a map of
very different scales cancels most of what it adds; other products are float64 for float64 features and
float32 else, added up in float64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import dtrmm
from torch import Tensor

from fedsim import validate
from fedsim.heads import products
from fedsim.heads import rows as bounded
from fedsim.heads.logistic import Logistic
from fedsim.heads.moments import one_hot
from fedsim.heads.rows import Rows, Values
from fedsim.validate import InputError


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradient sum of one step.

    Attributes:
        rows: how features become rows of bounded length C.
        loss: of the head.
        residual_clip: largest norm of an example's residuals, where that is below what `loss` promises; None
            to clip nothing.
        mapping: M (d, d) float64, symmetric; None: rows as they are.
        mapped_clip: largest norm of a mapped row.

    Raises:
        InputError: a clip that is not positive, or a map that is not finite.
    """

    rows: Rows
    loss: Logistic
    residual_clip: float | None = None
    mapping: Tensor | None = None
    mapped_clip: float = 1.0

    def __post_init__(self) -> None:
        validate.positive(self.mapped_clip, "mapped_clip")
        if self.residual_clip is not None:
            validate.positive(self.residual_clip, "residual_clip")
        if self.mapping is not None and not bool(torch.isfinite(self.mapping).all()):
            raise InputError("the map of rows must be finite numbers.")

    @property
    def residual_bound(self) -> float:
        """Largest norm of an example's residuals, whatever the weights."""
        promised = self.loss.residual_bound(None, self.rows.clip_norm)
        return promised if self.residual_clip is None else min(promised, self.residual_clip)

    @property
    def bound(self) -> float:
        """Largest L2 norm of what one example adds."""
        return self.residual_bound * (self.rows.clip_norm if self.mapping is None else self.mapped_clip)

    def lengths(self, features: Values) -> Tensor:
        """Return |M x| (n,) float64 of the rows of features (n, d0); |x| without a map."""
        found = [torch.zeros(0, dtype=torch.float64)]
        for values, _ in bounded.blocks(features, features):
            rows = self.rows.of(values).double().cpu()
            if self.mapping is not None:  # half the products of the whole map
                rows = torch.from_numpy(dtrmm(1.0, self._triangle, rows.numpy().T).T)
            found.append(torch.linalg.vector_norm(rows, dim=1))
        return torch.cat(found)

    @functools.cached_property
    def _triangle(self) -> NDArray[np.float64]:
        """R (d, d) of M = Q R, in columns: |R x| is |M x|, to the same rounding."""
        assert self.mapping is not None
        return np.asfortranarray(torch.linalg.qr(self.mapping, mode="r").R.numpy())

    def sums(
        self, features: Values, labels: Values, weights: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sum (k, d) float64 before the map, and the norm (n,) of what each adds without clips.

        `mapped` of the sum over all examples is what the bound is of. An example adds zero where a feature is
        not finite, its class is none of 0 .. k - 1, or its length is not finite.

        Args:
            features: (n, d0), n may be 0.
            labels: (n,) integer classes.
            weights: W (k, d) of rows, public.
            lengths: (n,) from `lengths`.

        Raises:
            InputError: other shapes.
        """
        if len(lengths) != len(features) or labels.ndim != 1 or len(labels) != len(features):
            raise InputError(
                f"a gradient sum must get features (n, d0), classes (n,) and lengths (n,), got "
                f"{tuple(features.shape)}, {tuple(labels.shape)} and {tuple(lengths.shape)}."
            )
        total = torch.zeros(weights.shape, dtype=torch.float64)
        norms = [torch.zeros(0, dtype=torch.float64)]
        start = 0
        for values, targets in bounded.blocks(features, labels):
            rows = self.rows.of(values)
            own = lengths[start : start + len(rows)]
            start += len(rows)
            scales = self._scales(own).to(rows)[:, None]
            _, hot = one_hot(targets, self.loss.classes, rows)
            raw = self.loss.terms((rows @ weights.to(rows).t()) * scales, hot)[0]
            residuals = bounded.clipped(raw, self.residual_bound)
            total += products.cross_moment(residuals * scales, rows).cpu()
            norms.append(torch.linalg.vector_norm(raw, dim=1, dtype=torch.float64).cpu() * own)
        return total, torch.cat(norms)

    def mapped(self, rows: Tensor) -> Tensor:
        """Return rows (n, d) float64 times M; as they are without a map."""
        return rows if self.mapping is None else rows @ self.mapping

    def _scales(self, lengths: Tensor) -> Tensor:
        """Return c (n,): what clips a mapped row; 1 without a map, for rows are clipped already."""
        if self.mapping is None:
            return torch.ones_like(lengths)
        scales = self.mapped_clip / lengths.clamp(min=self.mapped_clip)
        return torch.where(torch.isfinite(lengths), scales, torch.zeros_like(scales))
