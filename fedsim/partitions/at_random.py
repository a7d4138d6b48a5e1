"""Labels at random: equal sizes, or sizes by a power law."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim import validate
from fedsim.partitions import PARTITIONS
from fedsim.partitions.base import Ints, Material, Scheme, deal, even_sizes, in_random_order


@PARTITIONS.register("iid")
@dataclass(frozen=True)
class Iid(Scheme):
    """A uniformly random split into sizes that differ by at most one."""

    def spread(self, material: Material, holders: int, rng: np.random.Generator) -> Ints:
        """See `Scheme.spread`."""
        return deal(in_random_order(material.examples, rng), even_sizes(material.examples, holders))

    def sizes(self, examples: int, holders: int) -> Ints:
        """See `Scheme.sizes`."""
        return even_sizes(examples, holders)


@PARTITIONS.register("power_law")
@dataclass(frozen=True)
class PowerLaw(Scheme):
    """Sizes proportional to (holder + 1) ** -exponent, raised to 1 where below it; labels at random.

    Attributes:
        exponent: of the law.
    """

    exponent: float = 1.5

    def __post_init__(self) -> None:
        validate.positive(self.exponent, "federation.partition.options.exponent")

    def spread(self, material: Material, holders: int, rng: np.random.Generator) -> Ints:
        """See `Scheme.spread`."""
        n = material.examples
        weights = np.arange(1, holders + 1, dtype=np.float64) ** -self.exponent
        # With the first m holders above one example, their scale is (n - (holders - m)) / sum of their
        # weights; the largest m whose last holder still gets an example is the fixed point (m = 1 qualifies).
        above = np.arange(1, holders + 1)
        scale = (n - holders + above) / np.cumsum(weights)
        m = int(np.flatnonzero(scale * weights >= 1.0)[-1])
        exact = np.maximum(scale[m] * weights, 1.0)
        sizes = np.floor(exact).astype(np.int64)
        short = n - int(sizes.sum())
        sizes[np.argsort(sizes - exact, kind="stable")[:short]] += 1  # largest remainders first
        return deal(in_random_order(n, rng), sizes)
