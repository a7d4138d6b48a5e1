"""Label skew: shards of one label, or label shares drawn from a Dirichlet distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim import validate
from fedsim.partitions import PARTITIONS
from fedsim.partitions.base import Ints, Material, Scheme, by_label, even_sizes
from fedsim.validate import InputError


@PARTITIONS.register("shards")
@dataclass(frozen=True)
class Shards(Scheme):
    """Sort by label, cut into equal shards, deal `per_holder` to each (McMahan et al. 2017, s. 3).

    Attributes:
        per_holder: shards a holder gets.
    """

    per_holder: int = 2

    def __post_init__(self) -> None:
        validate.positive(self.per_holder, "federation.partition.options.per_holder")

    def spread(self, material: Material, holders: int, rng: np.random.Generator) -> Ints:
        """See `Scheme.spread`."""
        labels = material.labels("shards")
        n, per_holder = len(labels), self.per_holder
        shards = holders * per_holder
        if shards > n:
            raise InputError(
                f"federation.partition.options.per_holder must be at most {n // holders} for {holders} "
                f"holders and {n} examples, got {per_holder}. A shard holds at least one example."
            )
        owner = rng.permutation(shards) // per_holder
        order = by_label(labels, rng)
        holder_of = np.empty(n, dtype=np.int64)
        holder_of[order] = np.repeat(owner, even_sizes(n, shards))
        return holder_of


@PARTITIONS.register("dirichlet")
@dataclass(frozen=True)
class Dirichlet(Scheme):
    """Label skew of Hsu, Qi and Brown 2019, s. 3.1: equal sizes, label shares q_h ~ Dirichlet(total * p).

    p is the label distribution of the whole data, and `total` the concentration: 0 gives holders of one
    label, infinity an iid split, and (before supplies run short) the expected sum of squared shares is
    (1 + total * sum(p ** 2)) / (1 + total).

    Examples are drawn without replacement. All holders ask for labels at once; a label asked for more often
    than it is left goes to the holders in a random order until it is used up, and who missed out asks again
    among the labels left. Each round but the last uses up a label: at most as many rounds as labels.

    Attributes:
        alpha: the concentration, as `concentration` says.
        concentration: "total": alpha is that of all labels together; "per_class": alpha is what each label
            has on average, as most libraries mean it, so that total is alpha times the number of labels.
    """

    alpha: float = 0.5
    concentration: str = "total"

    def __post_init__(self) -> None:
        validate.positive(self.alpha, "federation.partition.options.alpha")
        validate.one_of(
            self.concentration, ("total", "per_class"), "federation.partition.options.concentration"
        )

    def spread(self, material: Material, holders: int, rng: np.random.Generator) -> Ints:
        """See `Scheme.spread`."""
        labels = material.labels("dirichlet")
        classes, position, supply = np.unique(labels, return_inverse=True, return_counts=True)
        total = self.alpha * (len(classes) if self.concentration == "per_class" else 1)
        concentration = np.tile(total * supply / len(labels), (holders, 1))
        # Gamma(a) = Gamma(a + 1) * U ** (1 / a), kept as a logarithm: for small a the shares themselves
        # underflow, and which label a holder turns to when its first one has run out would be lost.
        log_shares = np.log(rng.standard_gamma(concentration + 1.0))
        log_shares -= rng.standard_exponential(concentration.shape) / concentration
        wanted = even_sizes(len(labels), holders)
        counts = np.zeros((holders, len(classes)), dtype=np.int64)
        while wanted.any():
            active = np.flatnonzero(wanted)
            odds = np.where(supply > 0, log_shares[active], -np.inf)
            odds = np.exp(odds - odds.max(axis=1, keepdims=True))
            asked = rng.multinomial(wanted[active], odds / odds.sum(axis=1, keepdims=True))
            asked[:, supply == 0] = 0  # rounding may leave a trace of probability on the last label
            before = np.cumsum(asked, axis=0) - asked
            asked = np.clip(supply - before, 0, asked)
            counts[active] += asked
            wanted[active] -= asked.sum(axis=1)
            supply = supply - asked.sum(axis=0)
        holder_of = np.empty(len(labels), dtype=np.int64)
        # Rows were served first to last; which holder has which row is random.
        owners = np.tile(rng.permutation(holders), len(classes))
        holder_of[by_label(position, rng)] = np.repeat(owners, counts.T.ravel())
        return holder_of
