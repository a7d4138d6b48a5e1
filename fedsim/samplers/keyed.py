"""Who takes part in a step: Poisson draws over ids, and holders that are away.

Every decision is a function of (key of the step, id) alone. Word `id` of the AES-CTR stream of the key is a
uniform 64-bit number; the id is in when that number is below rate * 2**64. So the included set does not
depend on the partition, on the node that asks, on the physical batch or on which other ids are asked about.

Why the accounting stays valid when holders are away
----------------------------------------------------
Availability is drawn from a key of its own and never looks at data, so it may even be public. Fix any
pattern of availability. A step then takes each example of an available holder independently with
probability q, takes none of an unavailable holder, and adds the full noise. For an example of an available
holder that is the Poisson(q) sampled Gaussian mechanism; for an example of an unavailable holder the output
does not depend on it at all. Hence, under add/remove one, the event Poisson(q, Gaussian) at every step is
an upper bound for every example and every pattern, and for any mixture of patterns. The event must carry q,
not q * availability: whether a holder was away may be known. The learning rule divides by the public
expected batch B = q * N * availability, which is why q = B / (N * availability) and not B / N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds, validate
from fedsim.validate import InputError

_BLOCK = 1 << 15  # words made at once: 256 KiB, stays in a core's own cache
_DENSE = 16  # ids filling at least 1/16 of their range: make the range, then pick


@dataclass(frozen=True)
class PoissonSampler:
    """Independent inclusion of every member of a population with the same probability.

    The same class draws examples (ids are global example ids) and, with a draw key of another purpose,
    whole holders (ids are holder ids).

    Attributes:
        rate: inclusion probability q, 0 < q <= 1; at 1 everybody is included.
        population: number of members N, public.
    """

    rate: float
    population: int

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise InputError(f"sampling rate must be above 0 and at most 1, got {self.rate!r}.")
        validate.positive(int(self.population), "population")

    @property
    def expected_size(self) -> float:
        """Return q * N, the mean size of a draw when everybody is available."""
        return self.rate * self.population

    def included(self, ids: NDArray[np.int64], draw_key: bytes) -> NDArray[np.bool_]:
        """Say which of `ids` are in the draw of one step.

        Args:
            ids: (n,) int64, non-negative, in any order, any subset of the population.
            draw_key: 32 bytes, `seeds.derive(root, "draw", step)`.

        Returns:
            (n,) mask. The probability is floor(q * 2**64) / 2**64: never above q, and below it by less
            than 2**-64.
        """
        return _below(ids, draw_key, self.rate)


@dataclass(frozen=True)
class HolderAvailability:
    """Each holder is reachable in a step with the same probability, independently of all data.

    Attributes:
        probability: 0 < p <= 1.
    """

    probability: float

    def __post_init__(self) -> None:
        if not 0.0 < self.probability <= 1.0:
            raise InputError(f"availability must be above 0 and at most 1, got {self.probability!r}.")

    def available(self, holder_ids: NDArray[np.int64], key: bytes) -> NDArray[np.bool_]:
        """Return the (n,) mask of reachable holders; `key` is `seeds.derive(root, "availability", step)`."""
        return _below(holder_ids, key, self.probability)


def sampling_rate(expected_batch_size: float, population: int, availability: float = 1.0) -> float:
    """Return q = B / (N * availability), the probability with which a reachable example is drawn.

    Raises:
        InputError: B is above N * availability, so that no probability gives it; or a value out of range.
    """
    validate.positive(float(expected_batch_size), "train.expected_batch_size")
    validate.positive(int(population), "number of training examples")
    if not 0.0 < availability <= 1.0:
        raise InputError(f"federation.availability must be above 0 and at most 1, got {availability!r}.")
    reachable = population * availability
    rate = expected_batch_size / reachable
    if rate > 1.0 + 1e-12:  # B = N * availability may land a rounding error above 1
        raise InputError(
            f"expected batch above N: train.expected_batch_size is {expected_batch_size:g}, and {population} "
            f"examples with availability {availability:g} give at most {reachable:g}. "
            f"Lower train.expected_batch_size to {reachable:g} or less (exactly that is full batch)."
        )
    return min(rate, 1.0)


def in_bin(ids: NDArray[np.int64], key: bytes, index: int, bins: int) -> NDArray[np.bool_]:
    """Say which of `ids` fall into bin `index` when each id is thrown into one of `bins`, all equally likely.

    Every id falls into exactly one bin, by the key alone: independently of the other ids, of whoever asks,
    and of all data. Bin j takes the words of an id between j / bins and (j + 1) / bins.

    Args:
        ids: (n,) int64, non-negative, any order.
        key: 32 bytes; used for nothing else.
        index: 0 .. bins - 1.

    Returns:
        (n,) mask.

    Raises:
        InputError: an index outside the bins.
    """
    validate.in_range(index, 0, bins - 1, "bin index")
    below = PoissonSampler((index + 1) / bins, 1).included(ids, key)
    if index == 0:
        return below
    return below & ~PoissonSampler(index / bins, 1).included(ids, key)


def _below(ids: NDArray[np.int64], key: bytes, probability: float) -> NDArray[np.bool_]:
    """Mask of the ids whose word in the stream of `key` is below probability * 2**64."""
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise InputError(f"ids must be a one-dimensional int64 array, got {ids.dtype} of shape {ids.shape}.")
    if ids.size == 0:
        return np.zeros(0, dtype=np.bool_)
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        raise InputError(f"ids must not be negative, got {low}.")
    if probability >= 1.0:
        return np.ones(ids.size, dtype=np.bool_)
    limit = np.uint64(math.floor(math.ldexp(probability, 64)))
    span = high - low + 1
    if span <= _DENSE * ids.size:
        mask = _range_below(low, span, key, limit)
        whole = span == ids.size and bool(np.all(ids[1:] > ids[:-1]))
        return mask if whole else mask[ids - low]
    if bool(np.all(ids[1:] >= ids[:-1])):
        return _sorted_below(ids, key, limit)
    order = np.argsort(ids, kind="stable")
    mask = np.empty(ids.size, dtype=np.bool_)
    mask[order] = _sorted_below(ids[order], key, limit)
    return mask


def _range_below(start: int, count: int, key: bytes, limit: np.uint64) -> NDArray[np.bool_]:
    mask = np.empty(count, dtype=np.bool_)
    for done in range(0, count, _BLOCK):
        part = mask[done : done + _BLOCK]
        np.less(seeds.words(key, start + done, part.size), limit, out=part)
    return mask


def _sorted_below(ids: NDArray[np.int64], key: bytes, limit: np.uint64) -> NDArray[np.bool_]:
    """For ascending ids with gaps: make the range of words around them, block by block, skipping gaps."""
    mask = np.empty(ids.size, dtype=np.bool_)
    begin = 0
    while begin < ids.size:
        first = int(ids[begin])
        end = int(np.searchsorted(ids, first + _BLOCK))
        span = int(ids[end - 1]) - first + 1
        block = seeds.words(key, first, span) < limit
        mask[begin:end] = block[ids[begin:end] - first]
        begin = end
    return mask
