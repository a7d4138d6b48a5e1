"""Gaussian DP by its central limit (Bu, Dong, Long, Su 2020, "Deep Learning with Gaussian DP").

Many weakly sampled releases together are nearly one Gaussian of mu = the root of the sum of
q^2 (e^(1 / sigma^2) - 1). Nearly: the true epsilon is above it by an amount that nobody bounds, so it is
shown beside others and never claimed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsim.accountants import ACCOUNTANTS
from fedsim.accountants.base import Accountant
from fedsim.privacy import loss_distribution
from fedsim.privacy.loss_distribution import TOLERANCE, Part


@ACCOUNTANTS.register("gdp")
@dataclass(frozen=True)
class Gdp(Accountant):
    """The central limit of Gaussian DP: an approximation, quick and too optimistic; not a bound."""

    is_upper_bound = False

    def epsilon(
        self, parts: tuple[Part, ...], delta: float, tolerance: float = TOLERANCE
    ) -> tuple[float | None, str]:
        """See `Accountant.epsilon`."""
        exponents = [(part.examples / part.noise_multiplier) ** 2 for part in parts]
        if max(exponents) > 700.0:
            return None, "not computable: the noise is too small for the central limit"
        squared = math.fsum(
            part.times
            * (exponent if part.sampling_rate == 1.0 else part.sampling_rate**2 * math.expm1(exponent))
            for part, exponent in zip(parts, exponents, strict=True)
        )
        return loss_distribution.gaussian(squared**-0.5, delta)
