"""Whitening of features by images that are nobody's: less length where all images are alike.

x' = (I + S / r)^(-1/2) (x - m), with m and S the mean and covariance of the features of images that nobody
owns (`silhouettes`, or `random_images` for the prior they taught) and r a ridge: regularised ZCA whitening
(Bell and Sejnowski 1997). A clipped gradient of a linear head is as long as its example's features, so what
they have in common with any image drowns what tells them apart; scaled down, the rest takes more of the clip
bound. DP-FC (Mehta et al. 2023) pays for the private covariance to the
same end; this one is a constant of the feature map and costs no privacy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1.5  # the variance whose direction is shortened by a factor of root two; features have about 1


@dataclass(frozen=True)
class Whitening:
    """An affine map of features.

    Attributes:
        mean: (D,) subtracted.
        directions: (K, D) orthonormal; those orthogonal to all of them stay as they are.
        shrinkage: (K,) what is taken off along each, between 0 and 1.
    """

    mean: Tensor
    directions: Tensor
    shrinkage: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Map (n, D) to (n, D)."""
        centred = features - self.mean
        return centred - (centred @ self.directions.t() * self.shrinkage) @ self.directions


def fit(features: Tensor, ridge: float = RIDGE) -> Whitening:
    """Return the whitening by `features` (n, D), n below D, with the ridge r in units of their variance.

    Works on the n x n matrix of inner products in float64; the result has the dtype of `features`.
    """
    mean = features.double().mean(0)
    centred = features.double() - mean
    variances, weights = torch.linalg.eigh(centred @ centred.t() / len(features))
    some = variances > 1e-9 * variances[-1]  # centring leaves one direction fewer than images
    variances, weights = variances[some], weights[:, some]
    directions = (centred.t() @ weights / (len(features) * variances).sqrt()).t()
    shrinkage = 1 - (1 + variances / ridge).rsqrt()
    return Whitening(*(part.to(features.dtype) for part in (mean, directions, shrinkage)))
