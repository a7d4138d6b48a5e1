"""From noisy sums to weights: solves and steps in float64; post-processing, which costs no privacy.

Matrices come as a `Spectrum`, which has been made positive semidefinite in one of its ways; weights and right
sides are (k, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim import validate
from fedsim.heads import packing, spectrum
from fedsim.heads.spectrum import Spectrum
from fedsim.validate import InputError

RIDGE = 0.15  # of the noise's norm, for denoised second moments; see `ridge`


def ridge(noise_std: float, width: int, factor: float = RIDGE) -> float:
    """Return a ridge from the noise alone: factor times its norm, s sqrt(2 d). Nothing private enters.

    With factor 1, G + E + r I is positive definite for any true G (but for the O(d^(-2/3)) beyond the edge),
    and a noisy matrix can be solved with as it is. What `Spectrum.denoised` makes of it needs less: with
    50,000 images and 1,280 features, at epsilon 0.1 to 8, factors between 0.1 and 0.35 were within 0.6
    points of accuracy of the best. Neither way is always better: with 3,816 features, projection alone at 0.1
    was 0.2 to 1 point above it.

    Args:
        noise_std: s of the packed second moments; see `Part.noise_std`.
        width: d.
        factor: > 0.
    """
    validate.positive(noise_std, "noise_std")
    validate.positive(factor, "factor")
    return factor * packing.noise_norm(noise_std, width)


def least_squares(second: Spectrum, first: Tensor, ridge: float) -> Tensor:
    """Return W = b (G + r I)^-1 (k, d): the minimiser of |X W^T - T|^2 + r |W|^2 (Mehta et al. 2023: DP-LS).

    Raises:
        InputError: G + r I is not positive definite.
    """
    return second.solve(first, ridge)


def centred(first: Tensor) -> Tensor:
    """Return b of targets less their mean over the outputs: b_l - (1/k) sum of b_m.

    For one-hot targets that subtracts the same from every score, so decisions stay; weights are shorter.
    """
    return first - first.mean(0, keepdim=True)


def weighted_least_squares(
    by_class: Tensor, second: Tensor, first: Tensor, ridge: float, alpha: float = 1.0
) -> Tensor:
    """Return w_l = (A_l + r I + alpha G)^-1 b_l for each class l, (k, d) (Mehta et al. 2023).

    The minimiser of sum over class l of (w.x - 1)^2 + alpha * sum over all of (w.x)^2 + r |w|^2. Noisy A_l
    and G are projected to positive semidefinite ones first, as in the paper.

    Args:
        by_class: A (k, d (d + 1) / 2), packed.
        second: G (d (d + 1) / 2,), packed.
        first: b (k, d).
        ridge: r > 0.
        alpha: weight of all examples beside those of the class, > 0.

    Raises:
        InputError: a value out of range, or another number of classes.
    """
    validate.positive(ridge, "ridge")
    validate.positive(alpha, "alpha")
    if len(by_class) != len(first):
        raise InputError(f"there must be a matrix for each of {len(first)} classes, got {len(by_class)}.")
    base = alpha * spectrum.of_packed(second).projected().matrix()
    base.diagonal().add_(ridge)
    solved = [
        torch.linalg.solve(base + spectrum.of_packed(own).projected().matrix(), right.double())
        for own, right in zip(by_class, first, strict=True)
    ]
    return torch.stack(solved)


def newton_step(
    weights: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    ridge: float,
    rate: float = 1.0,
    penalty: float = 0.0,
    noise_std: float = 0.0,
) -> Tensor:
    """Return w_l - rate (H_l + (r + penalty) I)^-1 (g_l + penalty w_l) for each class l, (k, d).

    Mehta et al. 2023; each H_l is projected first, or denoised where its noise is known. The penalty
    (1/2) p |W|^2 is public: it is added here and costs nothing.

    Args:
        weights, gradient: (k, d).
        hessian: (k, d (d + 1) / 2) packed, or (d (d + 1) / 2,) one for all classes.
        ridge: r >= 0, damping: what is solved with, not what is minimised.
        rate: > 0.
        penalty: p >= 0.
        noise_std: of the packed Hessians' noise; 0: unknown.

    Raises:
        InputError: a value out of range, or a matrix that is not positive definite.
    """
    validate.positive(rate, "rate")
    slopes = gradient.double() + penalty * weights.double()
    if hessian.dim() == 1:
        return weights.double() - rate * _positive(hessian, noise_std).solve(slopes, ridge + penalty)
    if len(hessian) != len(weights):
        raise InputError(f"there must be a Hessian for each of {len(weights)} classes, got {len(hessian)}.")
    steps = [
        _positive(own, noise_std).solve(slope[None], ridge + penalty)
        for own, slope in zip(hessian, slopes, strict=True)
    ]
    return weights.double() - rate * torch.cat(steps)


def _positive(packed: Tensor, noise_std: float) -> Spectrum:
    found = spectrum.of_packed(packed)
    return found.denoised(noise_std) if noise_std > 0.0 else found.projected()
