"""Loss distributions of one release, equal to dp_accounting's bit by bit, in less time.

The library inverts the privacy loss at every grid point in a Python loop. Here the same formulas, in the same
order, go over all points at once. All else is the library's: bounds of the grid, "connect the dots", tails.
Tests compare every mass with the library's own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import (
    AdjacencyType,
    GaussianPrivacyLoss,
    MixtureGaussianPrivacyLoss,
    MonotonePrivacyLoss,
)
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sampled_gaussian(noise_multiplier: float, sampling_rate: float, step: float) -> PrivacyLossDistribution:
    """Return the loss distribution of a Gaussian of sensitivity 1 on a Poisson sample.

    Args:
        noise_multiplier: standard deviation of the noise, above 0.
        sampling_rate: above 0 and below 1.
        step: spacing of the grid of losses.
    """
    return _distribution(
        [_SampledGaussian(noise_multiplier, sampling_prob=sampling_rate, adjacency_type=a) for a in _BOTH],
        step,
    )


def mixture(
    noise_multiplier: float, sensitivities: Floats, weights: Floats, step: float, log_mass: float
) -> PrivacyLossDistribution:
    """Return the loss distribution of a Gaussian whose sensitivity is random.

    Args:
        noise_multiplier: standard deviation of the noise, above 0.
        sensitivities: (k,), at least 0, one of them above.
        weights: (k,), their probabilities.
        step: spacing of the grid of losses.
        log_mass: logarithm of the probability that counts as infinite loss.
    """
    return _distribution(
        [
            _Mixture(
                noise_multiplier, sensitivities, weights, log_mass_truncation_bound=log_mass, adjacency_type=a
            )
            for a in _BOTH
        ],
        step,
    )


_BOTH = (AdjacencyType.REMOVE, AdjacencyType.ADD)


def _distribution(losses: list[MonotonePrivacyLoss], step: float) -> PrivacyLossDistribution:
    return PrivacyLossDistribution(*(_masses(loss, step) for loss in losses))


def _masses(loss: MonotonePrivacyLoss, step: float) -> pld_pmf.PLDPmf:
    """Connect the dots, as the library does it for continuous noise."""
    bounds = loss.connect_dots_bounds()
    low, high = math.floor(bounds.epsilon_lower / step), math.ceil(bounds.epsilon_upper / step)
    deltas = loss.get_delta_for_epsilon(np.arange(low, high + 1) * step)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(step, low, high, deltas)


class _SampledGaussian(GaussianPrivacyLoss):
    """Only what is asked of arrays of epsilons differs from its base."""

    def get_delta_for_epsilon(self, epsilon: Any) -> Any:
        losses = np.asarray(epsilon)
        rate = self.sampling_prob
        add = self.adjacency_type == AdjacencyType.ADD
        # Beyond this loss, which no point has, the divergence needs no inverse.
        inverted = losses < -math.log1p(-rate) if add else losses > math.log1p(-rate)
        deltas = np.zeros(losses.shape)
        if not add:
            deltas[~inverted] = -np.expm1(losses[~inverted])
        wanted = losses[inverted]
        points = self._inverse(-wanted if add else wanted)
        deltas[inverted] = self.mu_upper_cdf(points) - np.exp(wanted + self.mu_lower_log_cdf(points))
        return np.clip(deltas, 0.0, 1.0)

    def _inverse(self, losses: Floats) -> Floats:
        """Where the loss (negated for ADD) takes these values, (n,): log(1 + (exp(loss) - 1) / rate) is that
        without sampling."""
        rate, end = self.sampling_prob, math.log(1.0 - self.sampling_prob)
        at_end = np.abs(losses - end) <= 1e-9 * np.maximum(np.abs(losses), abs(end))  # math.isclose
        shifted, less = losses + np.log(1.0 / rate), np.log(1.0 / rate - 1.0)
        beyond = (losses <= end) | ((shifted <= less) & (losses != 0.0))
        if (beyond & ~at_end).any():
            raise ValueError("a loss below what sampling leaves possible, or not to be told from it")
        with np.errstate(all="ignore"):
            plain = shifted + np.log1p(-np.exp(less - shifted))
        plain[losses == 0.0] = np.log(1.0 / rate + (1.0 - 1.0 / rate))
        plain[at_end] = -math.inf
        if self.adjacency_type == AdjacencyType.ADD:
            plain = -plain
        points: Floats = -0.5 * self.sensitivity - plain * self._standard_deviation**2 / self.sensitivity
        return self.sensitivity + points if self.adjacency_type == AdjacencyType.ADD else points


class _Mixture(MixtureGaussianPrivacyLoss):
    """Searches for all inverses level by level; its base asks for the loss at one point at a time."""

    def _inverse_privacy_losses_with_range(
        self, privacy_losses: Any, bounds: tuple[float, float], precision: float = 1e-6
    ) -> Any:
        """Return for each loss, (n,), the smallest multiple of `precision` whose loss is at most that."""
        count = len(privacy_losses)
        low, high = np.full(count, bounds[0]), np.full(count, bounds[1])
        while (wide := high - low > precision).any():
            # Losses that are searched in the same interval share its midpoint, and what is computed there.
            middle, of_loss = np.unique((low[wide] + high[wide]) / 2.0, return_inverse=True)
            lower = privacy_losses[wide] < self._losses(middle)[of_loss]
            middle = middle[of_loss]
            low[wide] = np.where(lower, middle, low[wide])
            high[wide] = np.where(lower, high[wide], middle)
        return np.floor(high / precision) * precision

    def _losses(self, points: Floats) -> Floats:
        """Return the losses at points, (n,)."""
        sign = 1.0 if self.adjacency_type == AdjacencyType.ADD else -1.0
        constants = self._precompute_privacy_loss_constants
        slopes = self.sensitivities[:, None] * points / self._variance
        return -sign * np.logaddexp.reduce(constants[:, None] + sign * slopes, axis=0)
