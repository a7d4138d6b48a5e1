"""Second moments once, then gradients seen through them (Mehta et al. 2023: DP-FC).

The second moments G stand in for the Hessian of every class and step: one release of d^2 numbers instead of
one a class and step. The gradients that follow are `newton.Newton` with hessians=False.

Two ways to use G. The paper's steps along (G + r I)^-1 g: clip and noise come first, so noise is magnified
where G is small. `whitening` maps the features by (G + r I)^-1/2 before they are clipped: a plain gradient
step on mapped features is a preconditioned step on the old ones, but clip and noise then are alike in all
directions. On 1,280 features of 50,000 images at epsilon 1 that was 2.4 points of accuracy above least
squares, and 1.3 above plain steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import validate
from fedsim.heads import packing, products
from fedsim.heads import rows as bounded
from fedsim.heads.parts import Layout, Part
from fedsim.heads.rows import Rows, Values
from fedsim.heads.spectrum import Spectrum


@dataclass(frozen=True)
class FeatureCovariance:
    """The second moments of features, without labels.

    Attributes:
        rows: how features become rows of bounded length C.
        features: d0, how many there are.
    """

    rows: Rows
    features: int

    def __post_init__(self) -> None:
        validate.in_range(self.features, 1, float("inf"), "features")

    def layout(self) -> Layout:
        """Return the one part: "second" (d (d + 1) / 2,) packed, bound C^2."""
        packed = packing.length(self.rows.width(self.features))
        return Layout((Part("second", (packed,), self.rows.clip_norm**2),))

    def sums(self, features: Values) -> dict[str, Tensor]:
        """Return {"second": sum of x x^T, packed}, float64, over features (n, d0); zero for non-finite ones.

        Raises:
            InputError: another shape.
        """
        width = self.rows.width(self.features)
        second = torch.zeros(width, width, dtype=torch.float64)
        for values, _ in bounded.blocks(features, features):
            second += products.second_moment(self.rows.of(values)).cpu()
        return {"second": packing.pack(second)}


def shares(steps: int, covariance: float | None = None) -> tuple[float, ...]:
    """Return the shares of the budget (`parts.over_steps`) of the second moments and of each gradient.

    Args:
        steps: T >= 1 gradients.
        covariance: share of the second moments, in (0, 1); None for that of one gradient, 1 / (1 + T), as in
            the paper.

    Raises:
        InputError: a value out of range.
    """
    validate.in_range(steps, 1, 1e9, "steps")
    first = 1 / (1 + steps) if covariance is None else covariance
    validate.in_range(first, 1e-9, 1 - 1e-9, "covariance")
    return (first, *((1 - first) / steps for _ in range(steps)))


def whitening(second: Spectrum, count: float, ridge: float) -> Tensor:
    """Return the transform (d, d) for `Rows`, (S + r I)^-1/2 with S = G / count, up to the length of a row.

    The rows that G is of are then the `inner` ones of those that are mapped.

    It is scaled so that a row drawn like the examples has squared length 1 on average, as far as the noisy G
    tells: then clip_norm=1 is right whatever the ridge.

    Args:
        second: of the released G, projected or shrunk: no value below 0.
        count: public number of examples, > 0.
        ridge: r in units of S, > 0.
    """
    validate.positive(count, "count")
    validate.positive(ridge, "ridge")
    values = second.values / count
    mean_square = float((values / (values + ridge)).sum())
    return second.power(-0.5, ridge * count) * (count / max(mean_square, 1e-12)) ** 0.5
