"""Which data holder owns which example, and which of them it uses.

A partition is one array: the holder of every global example id. Everything else is derived from it, so the
ids survive partitioning and a draw keyed by id does not notice how the data is spread. All schemes
(fedsim.partitions) cover every example exactly once and give every holder at least one.

With a declared cap (`federation.examples_per_holder_at_most`) a larger holder uses that many of its examples,
chosen by a key of the run: the others keep their ids and owner and take no part in anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds, validate
from fedsim.config import FederationConfig
from fedsim.data.pictures.index import narrow
from fedsim.partitions import PARTITIONS
from fedsim.partitions.base import Material
from fedsim.validate import InputError

Ints = NDArray[np.int64]


BLOCK = 2**17
"""Examples that are looked at together: what is computed of all of them costs no more memory than this
many."""


@dataclass(frozen=True, eq=False)
class Partition:
    """The holder of every example.

    Attributes:
        holder_of: (N,) holder_of[i] in 0 .. num_holders - 1 owns example i; read-only, of the smallest
            unsigned dtype that has the holders: of millions of examples every byte counts.
        num_holders: number of holders; each owns and uses at least one example.
        used: (N,) bool, whether the owner of example i uses it; read-only; None: all are used.
    """

    holder_of: Ints
    num_holders: int
    used: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        given = np.asarray(self.holder_of)
        counts = np.zeros(0, np.int64)
        if given.ndim == 1 and given.dtype.kind in "iu" and _inside(given, 0, np.iinfo(np.int64).max):
            counts = _counted(given, self.num_holders)
        if given.ndim != 1 or (given.size and not counts.size):
            raise InputError("holder_of must be one non-negative holder per example, shape (N,).")
        if len(counts) > self.num_holders or not counts.all():
            raise InputError(
                f"holder_of must name each of {self.num_holders} holders at least once and no other, got "
                f"{np.count_nonzero(counts)} distinct holders up to {len(counts) - 1}."
            )
        holder_of = given.astype(narrow(self.num_holders - 1), copy=False).view()
        holder_of.flags.writeable = False
        object.__setattr__(self, "holder_of", holder_of)
        if self.used is None:
            return
        used = np.asarray(self.used, np.bool_).view()
        used.flags.writeable = False
        object.__setattr__(self, "used", used)
        if used.shape != holder_of.shape or not self.sizes().all():
            raise InputError("used must mark at least one example of every holder, shape (N,).")

    def __len__(self) -> int:
        return len(self.holder_of)

    @property
    def examples(self) -> int:
        """Return the number of examples all holders use together."""
        return len(self) if self.used is None else int(self.used.sum())

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
        return np.concatenate([*self.blocks_of_node(node, nodes), np.zeros(0, np.int64)])

    def blocks_of_node(self, node: int, nodes: int) -> Iterator[Ints]:
        """Yield `ids_of_node` in parts, of BLOCK consecutive ids of all holders each: none costs much
        memory."""
        self._check_node(node, nodes)
        for block in self._blocks():
            here = self.holder_of[block].astype(np.int64) % nodes == node  # 256 nodes are no byte
            if self.used is not None:
                here &= self.used[block]
            yield np.flatnonzero(here).astype(np.int64, copy=False) + block.start

    def ids_of_holder(self, holder: int) -> Ints:
        """Return the sorted global ids of the examples that a holder uses."""
        found = [np.flatnonzero(self.holder_of[block] == holder) + block.start for block in self._blocks()]
        ids = np.concatenate([*found, np.zeros(0, np.int64)]).astype(np.int64, copy=False)
        return ids if self.used is None else ids[self.used[ids]]

    def digest(self) -> str:
        """Return a digest of who has which example and uses it."""
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(self.holder_of[block].astype("<i8").tobytes())
        for block in self._blocks():
            count = len(self.holder_of[block])
            digest.update(bytes([1]) * count if self.used is None else self.used[block].tobytes())
        return digest.hexdigest()

    def sizes(self) -> Ints:
        """Return the number of examples each holder uses, (num_holders,) int64."""
        return _counted(self.holder_of, self.num_holders, self.used)

    def label_counts(self, labels: NDArray[Any], num_classes: int) -> Ints:
        """Return how many examples of each label each holder uses, (num_holders, num_classes) int64."""
        self._check_labels(labels, num_classes)
        counts = np.zeros(self.num_holders * num_classes, np.int64)
        for block in self._blocks():
            places = self.holder_of[block].astype(np.int64) * num_classes + labels[block].astype(np.int64)
            if self.used is not None:
                places = places[self.used[block]]
            cells, found = np.unique(places, return_counts=True)
            counts[cells] += found
        return counts.reshape(self.num_holders, num_classes)

    def _blocks(self) -> Iterator[slice]:
        return _blocks_of(len(self))

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

    def _check_labels(self, labels: NDArray[Any], num_classes: int) -> None:
        if labels.shape != self.holder_of.shape:
            raise InputError(
                f"labels must have one entry for each of {len(self.holder_of)} examples, "
                f"got shape {labels.shape}."
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
            raise InputError(
                f"labels must lie in 0 .. {num_classes - 1}, got {labels.min()} .. {labels.max()}."
            )


@dataclass(frozen=True, eq=False)
class Planned:
    """A partition of which only the sizes are known: enough to plan with, where it is too large to draw.

    Attributes:
        each: (holders,) examples that each holder uses.
    """

    each: Ints

    @property
    def examples(self) -> int:
        """Return the number of examples all holders use together."""
        return int(self.each.sum())

    def sizes(self) -> Ints:
        """Return the number of examples each holder uses."""
        return self.each

    def summary(self) -> dict[str, float]:
        """Describe the sizes, as `Partition.summary` does."""
        sizes = self.each
        return {
            "holders": len(sizes),
            "min_size": int(sizes.min()),
            "median_size": float(np.median(sizes)),
            "max_size": int(sizes.max()),
        }


def planned(examples: int, config: FederationConfig) -> Planned | None:
    """Return the sizes of the partition that `partition` would draw, or None where they need the draw.

    Raises:
        InputError: unknown scheme, or more holders than examples.
    """
    validate.in_range(config.holders, 1, examples, "federation.holders")
    each = PARTITIONS.make(config.partition).sizes(examples, config.holders)
    if each is None:
        return None
    at_most = config.examples_per_holder_at_most
    return Planned(each if at_most is None else np.minimum(each, at_most))


def _blocks_of(count: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _inside(values: NDArray[Any], low: int, high: int) -> bool:
    return not values.size or (int(values.min()) >= low and int(values.max()) <= high)


def _counted(holder_of: NDArray[Any], holders: int, used: NDArray[np.bool_] | None = None) -> Ints:
    """Return the examples of each holder, (holders,) or more where one is beyond; a block at a time."""
    counts = np.zeros(max(holders, int(holder_of.max(initial=0)) + 1 if holder_of.size else 0), np.int64)
    for block in _blocks_of(len(holder_of)):
        some = holder_of[block] if used is None else holder_of[block][used[block]]
        counts += np.bincount(some, minlength=len(counts))
    return counts


def partition(material: Material, config: FederationConfig, seed: seeds.Root) -> Partition:
    """Spread N examples over `config.holders` holders.

    Args:
        material: what the schemes know of the examples.
        config: scheme (`partition`), holders, and the cap on a holder's examples.
        seed: the run's seed, or the key for "partition" derived from it; the same seed gives the same
            partition.

    Raises:
        InputError: unknown scheme, more holders than examples, or material that does not fit.
    """
    scheme = PARTITIONS.make(config.partition)
    n, holders = material.examples, config.holders
    validate.positive(holders, "federation.holders")
    if not scheme.owned and holders > n:
        raise InputError(
            f"federation.holders must be at most {n}, the number of training examples, got {holders}. "
            "Every holder owns at least one example: lower federation.holders or raise data.train_examples."
        )
    key = seeds.derive(seed, "partition")
    holder_of = np.asarray(scheme.spread(material, holders, seeds.generator(key)))
    if holder_of.shape != (n,) or holder_of.dtype.kind not in "iu":
        raise InputError(
            f"federation.partition {config.partition.name} must give {n} holders, one an example, got "
            f"{holder_of.dtype} of shape {holder_of.shape}."
        )
    whole = Partition(holder_of, holders)
    at_most = config.examples_per_holder_at_most
    return whole if at_most is None else whole.capped(at_most, seeds.derive(key, "used examples"))
