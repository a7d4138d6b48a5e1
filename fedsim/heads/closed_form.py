"""The accounting of Mehta et al. 2023: a closed form, looser than an exact one.

Gaussian releases with squared sensitivities over variances that add up to beta satisfy (beta /
2)-concentrated differential privacy, and so (epsilon, delta) with epsilon = beta / 2 + sqrt(2 beta ln(1 /
delta)) (Bun and Steinke 2016, propositions 1.6 and 1.3). Exactly, they are one Gaussian of noise multiplier
beta^(-1/2): at delta 1e-5 and a closed form of 8 its epsilon is 6.76. Use this to compare with the paper's
tables, not to account a run.
"""

from __future__ import annotations

import math

from fedsim import validate


def epsilon(beta: float, delta: float) -> float:
    """Return beta / 2 + sqrt(2 beta ln(1 / delta)), an upper bound on the exact epsilon.

    Raises:
        InputError: beta is not positive, or delta not within (0, 1).
    """
    validate.positive(beta, "beta")
    return beta / 2 + math.sqrt(2 * beta * _log(delta))


def beta(epsilon: float, delta: float) -> float:
    """Return the beta that `epsilon` maps to this epsilon.

    Raises:
        InputError: epsilon is not positive, or delta not within (0, 1).
    """
    validate.positive(epsilon, "epsilon")
    log = _log(delta)
    # The root of u^2 / 2 + u sqrt(2 log) = epsilon, in the form that does not cancel where epsilon is small.
    return (2 * epsilon / (math.sqrt(2 * log + 2 * epsilon) + math.sqrt(2 * log))) ** 2


def noise_multiplier(epsilon: float, delta: float, releases: float = 1.0) -> float:
    """Return the noise multiplier of each of several releases of equal share.

    Args:
        epsilon, delta: what all of them may cost together.
        releases: how many: DP-LS 3, DP-Newton 2 T, DP-FC 1 + T.

    Raises:
        InputError: a value out of range.
    """
    validate.positive(releases, "releases")
    return math.sqrt(releases / beta(epsilon, delta))


def _log(delta: float) -> float:
    validate.in_range(delta, 1e-300, 1 - 1e-12, "delta")
    return -math.log(delta)
