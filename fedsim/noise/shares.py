"""Noise in shares: how a vector becomes integers, and how much noise each holder must add.

A holder's clipped sum is rotated (random signs, then a Walsh-Hadamard transform: an isometry that spreads the
vector evenly over its coordinates), scaled and rounded to integers without bias; then its share of integer
noise is added. The server undoes scale and rotation on the sum of all.

Rounding uses one uniform dither a coordinate, drawn apart from the data: x becomes floor(x + u). For two
data sets that differ in one example of gradient g, the rounded vectors differ, over the draw of u, by exactly
the independent unbiased rounding of the rotated and scaled g, whatever the rest of the sum is. So one example
is bounded although only the sum of many is rounded, and no rejection is needed (compare the conditional
rounding of Kairouz, Liu, Steinke 2021, which bounds a single rounded vector); fedsim.privacy.discrete has
what follows for the privacy loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds, validate
from fedsim.noise import discrete
from fedsim.validate import InputError, RunError

_WRAP_BITS = 60  # a value beyond the bounds below has probability at most 2^-60


@dataclass(frozen=True)
class Quantiser:
    """Real vectors to integer vectors and back.

    Attributes:
        length: P, entries of a vector.
        scale: ring units to 1 of the vector.
        rotate: whether to rotate; the integer vector then has the next power of two entries.
    """

    length: int
    scale: float
    rotate: bool = True

    def __post_init__(self) -> None:
        validate.positive(self.length, "length of the vector")
        validate.positive(self.scale, "scale of the rounding")

    @property
    def dimension(self) -> int:
        """Return D, the entries of an integer vector."""
        return 1 << (self.length - 1).bit_length() if self.rotate else self.length

    def encode(self, vector: NDArray[np.floating], sign_key: bytes, dither_key: bytes) -> NDArray[np.int64]:
        """Return the rounded vector, int64 (D,); its mean over the dither is the rotated, scaled vector.

        Values are computed in float64: right to 1e-15 of the vector's norm, whatever the scale.

        Args:
            vector: (P,).
            sign_key: 32 bytes, the same for all holders and the server; may be public.
            dither_key: 32 bytes, one a holder and step.
        """
        values = self._rotate(vector.astype(np.float64), sign_key) * self.scale
        dither = (seeds.words(dither_key, 0, self.dimension) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.floor(values + dither).astype(np.int64)

    def decode(self, total: NDArray[np.int64], sign_key: bytes) -> NDArray[np.float64]:
        """Return the vector (P,) whose rotation, scaled, is `total` (D,)."""
        values = total.astype(np.float64) / self.scale
        if not self.rotate:
            return values
        return (_signs(sign_key, self.dimension) * hadamard(values))[: self.length]

    def bound(self, norm: float, vectors: int) -> int:
        """Return what no entry of an encoded vector of this L2 norm exceeds.

        With rotation an entry is a sum with random signs, sub-Gaussian with norm / sqrt(D): the bound holds
        for all entries of `vectors` vectors except with probability 2^-60. Without, an entry can be the norm.
        """
        if not self.rotate:
            return math.ceil(norm * self.scale) + 1
        tail = math.sqrt(2.0 * math.log(2.0 * self.dimension * vectors * 2.0**_WRAP_BITS) / self.dimension)
        return math.ceil(norm * self.scale * min(1.0, tail)) + 1

    def _rotate(self, vector: NDArray[np.float64], sign_key: bytes) -> NDArray[np.float64]:
        if vector.shape != (self.length,):
            raise InputError(f"vector must have {self.length} entries, got shape {vector.shape}.")
        if not self.rotate:
            return vector
        padded = np.zeros(self.dimension)
        padded[: self.length] = vector
        return hadamard(_signs(sign_key, self.dimension) * padded)


@dataclass(frozen=True)
class NoiseShares:
    """Holders' shares of one noise: any `min_survivors` of them together have the wanted variance.

    Attributes:
        variance: wanted variance of the sum, in ring units squared.
        holders: n, who may take part.
        min_survivors: shares that suffice, 1 .. n; smaller means more noise when all are there.
        kind: of `fedsim.noise.discrete`.
    """

    variance: float
    holders: int
    min_survivors: int
    kind: str = "skellam"

    def __post_init__(self) -> None:
        validate.positive(self.variance, "variance of the noise")
        validate.one_of(self.kind, discrete.KINDS, "kind of integer noise")
        if not 1 <= self.min_survivors <= self.holders:
            raise InputError(
                f"min_survivors must be between 1 and the {self.holders} holders, got {self.min_survivors}."
            )

    @property
    def share(self) -> float:
        """Return the variance (discrete Gaussian: parameter) of one holder's share."""
        return self.variance / self.min_survivors

    def realised(self, survivors: int) -> float:
        """Return the variance that the sum of `survivors` shares has."""
        return self.share * survivors

    def missing(self, survivors: int) -> float:
        """Return the variance by which `survivors` shares fall short of the wanted one, 0 or more."""
        return self.share * max(0, self.min_survivors - survivors)

    def refuse_shortfall(self, survivors: int) -> None:
        """Raise RunError where the shares of the survivors do not have the wanted variance."""
        if survivors < self.min_survivors:
            raise RunError(
                f"{survivors} holders are left, {self.min_survivors} are needed for the noise of the step. "
                "Resume when more are online. Simulated dropouts repeat on resume: then start a new run with "
                "lower strategy.options.min_survivors, or on_shortfall=top_up."
            )

    def sample(self, key: bytes, count: int) -> NDArray[np.int64]:
        """Return one holder's share of one step, int64 (count,)."""
        return discrete.sample(self.kind, self.share, key, count)

    def bound(self, count: int, shares: int = 1) -> int:
        """Return what no entry of a sum of `shares` shares exceeds: 2^-60 over `count` entries of as many
        sums as there are holders.

        Bernstein's inequality for a difference of Poisson variables; a discrete Gaussian has lighter tails.
        """
        tail = math.log(2.0 * count * self.holders * 2.0**_WRAP_BITS)
        return math.ceil(math.sqrt(2.0 * self.share * shares * tail) + tail)

    def norm_bound(self, count: int, shares: int) -> float:
        """Return what the L2 norm of a sum of `shares` shares, `count` entries, exceeds with probability at
        most 2^-59.

        Bernstein's inequality for the squares of entries cut at `bound`: their mean is at most the variance v
        and their variance at most 2 v^2 + v, which is that of a Skellam variable's square.
        """
        v, tail = self.share * shares, math.log(2.0**_WRAP_BITS)
        largest = float(self.bound(count, shares)) ** 2
        excess = math.sqrt(2.0 * tail * count * (2.0 * v * v + v)) + largest * tail / 3.0
        return math.sqrt(count * v + excess)


def hadamard(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the orthonormal Walsh-Hadamard transform of a vector of 2^m entries; it is its own inverse."""
    size = len(vector)
    if size < 1 or size & (size - 1):
        raise InputError(f"the transform needs a power of two of entries, got {size}.")
    out, spare = vector.copy(), np.empty(size)
    step = 1
    while step < size:
        pairs, to = out.reshape(-1, 2, step), spare.reshape(-1, 2, step)
        np.add(pairs[:, 0], pairs[:, 1], out=to[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=to[:, 1])
        out, spare = spare, out
        step *= 2
    return out / math.sqrt(size)


def _signs(key: bytes, count: int) -> NDArray[np.float64]:
    """Uniform +1 or -1, one bit of the key stream each, (count,)."""
    words = seeds.words(key, 0, -(-count // 64))
    bits = np.unpackbits(words.view(np.uint8), count=count)
    return 1.0 - 2.0 * bits.astype(np.float64)
