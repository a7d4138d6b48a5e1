"""Privacy of integer noise on rounded sums, in Renyi divergence at whole orders.

Setting. One step adds integer noise Y to a sum of rounded vectors, where rounding is by a dither u drawn
apart from the data (fedsim.noise.shares). Adding an example of gradient g, scaled and rotated to norm at most
s ring units in D coordinates, shifts the rounded sum by Z, and over u the entries of Z are independent
unbiased roundings of those of g.

Claim. Let e(k) be such that log E_u exp((k - 1) D_k(Y + Z || Y)) <= (k - 1) e(k) for k = 2 .. A. If e(k) <=
k / (2 sigma^2) for all of them, then at every whole order up to A, in both directions of add/remove, the step
with Poisson sampling at any rate q has at most the Renyi divergence of PoissonSampled(q, Gaussian(sigma)).

Proof. (1) u has one law under both neighbours, so the divergence with u published bounds the one without
(data processing), and given u the pair is P0 = law of Y against (1 - q) P0 + q P1, P1 = law of Y + Z. (2) For
whole a, E_P0[((1 - q) + q P1/P0)^a] = sum_k C(a, k) (1 - q)^(a - k) q^k E_P0[(P1/P0)^k], whose terms are
exp((k - 1) D_k(P1 || P0)), 1 for k = 0 and 1. Averaged over u each is at most exp((k - 1) e(k)), hence at
most the Gaussian's, for which the same sum is exact (Mironov, Talwar, Zhang 2019, section 3.3). (3) Reverse
direction: Y is symmetric, so x -> Z - x swaps P0 and P1. With r = P1/P0 at x, s = 1 - q + q r and t = 1 - q +
q / r, pairing x with Z - x turns E_P0[s^a] >= E_P0[s^(1 - a)] into s^a + r t^a >= s^(1 - a) + r t^(1 - a),
that is, for r >= 1, sqrt(s) sinh(b log s) >= r sqrt(t) sinh(b log(1/t)) with b = a - 1/2. It is an equality
at b = 1/2, and the quotient of the sides grows with b because s t >= 1. So that direction is never the larger
one (their Theorem 5, here for integers). (4) Renyi bounds at one order add up under adaptive composition, so
an accountant that uses these orders alone may use the Gaussian's event.

Nothing is claimed at fractional orders or for privacy loss distributions: hence
`events.RenyiGaussianDpEvent`, which every accountant answers by whole orders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import dp_accounting as dp
import numpy as np
from numpy.typing import NDArray
from scipy import special

from fedsim import validate
from fedsim.accountants.renyi import MAX_INTEGER_ORDER
from fedsim.noise import discrete
from fedsim.validate import InputError

Array = NDArray[np.float64]
MAX_ORDER = MAX_INTEGER_ORDER


def skellam_divergence(orders: Array, squared_l2: float, l1: float, variance: float) -> Array:
    """Return an upper bound of the Renyi divergence of Skellam noise from itself shifted by whole numbers.

    Agarwal, Kairouz, Liu 2021, Theorem 3.5 ("The Skellam Mechanism for Differentially Private Federated
    Learning"): a D^2 / (2 v) + min(((2 a - 1) D^2 + 6 D1) / (4 v^2), 3 D1 / (2 v)).

    Args:
        orders: (n,) whole orders from 2.
        squared_l2, l1: of the shift, over all coordinates.
        variance: v, of the noise in every coordinate.
    """
    leading = orders * squared_l2 / (2.0 * variance)
    fine = ((2.0 * orders - 1.0) * squared_l2 + 6.0 * l1) / (4.0 * variance**2)
    return leading + np.minimum(fine, 1.5 * l1 / variance)


@dataclass(frozen=True)
class IntegerMechanism:
    """Integer noise on a rounded sum, one step.

    Attributes:
        noise_multiplier: standard deviation of the noise / sensitivity, before rounding.
        units: s, ring units to one sensitivity.
        dimension: D, coordinates that are rounded.
        kind: of `fedsim.noise.discrete`.
        shares: independent shares that make up the noise, at most; matters for the discrete Gaussian.
        least_shares: shares that have the noise's variance together.
    """

    noise_multiplier: float
    units: float
    dimension: int
    kind: str = "skellam"
    shares: int = 1
    least_shares: int = 1

    def __post_init__(self) -> None:
        validate.positive(self.noise_multiplier, "noise_multiplier")
        validate.positive(self.units, "ring units of the sensitivity")
        validate.positive(self.dimension, "dimension")
        validate.one_of(self.kind, discrete.KINDS, "kind of integer noise")
        if not 1 <= self.least_shares <= self.shares:
            raise InputError(f"least_shares must be in 1 .. {self.shares}, got {self.least_shares}.")

    @property
    def variance(self) -> float:
        """Return the noise's variance in ring units squared."""
        return (self.noise_multiplier * self.units) ** 2

    def renyi(self, max_order: int = MAX_ORDER) -> Array:
        """Return e(k) of the claim above for k = 2 .. max_order, (max_order - 1,) float64.

        Skellam: `skellam_divergence` with l1 at most sqrt(D) s + D for sure. Discrete Gaussian: half of
        |Z|^2 / v + tau D / 2 times the order (Kairouz, Liu, Steinke 2021, Proposition 14), tau from the
        number of shares.
        """
        k = np.arange(2, max_order + 1, dtype=np.float64)
        v, s, d = self.variance, self.units, float(self.dimension)
        if self.kind == "discrete_gaussian":
            tau = _tau(v / self.least_shares, self.shares)
            return self._moment(k, k / (2.0 * v)) + k * tau * d / 4.0
        l1 = math.sqrt(d) * s + d
        fine = self._moment(k, k / (2.0 * v) + (2.0 * k - 1.0) / (4.0 * v * v)) + 1.5 * l1 / (v * v)
        coarse = self._moment(k, k / (2.0 * v)) + 1.5 * l1 / v
        return np.minimum(fine, coarse)

    def _moment(self, orders: Array, per_square: Array) -> Array:
        """Bound log E exp((k - 1) c |Z|^2) / (k - 1) for c = per_square, l = (k - 1) c.

        For one entry of floor f + w, Z^2 = g^2 + w (1 - w) + W (2 f + 1) with W centred and of range 1, so by
        Hoeffding's lemma log E exp(l Z^2) <= l (g^2 + 1/4) + l^2 (2 f + 1)^2 / 8; over all entries that is
        l (s^2 + D / 4) + l^2 (s + sqrt(D) / 2)^2 / 2. And |Z| <= s + sqrt(D) always.
        """
        s, root = self.units, math.sqrt(self.dimension)
        likely = s * s + root * root / 4.0 + (orders - 1.0) * per_square * (s + root / 2.0) ** 2 / 2.0
        return per_square * np.minimum(likely, (s + root) ** 2)

    def effective_noise_multiplier(self, max_order: int = MAX_ORDER) -> float:
        """Return the largest sigma with e(k) <= k / (2 sigma^2) for k = 2 .. max_order."""
        k = np.arange(2, max_order + 1, dtype=np.float64)
        return float(np.sqrt(np.min(k / (2.0 * self.renyi(max_order)))))

    def sampled_renyi(self, sampling_rate: float, max_order: int = MAX_ORDER) -> Array:
        """Return the Renyi divergence bound of one Poisson sampled step at orders 2 .. max_order."""
        return sampled(self.renyi(max_order), sampling_rate)

    def epsilon(self, sampling_rate: float, steps: int, delta: float, max_order: int = MAX_ORDER) -> float:
        """Return epsilon of `steps` steps from the mechanism's own bounds; the event's is never smaller."""
        total = steps * self.sampled_renyi(sampling_rate, max_order)
        orders = [float(k) for k in range(2, max_order + 1)]
        return float(dp.rdp.compute_epsilon(orders, list(total), delta)[0])


def sampled(renyi: Array, sampling_rate: float) -> Array:
    """Return the Renyi divergences after Poisson sampling, step (2) of the proof above.

    Args:
        renyi: (n,) e(k) for k = 2 .. n + 1, for symmetric additive noise.
        sampling_rate: q, 0 < q <= 1.

    Returns:
        (n,) bounds at orders 2 .. n + 1.
    """
    if not 0.0 < sampling_rate <= 1.0:
        raise InputError(f"sampling rate must be above 0 and at most 1, got {sampling_rate!r}.")
    if sampling_rate == 1.0:
        return renyi
    logs = np.concatenate([[0.0, 0.0], np.arange(1, len(renyi) + 1) * renyi])
    out = np.empty(len(renyi))
    for order in range(2, len(renyi) + 2):
        k = np.arange(order + 1, dtype=np.float64)
        choose = special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
        terms = choose + (order - k) * math.log1p(-sampling_rate) + k * math.log(sampling_rate)
        out[order - 2] = max(0.0, float(special.logsumexp(terms + logs[: order + 1]))) / (order - 1)
    return out


def _tau(share: float, shares: int) -> float:
    """How far a sum of discrete Gaussians is from one (Kairouz, Liu, Steinke 2021, Theorem 9)."""
    if shares > 1 and share < 0.25:
        return math.inf  # the theorem needs shares of standard deviation 1/2 or more
    k = np.arange(1, shares, dtype=np.float64)
    return 10.0 * float(np.sum(np.exp(-2.0 * math.pi**2 * share * k / (k + 1.0))))
