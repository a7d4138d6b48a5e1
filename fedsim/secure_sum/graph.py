"""Who exchanges masks with whom: a random circle graph, and how many neighbours are enough.

Bell et al. 2020, section 3: holders in random order on a circle, each linked with the nearest degree / 2 on
both sides (a Harary graph). The cost of a holder then depends on the degree alone, which needs to grow only
with the logarithm of the number of holders.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedsim import seeds, validate
from fedsim.validate import InputError


@dataclass(frozen=True)
class SafeGraph:
    """A degree with the threshold of its secret sharing.

    Attributes:
        degree: neighbours of a holder; all others when it is `holders - 1`.
        threshold: shares that rebuild a secret; at least `least_threshold`, at most the surviving neighbours.
    """

    degree: int
    threshold: int


def neighbourhoods(present: NDArray[np.int64], degree: int, key: bytes) -> dict[int, NDArray[np.int64]]:
    """Return each present holder's neighbours, sorted.

    Args:
        present: (n,) distinct holder ids, ascending.
        degree: wanted neighbours; rounded up to an even number, everybody when that reaches n - 1.
        key: 32 bytes that fix the random order.
    """
    count = len(present)
    reach = -(-degree // 2)
    if 2 * reach >= count - 1:
        return {int(h): present[present != h] for h in present}
    order = present[np.argsort(seeds.words(key, 0, count), kind="stable")]
    steps = np.concatenate([np.arange(-reach, 0), np.arange(1, reach + 1)])
    around = np.sort(order[(np.arange(count)[:, None] + steps) % count], axis=1)
    return {int(holder): around[place] for place, holder in enumerate(order)}


def width(holders: int, degree: int) -> int:
    """Return how many neighbours a holder has when everybody is there."""
    return min(2 * -(-degree // 2), holders - 1)


def least_threshold(neighbours: int, corrupt: int) -> int:
    """Return the smallest threshold t at which no two secrets of one holder can be rebuilt, 2 t > m + c.

    The server may tell some neighbours that a holder's vector arrived and others that it did not. An honest
    neighbour then gives a share of one secret, a corrupt one of both: together m + c, less than 2 t.
    """
    return (neighbours + corrupt) // 2 + 1


def corrupt_neighbours(holders: int, degree: int, corrupt: float, privacy_bits: int = 40) -> int:
    """Return what no holder's number of corrupt neighbours exceeds, except with probability
    2^-(privacy_bits + 1) over the graph; at full degree for certain."""
    others, bad = holders - 1, math.floor(corrupt * holders)
    if (near := width(holders, degree)) == others:
        return min(bad, others)
    return _at_most(others, bad, near, 2.0 ** -(privacy_bits + 1) / holders)


def _at_most(others: int, marked: int, near: int, chance: float) -> int:
    """Return the smallest c with P(more than c of `near` neighbours are among the `marked`) <= chance."""

    def unlikely(c: int) -> bool:
        return bool(stats.hypergeom.sf(c, others, marked, near) <= chance)

    return bisect.bisect_left(range(near), True, key=unlikely)


def check_threshold(holders: int, graph: SafeGraph, corrupt: float) -> None:
    """Refuse a threshold that lets the server and a share of corrupt holders rebuild two secrets of a holder.

    Raises:
        InputError: the threshold is below `least_threshold`.
    """
    near, bad = width(holders, graph.degree), corrupt_neighbours(holders, graph.degree, corrupt)
    if graph.threshold < (least := least_threshold(near, bad)):
        raise InputError(
            f"the share threshold must be at least {least}, more than half of a holder's {near} neighbours "
            f"and the {bad} of them that may be corrupt, got {graph.threshold}: with fewer a server that "
            "tells different stories of who dropped rebuilds both secrets of a holder, and its vector. Raise "
            "the threshold, or lower the share of corrupt holders."
        )


def safe_graph(
    holders: int, corrupt: float, dropped: float, privacy_bits: int = 40, failure_bits: int = 20
) -> SafeGraph:
    """Return the smallest degree, with a threshold, at which the sum is private and survives dropouts.

    Union bounds over all holders and over corrupt and dropped sets chosen before the order is drawn (Bell
    et al. 2020, Definition 3.3): except with probability 2^-privacy_bits every threshold is at least
    `least_threshold` of its holder's corrupt neighbours and the honest survivors stay connected; except with
    probability 2^-failure_bits every holder keeps `threshold` neighbours. At full degree the counts are
    certain.

    Args:
        holders: n, at least 2.
        corrupt: share of holders that may work with the server, 0 <= corrupt < 1.
        dropped: share of holders that may drop out, 0 <= dropped < 1.

    Raises:
        InputError: no degree does, because too many are corrupt or dropped together: about
            corrupt + 2 dropped must be below 1.
    """
    remedy = "The sum of one holder is its vector."
    validate.in_range(holders, 2, 2**30, "holders of a secure sum", remedy)
    validate.in_range(corrupt, 0.0, 1.0, "share of corrupt holders")
    validate.in_range(dropped, 0.0, 1.0, "share of dropped holders")
    others = holders - 1
    bad, gone = math.floor(corrupt * holders), math.floor(dropped * holders)
    leak, fail = 2.0**-privacy_bits / 2.0, 2.0**-failure_bits
    for degree in range(2, others, 2):
        # A cut of the circle needs degree / 2 holders in a row that are all corrupt or gone.
        cut = holders * ((bad + gone) / others) ** (degree // 2)
        low = least_threshold(degree, corrupt_neighbours(holders, degree, corrupt, privacy_bits))
        high = degree - _at_most(others, gone, degree, fail / holders)  # largest t that the survivors reach
        if cut <= leak and low <= high:
            return SafeGraph(degree, (low + high) // 2)
    low, high = least_threshold(others, min(bad, others)), others - gone
    if low > high:
        raise InputError(
            f"a secure sum of {holders} holders cannot stand {bad} corrupt and {gone} dropped ones: the "
            f"share threshold must be at least {low}, more than half of a holder's {others} neighbours and "
            "the corrupt ones, so that a server that tells different stories of who dropped learns nothing; "
            f"and at most {high}, the neighbours that stay. Lower one of the two shares: corrupt and twice "
            "the dropped ones must be below 1 together."
        )
    return SafeGraph(others, (low + high) // 2)
