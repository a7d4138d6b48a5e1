"""Gradient and Hessians of a logistic loss at public weights: what a private Newton step needs.

Mehta et al. 2023 (DP-Newton): g_l = sum of r_l x and H_l = sum of h_l x x^T for every class l, with
residuals r and curvatures h of `logistic`. The bounds here are for all classes together, from the weights:
at most those of the paper, sqrt(k) C and sqrt(k) C^2 / 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import validate
from fedsim.heads import packing, products
from fedsim.heads import rows as bounded
from fedsim.heads.logistic import Logistic
from fedsim.heads.moments import one_hot
from fedsim.heads.parts import Layout, Part
from fedsim.heads.rows import Rows, Values
from fedsim.validate import InputError


@dataclass(frozen=True)
class Newton:
    """The sums of one step.

    Attributes:
        rows: how features become rows of bounded length C.
        loss: of the head.
        features: d0, how many there are.
        residual_clip: largest norm of an example's residuals, where that is below what `loss` promises; None
            to clip nothing.
        shared: release one Hessian for all classes, without the factor sqrt(k): they coincide at zero weights
            with alpha = 1, and nowhere else.
    """

    rows: Rows
    loss: Logistic
    features: int
    residual_clip: float | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        validate.in_range(self.features, 1, float("inf"), "features")
        if self.residual_clip is not None:
            validate.positive(self.residual_clip, "residual_clip")

    @property
    def width(self) -> int:
        """d, the length of a row."""
        return self.rows.width(self.features)

    def layout(self, weights: Tensor | None, shares: Sequence[float] = (0.5, 0.5)) -> Layout:
        """Return the parts: "gradient" (k, d), and "hessian" (k, d (d + 1) / 2) packed, (d (d + 1) / 2,)
        shared.

        Bounds: of the residuals times C, of the curvatures times C^2; a shared Hessian's the curvature of one
        class times C^2. The shares are equal by default, as in the paper.

        Args:
            weights: (k, d), public; None: bounds that hold at any.
            shares: of gradient and Hessian.

        Raises:
            InputError: weights of another shape, or Hessians to share that differ.
        """
        if weights is not None:
            self._check(weights)
        bound, classes = self.rows.clip_norm, self.loss.classes
        packed = packing.length(self.width)
        curvature = self.loss.curvature_bound(weights, bound)
        if self.shared:
            curvature /= classes**0.5
        shape = (packed,) if self.shared else (classes, packed)
        gradient = Part("gradient", (classes, self.width), self._residual_bound(weights) * bound, shares[0])
        return Layout((gradient, Part("hessian", shape, curvature * bound**2, shares[1])))

    def sums(self, features: Values, labels: Values, weights: Tensor) -> dict[str, Tensor]:
        """Return the sums of the parts, float64, in their own units.

        An example adds zero where a feature is not finite, or its class is none of 0 .. k - 1.

        Args:
            features: (n, d0), n may be 0.
            labels: (n,) integer classes.
            weights: (k, d), public.

        Raises:
            InputError: as `layout`, or other shapes of examples.
        """
        self._check(weights)
        if tuple(features.shape[1:]) != (self.features,) or labels.ndim != 1:
            raise InputError(
                f"a Newton step must get features (n, {self.features}) and classes (n,), got "
                f"{tuple(features.shape)} and {tuple(labels.shape)}."
            )
        groups = 1 if self.shared else self.loss.classes
        gradient = torch.zeros(self.loss.classes, self.width, dtype=torch.float64)
        hessians = torch.zeros(groups, self.width, self.width, dtype=torch.float64)
        residual_bound = self._residual_bound(weights)
        curvature_bound = self.loss.curvature_bound(weights, self.rows.clip_norm)
        for values, targets in bounded.blocks(features, labels):
            rows = self.rows.of(values)
            _, hot = one_hot(targets, self.loss.classes, rows)
            scores = rows @ weights.to(rows).t()
            gradient += products.cross_moment(self.loss.residuals(scores, hot, residual_bound), rows).cpu()
            curvatures = self.loss.curvatures(scores, hot, curvature_bound)
            for group in range(groups):
                hessians[group] += products.second_moment(rows, curvatures[:, group]).cpu()
        return {"gradient": gradient, "hessian": packing.pack(hessians[0] if self.shared else hessians)}

    def _residual_bound(self, weights: Tensor | None) -> float:
        promised = self.loss.residual_bound(weights, self.rows.clip_norm)
        return promised if self.residual_clip is None else min(promised, self.residual_clip)

    def _check(self, weights: Tensor) -> None:
        if tuple(weights.shape) != (self.loss.classes, self.width) or not bool(weights.isfinite().all()):
            raise InputError(
                f"weights must be finite and of shape ({self.loss.classes}, {self.width}), got "
                f"{tuple(weights.shape)}."
            )
        if self.shared and not self.loss.shared(weights):
            raise InputError(
                "one Hessian for all classes must have zero weights and alpha=1: elsewhere they differ. Set "
                "shared=False."
            )
