"""Logistic losses of a linear head: residuals, curvatures, and the tightest bounds on both.

With scores z = W x + offset of an example of class y:

* "one_vs_all" (Mehta et al. 2023): sum over classes l of c_l [softplus(z_l) - 1(l = y) z_l], with
  c_y = 1 and c_l = alpha for the negatives. Residuals c_l (p_l - 1(l = y)), p = sigmoid(z); curvatures
  c_l p_l (1 - p_l).
* "softmax": log-sum-exp(z) - z_y. Residuals p_l - 1(l = y), p = softmax(z); curvatures of the diagonal blocks
  of the Hessian p_l (1 - p_l).

The gradient of an example is residuals x^T, of norm |residuals| |x|; the Hessians of all classes, side by
side, have norm |curvatures| |x|^2. W is public, so |z_l - offset| <= C |w_l| bounds both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import validate
from fedsim.heads.rows import clipped
from fedsim.validate import InputError


@dataclass(frozen=True)
class Logistic:
    """A logistic loss over k classes.

    Attributes:
        classes: k, at least 2.
        kind: "one_vs_all" or "softmax".
        alpha: weight of the negatives, in (0, 1e3]; 1 for softmax, which has no negatives.
        offset: constant added to every score; 0 for softmax, which does not see it. The paper's DP-FC takes
            -10: at zero weights all chances are then near 0, only the own class has a residual, and the bound
            is 1 instead of sqrt(k).

    Raises:
        InputError: a value out of range.
    """

    classes: int
    kind: str = "one_vs_all"
    alpha: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        validate.one_of(self.kind, ("one_vs_all", "softmax"), "kind of logistic loss")
        validate.in_range(self.classes, 2, math.inf, "classes")
        validate.in_range(self.alpha, 1e-9, 1e3, "alpha")
        validate.in_range(self.offset, -100.0, 100.0, "offset")
        if self.kind == "softmax" and (self.alpha, self.offset) != (1.0, 0.0):
            raise InputError("the loss softmax must have alpha=1 and offset=0. Take one_vs_all for others.")

    def terms(self, scores: Tensor, hot: Tensor) -> tuple[Tensor, Tensor]:
        """Return residuals and curvatures (n, k) for W x (n, k), without offset, and one-hot classes (n, k).

        Zero, both of them, for an example whose row of `hot` is zero.
        """
        if self.kind == "softmax":
            chances, weights = scores.softmax(1), hot.sum(1, keepdim=True)
        else:
            chances = (scores + self.offset).sigmoid()
            weights = (self.alpha + (1 - self.alpha) * hot) * hot.sum(1, keepdim=True)
        return weights * (chances - hot), weights * chances * (1 - chances)

    def residual_bound(self, weights: Tensor | None, clip_norm: float) -> float:
        """Return the largest norm of an example's residuals, |x| <= C, any class, at weights W (k, d), or
        whatever the weights are.

        one_vs_all: a residual is at most sigmoid(C |w_y| - offset) for the own class and alpha
        sigmoid(C |w_l| + offset) for others; at zero weights without offset sqrt(1 + (k - 1) alpha^2) / 2.
        softmax: with p_y >= m, |residuals|^2 = (1 - p_y)^2 + sum of the others' p_l^2 is at most
        (1 - m) (1 - m + M), M the largest chance another class can have; at most 2, at zero weights 1 - 1/k.
        """
        if weights is None:
            ones = torch.ones(self.classes, dtype=torch.float64)
            return math.sqrt(2.0) if self.kind == "softmax" else self._joint(ones, ones)
        if self.kind == "softmax":
            low, high = _softmax_range(weights.double(), clip_norm)
            found = 0.0
            for own in range(self.classes):
                missed = 1 - float(low[own])
                largest = float(torch.cat([high[:own], high[own + 1 :]]).max())
                found = max(found, missed * (missed + min(largest, missed)))
            return math.sqrt(found)
        reach = clip_norm * torch.linalg.vector_norm(weights.double(), dim=1)
        return self._joint((reach - self.offset).sigmoid(), (reach + self.offset).sigmoid())

    def curvature_bound(self, weights: Tensor | None, clip_norm: float) -> float:
        """Return the largest norm of an example's curvatures, |x| <= C, any class, at weights W (k, d), or
        whatever the weights are.

        one_vs_all: p (1 - p) <= 1/4, less where no score comes near 0; all classes together at most
        sqrt(1 + (k - 1) alpha^2) / 4. softmax: p (1 - p)^2 is at most 4/27, at 1/3, so the sum of
        p^2 (1 - p)^2 is at most 4/27 for any k, which three classes of chance 1/3 reach; less at zero
        weights: (k - 1) / k^1.5.
        """
        whole = math.sqrt(1 / 8 if self.classes == 2 else 4 / 27)
        if weights is None:
            quarters = torch.full((self.classes,), 0.25, dtype=torch.float64)
            return whole if self.kind == "softmax" else self._joint(quarters, quarters)
        if self.kind == "softmax":
            _, high = _softmax_range(weights.double(), clip_norm)
            largest = torch.where(high < 0.5, high * (1 - high), torch.full_like(high, 0.25))
            return min(whole, float(torch.linalg.vector_norm(largest)))
        reach = clip_norm * torch.linalg.vector_norm(weights.double(), dim=1)
        chances = (abs(self.offset) - reach).clamp(min=0).sigmoid()  # of the score nearest to 0
        return self._joint(chances * (1 - chances), chances * (1 - chances))

    def residuals(self, scores: Tensor, hot: Tensor, bound: float) -> Tensor:
        """Return the residuals (n, k) as `terms`, none longer than `bound`; longer ones are scaled down."""
        return clipped(self.terms(scores, hot)[0], bound)

    def curvatures(self, scores: Tensor, hot: Tensor, bound: float) -> Tensor:
        """Return the curvatures (n, k) as `terms`, none longer than `bound`; longer ones are scaled down."""
        return clipped(self.terms(scores, hot)[1], bound)

    def shared(self, weights: Tensor) -> bool:
        """Say whether all classes have the same Hessian whatever the examples: at zero weights, alpha=1."""
        return self.alpha == 1.0 and not bool(weights.any())

    def _joint(self, own: Tensor, others: Tensor) -> float:
        """Return the largest, over the own class y, norm of own_y and alpha others_l, l != y."""
        squares = self.alpha**2 * others.square()
        return math.sqrt(float((own.square() + squares.sum() - squares).max()))


def _softmax_range(weights: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest chance (k,) of each class: z_l - z_m is within C |w_l - w_m|."""
    apart = clip_norm * torch.cdist(weights, weights, compute_mode="donot_use_mm_for_euclid_dist")
    return 1 / apart.exp().sum(1), 1 / (-apart).exp().sum(1)
