"""Which data holder owns which example, and which of them it uses.

A partition is one array: the holder of every global example id. Everything else is derived from it, so the
ids survive partitioning and a draw keyed by id does not notice how the data is spread. All schemes cover
every example exactly once, give every holder at least one example, and depend on the seed alone.

With a declared cap (`federation.examples_per_holder_at_most`) a larger holder uses that many of its examples,
chosen by a key of the run: the others keep their ids and owner and take no part in anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds, validate
from fedsim.config import FederationConfig
from fedsim.validate import InputError

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Partition:
    """The holder of every example.

    Attributes:
        holder_of: (N,) int64, holder_of[i] in 0 .. num_holders - 1 owns example i; read-only.
        num_holders: number of holders; each owns and uses at least one example.
        used: (N,) bool, whether the owner of example i uses it; read-only; None: all are used.
    """

    holder_of: Ints
    num_holders: int
    used: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        holder_of = np.asarray(self.holder_of, dtype=np.int64).view()
        holder_of.flags.writeable = False
        object.__setattr__(self, "holder_of", holder_of)
        if holder_of.ndim != 1 or (holder_of.size and not 0 <= holder_of.min() <= holder_of.max()):
            raise InputError("holder_of must be one non-negative holder per example, shape (N,).")
        counts = np.bincount(holder_of, minlength=self.num_holders)
        if len(counts) > self.num_holders or not counts.all():
            raise InputError(
                f"holder_of must name each of {self.num_holders} holders at least once and no other, got "
                f"{np.count_nonzero(counts)} distinct holders up to {len(counts) - 1}."
            )

        used = (
            np.ones(holder_of.shape, np.bool_)
            if self.used is None
            else np.asarray(self.used, np.bool_).view()
        )
        used.flags.writeable = False
        object.__setattr__(self, "used", used)
        if used.shape != holder_of.shape or not self.sizes().all():
            raise InputError("used must mark at least one example of every holder, shape (N,).")

    @property
    def _used(self) -> NDArray[np.bool_]:
        assert self.used is not None  # set by __post_init__
        return self.used

    @property
    def examples(self) -> int:
        """Return the number of examples all holders use together."""
        return int(self._used.sum())

    def capped(self, at_most: int, key: bytes) -> Partition:
        """Return the partition in which no holder uses more than `at_most` examples.

        A holder's examples are ordered by their words in the stream of `key` (32 bytes), and the first ones
        are used: a uniformly random choice that depends on the key and the holder's ids alone.
        """
        validate.positive(at_most, "federation.examples_per_holder_at_most")
        order = np.lexsort((seeds.words(key, 0, len(self.holder_of)), self.holder_of))
        counts = np.bincount(self.holder_of, minlength=self.num_holders)
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        used = np.zeros(len(order), dtype=np.bool_)
        used[order] = place < at_most
        return Partition(self.holder_of, self.num_holders, used)

    def holders_of_node(self, node: int, nodes: int) -> Ints:
        """Return the sorted holders that `node` hosts: holder h lives on node h % nodes."""
        self._check_node(node, nodes)
        return np.arange(node, self.num_holders, nodes, dtype=np.int64)

    def ids_of_node(self, node: int, nodes: int) -> Ints:
        """Return the sorted global ids of all used examples whose holder lives on `node`."""
        self._check_node(node, nodes)
        return np.flatnonzero((self.holder_of % nodes == node) & self._used).astype(np.int64, copy=False)

    def sizes(self) -> Ints:
        """Return the number of examples each holder uses, (num_holders,) int64."""
        used = self.holder_of[self._used]
        return np.bincount(used, minlength=self.num_holders).astype(np.int64, copy=False)

    def label_counts(self, labels: Ints, num_classes: int) -> Ints:
        """Return how many examples of each label each holder uses, (num_holders, num_classes) int64."""
        self._check_labels(labels, num_classes)
        places = (self.holder_of * num_classes + labels)[self._used]
        cells = np.bincount(places, minlength=self.num_holders * num_classes)
        return cells.reshape(self.num_holders, num_classes).astype(np.int64, copy=False)

    def summary(self, labels: Ints) -> dict[str, float]:
        """Describe the partition: sizes in examples, label entropy in bits, effective number of classes.

        The effective number of classes of a holder is 2 to the power of its label entropy (Hill 1973, order
        1): c for a holder with c equally frequent labels. Both are means over holders. The numbers are
        functions of the private labels: sensitive.
        """
        counts = self.label_counts(labels, int(labels.max(initial=0)) + 1)
        sizes = self.sizes()
        share = counts / sizes[:, None]
        bits = -np.sum(share * np.log2(np.where(share > 0, share, 1.0)), axis=1)
        return {
            "holders": self.num_holders,
            "min_size": int(sizes.min()),
            "median_size": float(np.median(sizes)),
            "max_size": int(sizes.max()),
            "mean_label_entropy_bits": float(bits.mean()),
            "mean_effective_classes": float(np.exp2(bits).mean()),
        }

    def _check_node(self, node: int, nodes: int) -> None:
        validate.in_range(int(nodes), 1, self.num_holders, "nodes", "Every node hosts at least one holder.")
        validate.in_range(int(node), 0, int(nodes) - 1, "node")

    def _check_labels(self, labels: Ints, num_classes: int) -> None:
        if labels.shape != self.holder_of.shape:
            raise InputError(
                f"labels must have one entry for each of {len(self.holder_of)} examples, "
                f"got shape {labels.shape}."
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
            raise InputError(
                f"labels must lie in 0 .. {num_classes - 1}, got {labels.min()} .. {labels.max()}."
            )


def partition(labels: Ints, groups: Ints | None, config: FederationConfig, seed: seeds.Root) -> Partition:
    """Spread N examples over `config.holders` holders.

    Args:
        labels: (N,) int64 labels.
        groups: (N,) int64 natural owner of each example, or None.
        config: scheme (`partition`), its settings, and the cap on a holder's examples.
        seed: the run's seed, or the key for "partition" derived from it; the same seed gives the same
            partition.

    Raises:
        InputError: unknown scheme, more holders than examples, or groups that do not fit.
    """
    validate.one_of(config.partition, SCHEMES, "federation.partition")
    n, holders = len(labels), config.holders
    validate.positive(holders, "federation.holders")
    if config.partition != "natural" and holders > n:
        raise InputError(
            f"federation.holders must be at most {n}, the number of training examples, got {holders}. "
            "Every holder owns at least one example: lower federation.holders or raise data.train_examples."
        )
    if groups is not None and groups.shape != labels.shape:
        raise InputError(f"groups must have one owner for each of {n} examples, got shape {groups.shape}.")
    key = seeds.derive(seed, "partition")
    whole = Partition(SCHEMES[config.partition](labels, groups, config, seeds.generator(key)), holders)
    at_most = config.examples_per_holder_at_most
    return whole if at_most is None else whole.capped(at_most, seeds.derive(key, "used examples"))


def _iid(labels: Ints, groups: Ints | None, config: FederationConfig, rng: np.random.Generator) -> Ints:
    """A uniformly random split into sizes that differ by at most one."""
    return _deal(rng.permutation(len(labels)), _even_sizes(len(labels), config.holders))


def _power_law(labels: Ints, groups: Ints | None, config: FederationConfig, rng: np.random.Generator) -> Ints:
    """Sizes proportional to (holder + 1) ** -exponent, raised to 1 where below it; labels at random."""
    n, holders = len(labels), config.holders
    weights = np.arange(1, holders + 1, dtype=np.float64) ** -config.power_law_exponent
    # With the first m holders above one example, their scale is (n - (holders - m)) / sum of their weights;
    # the largest m whose last holder still gets an example is the fixed point (m = 1 always qualifies).
    above = np.arange(1, holders + 1)
    scale = (n - holders + above) / np.cumsum(weights)
    m = int(np.flatnonzero(scale * weights >= 1.0)[-1])
    exact = np.maximum(scale[m] * weights, 1.0)
    sizes = np.floor(exact).astype(np.int64)
    short = n - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:short]] += 1  # largest remainders first
    return _deal(rng.permutation(n), sizes)


def _shards(labels: Ints, groups: Ints | None, config: FederationConfig, rng: np.random.Generator) -> Ints:
    """Sort by label, cut into equal shards, deal `shards_per_holder` to each (McMahan et al. 2017, s. 3)."""
    n, per_holder = len(labels), config.shards_per_holder
    validate.positive(per_holder, "federation.shards_per_holder")
    shards = config.holders * per_holder
    if shards > n:
        raise InputError(
            f"federation.shards_per_holder must be at most {n // config.holders} for {config.holders} "
            f"holders and {n} examples, got {per_holder}. A shard holds at least one example."
        )
    owner = rng.permutation(shards) // per_holder
    order = _by_label(labels, rng)
    holder_of = np.empty(n, dtype=np.int64)
    holder_of[order] = np.repeat(owner, _even_sizes(n, shards))
    return holder_of


def _dirichlet(labels: Ints, groups: Ints | None, config: FederationConfig, rng: np.random.Generator) -> Ints:
    """Label skew of Hsu, Qi and Brown 2019, s. 3.1: equal sizes, label shares q_h ~ Dirichlet(alpha * p).

    p is the label distribution of the whole data, so alpha is the total concentration: alpha -> 0 gives
    holders of one label, alpha -> infinity an iid split, and (before supplies run short) the expected sum of
    squared shares is (1 + alpha * sum(p ** 2)) / (1 + alpha).

    Examples are drawn without replacement. All holders ask for labels at once; a label asked for more often
    than it is left goes to the holders in a random order until it is used up, and who missed out asks again
    among the labels left. Each round but the last uses up a label: at most as many rounds as labels.
    """
    holders = config.holders
    validate.positive(config.dirichlet_alpha, "federation.dirichlet_alpha")
    classes, position, supply = np.unique(labels, return_inverse=True, return_counts=True)
    concentration = np.tile(config.dirichlet_alpha * supply / len(labels), (holders, 1))
    # Gamma(a) = Gamma(a + 1) * U ** (1 / a), kept as a logarithm: for small a the shares themselves
    # underflow, and which label a holder turns to when its first one has run out would be lost.
    log_shares = np.log(rng.standard_gamma(concentration + 1.0))
    log_shares -= rng.standard_exponential(concentration.shape) / concentration
    wanted = _even_sizes(len(labels), holders)
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
    holder_of[_by_label(position, rng)] = np.repeat(owners, counts.T.ravel())
    return holder_of


def _natural(labels: Ints, groups: Ints | None, config: FederationConfig, rng: np.random.Generator) -> Ints:
    """The data's own owners, numbered in the order of their group ids."""
    if groups is None:
        others = ", ".join(name for name in SCHEMES if name != "natural")
        raise InputError(
            "federation.partition = natural needs data with owners (train_groups), and this data set "
            f"has none. Use one of {others}."
        )
    owners, holder_of = np.unique(groups, return_inverse=True)
    if len(owners) != config.holders:
        raise InputError(
            f"federation.holders must be {len(owners)}, the number of owners in the training data, with "
            f"federation.partition = natural, got {config.holders}. Set federation.holders={len(owners)}."
        )
    return holder_of.astype(np.int64, copy=False)


def _even_sizes(n: int, parts: int) -> Ints:
    return np.diff(np.arange(parts + 1, dtype=np.int64) * n // parts)


def _deal(order: Ints, sizes: Ints) -> Ints:
    """Give the first sizes[0] ids of `order` to holder 0, the next to holder 1, and so on."""
    holder_of = np.empty(len(order), dtype=np.int64)
    holder_of[order] = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    return holder_of


def _by_label(labels: Ints, rng: np.random.Generator) -> Ints:
    """Ids sorted by label, in random order within a label."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


Scheme = Callable[[Ints, Ints | None, FederationConfig, np.random.Generator], Ints]
SCHEMES: Mapping[str, Scheme] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
    "power_law": _power_law,
    "natural": _natural,
}
