"""What a masked, rounded sum with noise in shares is made of: scale, shares of noise, ring and mask graph.

The server finds the coarsest scale of the rounding that costs almost no privacy and fits the ring, from
public numbers alone; it sends what a node cannot derive from the configuration (`MaskedSum.to_arrays`). Who
exchanges masks with whom both sides find for themselves: a threshold that somebody else chooses is no
protection.

Several parts of a statistic are one vector: each is weighted so that all entries carry noise of one scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import secure_sum
from fedsim.noise.shares import NoiseShares, Quantiser
from fedsim.privacy.discrete import IntegerMechanism
from fedsim.validate import InputError

_WANTED = 0.995  # effective / real noise multiplier at which a finer scale is no longer worth its bits
_LEAST = 0.9  # below this the rounding costs more than it should: the ring is too small
_UNITS = 5.0  # wanted noise / (ring unit * root of the holders): rounding then adds under 1% of its variance


@dataclass(frozen=True)
class Terms:
    """What the configuration says about a masked sum.

    Attributes:
        holders: of the federation.
        survivors: holders whose shares together are the full noise.
        least: fewest inputs of a step that is not refused.
        noise: "skellam" or "discrete_gaussian".
        ring_bits: 32 or 64; None: 32 where the sum fits.
        rotate: whether vectors are rotated before they are rounded.
        graph: who exchanges masks.
    """

    holders: int
    survivors: int
    least: int
    noise: str
    ring_bits: int | None
    rotate: bool
    graph: secure_sum.SafeGraph


@dataclass(frozen=True)
class Vector:
    """The parts of a statistic as one vector.

    Attributes:
        lengths: entries of each part.
        weights: what each part is multiplied with.
        sensitivity: L2 bound on one unit's contribution to the weighted vector.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    sensitivity: float

    @classmethod
    def of(cls, lengths: Sequence[int], bounds: Sequence[float], multipliers: Sequence[float]) -> Vector:
        """Return the vector whose entries all carry the noise of the first part."""
        stds = [m * bound for m, bound in zip(multipliers, bounds, strict=True)]
        weights = tuple(stds[0] / std for std in stds)
        weighted = [weight * bound for weight, bound in zip(weights, bounds, strict=True)]
        sensitivity = bounds[0] if len(bounds) == 1 else math.hypot(*weighted)
        return cls(tuple(lengths), weights, sensitivity)

    @property
    def length(self) -> int:
        """Return the entries of all parts."""
        return sum(self.lengths)

    def weighted(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the parts (length,), one after the other, each with its weight."""
        return values if len(self.lengths) == 1 else values * np.repeat(self.weights, self.lengths)

    def parts(self, vector: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Return the parts of a weighted vector (length,), without the weights."""
        if len(self.lengths) == 1:
            return [vector]
        pieces = np.split(vector, np.cumsum(self.lengths)[:-1])
        return [piece / weight for piece, weight in zip(pieces, self.weights, strict=True)]


@dataclass(frozen=True)
class MaskedSum:
    """What server and holders must agree on."""

    settings: secure_sum.Settings
    quantiser: Quantiser
    shares: NoiseShares
    vector: Vector

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return what a node cannot derive from the configuration."""
        whole = [self.settings.bound, self.settings.ring.bits, *self.vector.lengths]
        real = [self.quantiser.scale, self.shares.variance, *self.vector.weights]
        return {"whole": np.array(whole, dtype=np.int64), "real": np.array(real, dtype=np.float64)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], terms: Terms) -> MaskedSum:
        """Return what `to_arrays` told; a node does not need the sensitivity, which is left at 0."""
        bound, bits, *lengths = arrays["whole"].tolist()
        scale, variance, *weights = arrays["real"].tolist()
        return _agreed(
            terms,
            Quantiser(sum(lengths), scale, terms.rotate),
            NoiseShares(variance, terms.holders, terms.survivors, terms.noise),
            secure_sum.Ring(bits),
            bound,
            Vector(tuple(lengths), tuple(weights), 0.0),
        )


def with_effective(
    wanted: float, terms: Terms, vector: Vector, most_of_a_holder: int
) -> tuple[MaskedSum, IntegerMechanism]:
    """Return the sum whose effective noise multiplier is just at least `wanted`; see `scaled`."""
    multiplier = wanted
    while True:  # effective / real is at least _LEAST and grows with the noise: a few rounds
        setup, mechanism = scaled(multiplier, terms, vector, most_of_a_holder)
        effective = mechanism.effective_noise_multiplier()
        if effective >= wanted:
            return setup, mechanism
        multiplier *= wanted / effective * (1.0 + 1e-9)


def scaled(
    multiplier: float, terms: Terms, vector: Vector, most_of_a_holder: int
) -> tuple[MaskedSum, IntegerMechanism]:
    """Return the coarsest scale (a power of two) at which rounding costs almost nothing, or the finest
    that fits the ring.

    Args:
        multiplier: standard deviation, before rounding costs, of the noise that `terms.survivors` shares
            make together / sensitivity.
        terms: what the configuration says.
        vector: what is summed.
        most_of_a_holder: largest number of units of one holder, public.

    Raises:
        InputError: the ring is too small for the sum at any scale that is fine enough.
    """
    # What does not depend on the scale is refused first, in its own words.
    shares = NoiseShares(1.0, terms.holders, terms.survivors, terms.noise)
    _agreed(terms, Quantiser(1, 1.0), shares, secure_sum.Ring(64), 1, Vector((1,), (1.0,), 1.0))
    best: tuple[MaskedSum, IntegerMechanism] | None = None
    refusal: InputError | None = None
    dimension = Quantiser(vector.length, 1.0, terms.rotate).dimension
    for exponent in range(63):
        mechanism = IntegerMechanism(
            multiplier,
            2.0**exponent,
            dimension,
            terms.noise,
            terms.holders,
            min(terms.survivors, terms.holders),
        )
        try:
            setup = _setup_at(mechanism, terms, vector, most_of_a_holder)
        except InputError as error:
            refusal = error
            break
        best = setup, mechanism
        if _efficiency(mechanism) >= _WANTED and _fineness(mechanism) >= _UNITS:
            return best
    if best is None or _efficiency(best[1]) < _LEAST or _fineness(best[1]) < 1.0:
        raise InputError(
            f"strategy.options: no scale fits. {refusal} At the finest scale that fits, rounding would "
            "cost more than a tenth of the noise multiplier, or be larger than the noise."
        )
    return best


def _setup_at(mechanism: IntegerMechanism, terms: Terms, vector: Vector, most_of_a_holder: int) -> MaskedSum:
    sensitivity = vector.sensitivity
    quantiser = Quantiser(vector.length, mechanism.units / sensitivity, terms.rotate)
    shares = NoiseShares(mechanism.variance, terms.holders, terms.survivors, terms.noise)
    bound = quantiser.bound(most_of_a_holder * sensitivity, terms.holders) + shares.bound(quantiser.dimension)
    bits = terms.ring_bits or (32 if bound * terms.holders < secure_sum.Ring(32).half else 64)
    return _agreed(terms, quantiser, shares, secure_sum.Ring(bits), bound, vector)


def _agreed(
    terms: Terms,
    quantiser: Quantiser,
    shares: NoiseShares,
    ring: secure_sum.Ring,
    bound: int,
    vector: Vector,
) -> MaskedSum:
    graph = terms.graph
    settings = secure_sum.Settings(
        shares.holders, graph.degree, graph.threshold, terms.least, bound, ring, quantiser.dimension
    )
    return MaskedSum(settings, quantiser, shares, vector)


def _efficiency(mechanism: IntegerMechanism) -> float:
    return mechanism.effective_noise_multiplier() / mechanism.noise_multiplier


def _fineness(mechanism: IntegerMechanism) -> float:
    """Noise in units of the rounding of all holders: one unit each, so its root."""
    return math.sqrt(mechanism.variance / mechanism.shares)
