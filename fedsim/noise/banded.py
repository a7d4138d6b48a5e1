"""Banded matrix factorisation: the noise of a step takes back part of the noise of the steps before.

The running sum of the noisy gradients is then less noisy than with independent noise. An example that can
take part in every `bands`-th step only has columns of the factor that share no row: each cycle of a sampler
with that separation is one release (Choquette-Choo et al. 2023, amplification of banded matrices). Fewer,
less amplified releases: more bands cost amplification and buy correlation. With one band this is independent
noise, bit for bit.

A holder with several examples takes part in several steps of a cycle, and columns of neighbouring cycles do
overlap. Split the noise into two independent halves of the variance, one for even and one for odd cycles:
cycles of one parity share no row, so each cycle is a release at noise multiplier sigma / sqrt(2) whose
shift, whatever its direction, is at most the number of the holder's examples that were drawn. That event
bounds the holder; adding the two halves is post-processing.

Source: Choquette-Choo, Ganesh, McKenna, McMahan, Rush, Thakurta, Xu 2023, "(Amplified) banded matrix
factorization: a unified approach to private training"; coefficients: McKenna 2024, "Scaling up the banded
matrix factorization mechanism for large scale differentially private ML".
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular, toeplitz
from scipy.optimize import minimize
from scipy.signal import lfilter

from fedsim import seeds, validate
from fedsim.noise import NOISE
from fedsim.noise.gaussian import standard_normal
from fedsim.noise.over_time import NoiseOverTime
from fedsim.noise.stream import Array
from fedsim.samplers import Participation

_LEAST_RATIO = 1e-6  # of neighbouring coefficients: at 0 the gradient of all later ones would vanish


@NOISE.register("banded")
@dataclass(frozen=True)
class Banded(NoiseOverTime):
    """Noise that cancels in part over the next steps; optimal for the prefix sums of the whole run.

    Attributes:
        bands: non-zero diagonals of the factor; 1 is independent noise, null as many as the sampler's groups.
    """

    bands: int | None = None

    correlated = True
    said = "correlated over steps"

    def __post_init__(self) -> None:
        if self.bands is not None:
            validate.positive(self.bands, "noise.options.bands")

    def check(self, participation: Participation, steps: int) -> None:
        """See `NoiseOverTime.check`: participations must be at least `bands` steps apart."""
        least = 2 if self.bands is None else self.bands
        if participation.separation < least:
            validate.conflicts(
                f"noise.name=banded with {self.bands or 'at least 2'} bands needs units whose steps are "
                f"that many apart, but with this sampler they can be {participation.separation} apart.",
                "Use sampler=cyclic with as many groups or more, or noise=independent.",
            )

    def factorisation(self, participation: Participation, steps: int) -> BandedToeplitz:
        """See `NoiseOverTime.factorisation`; it depends on bands and the number of configured steps alone."""
        return BandedToeplitz(optimal_coefficients(self._bands(participation), steps))

    def holder_factor(self, participation: Participation, steps: int) -> float:
        """See `NoiseOverTime.holder_factor`: columns of neighbouring cycles overlap."""
        return math.sqrt(0.5) if self._bands(participation) > 1 and steps > participation.period else 1.0

    def _bands(self, participation: Participation) -> int:
        return participation.separation if self.bands is None else self.bands


@dataclass(frozen=True)
class BandedToeplitz:
    """C with coefficient j on its diagonal j below the main one, zero from `bands` on; M is its inverse.

    Attributes:
        coefficients: (bands,) floats, the first 1 and none larger than the one before: then the inverse
            does not grow along the steps (Enestrom and Kakeya: no zero inside the unit circle).
    """

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        c = self.coefficients
        if not c or c[0] != 1.0 or c[-1] < 0.0 or any(b > a for a, b in itertools.pairwise(c)):
            validate.conflicts(
                f"coefficients must begin with 1, be non-negative and never rise, got {c}.",
                "Take them from optimal_coefficients.",
            )

    @property
    def bands(self) -> int:
        """Return the number of non-zero diagonals: the separation at which columns share no row."""
        return len(self.coefficients)

    def column_norm(self, steps: int) -> float:
        """Return the norm of the first column, which no other exceeds.

        A unit that takes part k times, at least `bands` steps apart, moves C x by at most sqrt(k) times
        this (Choquette-Choo et al. 2023): its columns are orthogonal.
        """
        return math.sqrt(math.fsum(c * c for c in self.coefficients[:steps]))

    def factors(self, steps: int) -> tuple[Array, Array]:
        """Return (C, inverse of C), both (steps, steps)."""
        column = np.zeros(steps)
        held = self.coefficients[:steps]
        column[: len(held)] = held
        encoder = np.tril(toeplitz(column))
        return encoder, solve_triangular(encoder, np.eye(steps), lower=True)

    def first_needed(self, step: int) -> int:
        """Return 0: the inverse of a band has no band."""
        return 0

    def rows(self, step: int) -> int:
        """Return how many past rows of M z the next one needs."""
        return min(step, self.bands - 1)

    def advance(
        self, memory: list[Array], root: seeds.Root, step: int, count: int
    ) -> tuple[Array, list[Array]]:
        """Solve C noise = z for the next row by substitution; memory holds the last rows, newest first."""
        noise = standard_normal(seeds.derive(root, "noise", step), count)
        scaled = np.empty_like(noise) if memory else noise
        for c, row in zip(self.coefficients[1:], memory, strict=False):
            np.multiply(row, c, out=scaled)
            np.subtract(noise, scaled, out=noise)
        kept = [noise.copy(), *memory][: self.bands - 1] if self.bands > 1 else []
        return noise, kept


@functools.lru_cache(maxsize=64)
def optimal_coefficients(bands: int, steps: int) -> tuple[float, ...]:
    """Return the coefficients of C with the least mean squared prefix-sum error at equal privacy.

    Minimises column norm squared times the mean squared row norm of A C^-1 over `steps` steps (the loss of
    McKenna 2024) by L-BFGS-B over the ratios of neighbouring coefficients in [0, 1], started at the
    Toeplitz square root of A (Fichtenberger, Henzinger, Upadhyay 2023). Deterministic; O(steps * bands)
    an evaluation. Bands beyond `steps` would touch nothing and are left out.

    Raises:
        InputError: bands or steps not positive.
    """
    validate.positive(bands, "bands")
    validate.positive(steps, "steps")
    width = min(bands, steps)
    if width == 1:
        return (1.0,)
    start = np.array([(2 * j - 1) / (2 * j) for j in range(1, width)])
    found = minimize(
        _log_error,
        start,
        args=(steps,),
        jac=True,
        method="L-BFGS-B",
        bounds=[(_LEAST_RATIO, 1.0)] * (width - 1),
        options={"maxiter": 1000, "ftol": 1e-10, "gtol": 1e-9},
    )
    ratios = found.x if found.fun <= _log_error(start, steps)[0] else start
    return (1.0, *(float(c) for c in np.cumprod(ratios)))


def _log_error(ratios: Array, steps: int) -> tuple[float, Array]:
    """Return the logarithm of the error, and its gradient (bands - 1,) in the ratios.

    A C^-1 is Toeplitz too: its first column w has the generating function 1 / ((1 - x) c(x)), and entry i
    occurs in steps - i rows.
    """
    c = np.concatenate([[1.0], np.cumprod(ratios)])
    impulse = np.zeros(steps)
    impulse[0] = 1.0
    w = np.cumsum(lfilter([1.0], c, impulse))
    weighted = w * (steps - np.arange(steps)) / steps
    error, norm = float(weighted @ w), float(c @ c)
    u = lfilter([1.0], c, w)  # the derivative of w in c[j] is -u, j places later
    by_c = np.array([-2.0 * float(weighted[j:] @ u[: steps - j]) for j in range(1, len(c))]) / error
    by_c += 2.0 * c[1:] / norm
    tail = np.cumsum((by_c * c[1:])[::-1])[::-1]
    return math.log(error) + math.log(norm), tail / ratios
