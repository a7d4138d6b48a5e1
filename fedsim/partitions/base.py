"""A scheme that spreads examples over holders, and what it knows of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.validate import InputError

Ints = NDArray[Any]
"""Integers of any width."""


@dataclass(frozen=True, eq=False)
class Material:
    """What a scheme may spread by: of the N training examples, in their order, what is no input.

    The partition is made by whoever coordinates a simulation, and is no part of what is protected.

    Attributes:
        examples: their number N.
        strata: (N,) label of each example, integers >= 0 of any width, by which holders are skewed
            (`Task.strata`): its class; of several labels the first one, and their number where it has none;
            of values the decile, 0 .. 9, of the first; None for tokens and pictures without labels.
        groups: (N,) natural owner of each example, integers of any width: 0, 1, ... in the sorted order of
            names (the column `holder` of a table, `fedsim.Data(holders=...)`), or as the data have them; None
            where they have no owners.

    Raises:
        InputError: other lengths.
    """

    examples: int
    strata: Ints | None = None
    groups: Ints | None = None

    def __post_init__(self) -> None:
        for name, values in (("strata", self.strata), ("groups", self.groups)):
            if values is not None and values.shape != (self.examples,):
                raise InputError(
                    f"{name} must have one entry for each of {self.examples} examples, got "
                    f"shape {values.shape}."
                )

    def labels(self, scheme: str) -> Ints:
        """Return the strata.

        Raises:
            InputError: there are none.
        """
        if self.strata is None:
            raise InputError(
                f"federation.partition = {scheme} skews holders by label, and this task's targets have none. "
                "Use iid, power_law, natural or file; a task of your own says its labels by Task.strata."
            )
        return self.strata


@dataclass(frozen=True)
class Scheme(ABC):
    """Spreads examples over holders; the fields are the options."""

    owned: ClassVar[bool] = False
    """Whether the number of holders follows from the data, so that another one is refused there."""

    @abstractmethod
    def spread(self, material: Material, holders: int, rng: np.random.Generator) -> Ints:
        """Return the holder (N,) of every example, in 0 .. holders - 1, each of which has one at least.

        Args:
            material: the examples.
            holders: their number; at most N, unless `owned`.
            rng: the only source of randomness; of the run's seed.
        """

    def sizes(self, examples: int, holders: int) -> Ints | None:
        """Return how many examples each holder gets (holders,), where that follows from the numbers alone."""
        return None


@dataclass(frozen=True)
class Function(Scheme):
    """A function from outside in place of a scheme: (material, holders, rng, **options) -> holders (N,)."""

    function: Callable[..., Any]

    def spread(self, material: Material, holders: int, rng: np.random.Generator) -> Ints:
        """See `Scheme.spread`."""
        try:
            return np.asarray(self.function(material, holders, rng))
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"federation.partition: the function fails by {type(error).__name__}: {error}. It is called "
                "with (material, holders, rng), material.examples being the number of examples, "
                "material.strata their labels or None, and material.groups their owners or None."
            ) from error


def as_numbers(owners: Any) -> Ints:
    """Return owners (N,) of any words or numbers as 0, 1, ... in their sorted order.

    Raises:
        InputError: an owner that is not a number where all others are (NaN), or none: nobody holds such an
            example; words among numbers, of which 1 and "1" would be one owner.
    """
    if isinstance(owners, np.ma.MaskedArray):
        raise InputError("every example must have a holder, and some may be masked. Name theirs.")
    try:
        held = np.asarray(owners)
    except ValueError:  # of unequal lists
        held = np.empty((0, 0))
    if held.ndim != 1:
        raise InputError(
            "the holder of each example must be one word or number, (N,) in all, got something of shape "
            f"{held.shape if held.size else 'unequal lists'}. Turn lists of examples a holder around: one "
            "entry an example."
        )
    if held.dtype.kind == "U" and len(np.unique(np.char.strip(held))) < len(np.unique(held)):
        raise InputError(
            "two holders must not differ by spaces around their names alone, and some do. Strip the names."
        )
    if held.dtype.kind == "U" and (np.char.strip(held) == "").any():
        raise InputError("every example must have a holder, and the name of some is empty. Name theirs.")
    if held.dtype.kind not in "biuf":
        kinds = {_kind(one) for one in (held if owners is held else owners)}
        if len(kinds) > 1 or "NoneType" in kinds:
            found = " and ".join(sorted(kinds))
            raise InputError(
                f"every example must have a holder, and all of them words, or all numbers, got {found}. Name "
                "each in the same way everywhere, str(...) for example."
            )
    if held.dtype.kind == "f" and not np.isfinite(held).all():
        raise InputError("every example must have a holder, and some have NaN or infinity. Name theirs.")
    whole = held.ndim == 1 and held.size and held.dtype.kind in "iu"
    if whole and 0 <= held.min() <= held.max() < TABLE_UP_TO:
        there = np.zeros(int(held.max()) + 1, np.bool_)
        for start in range(0, len(held), BLOCK):
            there[held[start : start + BLOCK]] = True
        numbers = np.cumsum(there) - 1
        numbers = numbers.astype(np.min_scalar_type(numbers[-1]))
        return np.concatenate([numbers[held[start : start + BLOCK]] for start in range(0, len(held), BLOCK)])
    return np.unique(held, return_inverse=True)[1].astype(np.int64, copy=False)


def _kind(owner: Any) -> str:
    if isinstance(owner, str):
        return "word"
    return "number" if isinstance(owner, Number) else type(owner).__name__


def even_sizes(n: int, parts: int) -> Ints:
    """Return `parts` sizes that add up to n and differ by at most one."""
    return np.diff(np.arange(parts + 1, dtype=np.int64) * n // parts)


BLOCK = 2**17
"""Examples that are looked at together: of all of them it would cost memory."""

TABLE_UP_TO = 2**24
"""Owners that are numbers below this are counted in a table, and not sorted."""


def in_random_order(n: int, rng: np.random.Generator) -> Ints:
    """Return 0 .. n - 1 in the order of `rng.permutation(n)`, in the smallest unsigned dtype: of millions of
    examples it is what the making of a partition costs most."""
    order = np.arange(n, dtype=np.min_scalar_type(max(0, n - 1)))
    rng.shuffle(order)
    return order


def deal(order: Ints, sizes: Ints) -> Ints:
    """Give the first sizes[0] ids of `order` to holder 0, the next to holder 1, and so on; a block at a time,
    in the smallest unsigned dtype that has the holders."""
    holder_of = np.empty(len(order), np.min_scalar_type(max(0, len(sizes) - 1)))
    ends = np.cumsum(sizes)
    for start in range(0, len(order), BLOCK):
        ids = order[start : start + BLOCK]
        holder_of[ids] = np.searchsorted(ends, np.arange(start, start + len(ids)), side="right")
    return holder_of


def by_label(labels: Ints, rng: np.random.Generator) -> Ints:
    """Return ids sorted by label, in random order within a label."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]
