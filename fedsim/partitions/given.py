"""Holders that are given: the data's own owners, a file, a partitioner of another library."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedsim import validate
from fedsim.partitions import PARTITIONS
from fedsim.partitions.base import Ints, Material, Scheme, as_numbers
from fedsim.validate import InputError


@PARTITIONS.register("natural")
@dataclass(frozen=True)
class Natural(Scheme):
    """The data's own owners, numbered in the order of their group ids."""

    owned: ClassVar[bool] = True

    def spread(self, material: Material, holders: int, rng: np.random.Generator) -> Ints:
        """See `Scheme.spread`."""
        if material.groups is None:
            raise InputError(
                "federation.partition = natural needs data with owners (train_groups of arrays, the holder "
                "column of a table), and this data set has none. Name them there, or use another partition."
            )
        return numbered(material.groups, holders, "natural", "the number of owners in the training data")


@PARTITIONS.register("file")
@dataclass(frozen=True)
class File(Scheme):
    """A file that says which holder has which training example.

    Attributes:
        file: .npy of (N,) integers, or text with one holder a line, any words; in the order of the training
            split as it is used. Holders are numbered in their sorted order.
    """

    owned: ClassVar[bool] = True
    file: str = ""

    def spread(self, material: Material, holders: int, rng: np.random.Generator) -> Ints:
        """See `Scheme.spread`."""
        path, setting = Path(self.file), "federation.partition.options.file"
        try:
            if path.suffix == ".npy":
                held = np.load(path, allow_pickle=False)
            else:
                held = np.array(path.read_text(encoding="utf-8").split())
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"{setting} must be a .npy of integers or text with one holder a line, got "
                f"{self.file!r}: {error}."
            ) from error
        if held.shape != (material.examples,):
            raise InputError(
                f"{setting} must name a holder for each of {material.examples} training examples, got "
                f"{held.size} in {path}. Write one for every example, in their order."
            )
        return numbered(held, holders, "file", f"the number of holders in {path}")


@dataclass(frozen=True)
class Owners(Scheme):
    """The holder of every example as it was handed in from Python, numbered from 0."""

    owned: ClassVar[bool] = True
    holder_of: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Number of holders."""
        return max(self.holder_of) + 1

    def spread(self, material: Material, holders: int, rng: np.random.Generator) -> Ints:
        """See `Scheme.spread`."""
        if len(self.holder_of) != material.examples:
            raise InputError(
                f"partition must name a holder for each of {material.examples} training examples, got "
                f"{len(self.holder_of)}. Give one for every example, in their order."
            )
        return numbered(self.holder_of, holders, "as handed in", "the number of different holders")


@PARTITIONS.register("flwr_datasets")
@dataclass(frozen=True)
class FlwrDatasets(Scheme):
    """A partitioner of the package flwr-datasets, by the name of its class.

    It gets a table with the columns "id", "label" (where the task has labels) and "group" (where the data has
    owners); what it leaves out, or gives twice, is refused.

    Attributes:
        partitioner: such as "DirichletPartitioner".
        options: its arguments, such as {alpha: 0.5, partition_by: label}; num_partitions is the number of
            holders where it takes one and the options do not say.
    """

    partitioner: str = "IidPartitioner"
    options: dict[str, Any] = field(default_factory=dict)

    def spread(self, material: Material, holders: int, rng: np.random.Generator) -> Ints:
        """See `Scheme.spread`."""
        try:
            import datasets
            from flwr_datasets import partitioner as partitioners
        except ImportError as error:
            raise InputError(
                f"federation.partition = flwr_datasets needs the package flwr-datasets: {error}. Run "
                "pip install flwr-datasets."
            ) from error
        known = [name for name in dir(partitioners) if name.endswith("Partitioner")]
        validate.one_of(self.partitioner, known, "federation.partition.options.partitioner")
        columns: dict[str, Any] = {"id": np.arange(material.examples)}
        columns |= {} if material.strata is None else {"label": material.strata}
        columns |= {} if material.groups is None else {"group": material.groups}
        kind = getattr(partitioners, self.partitioner)
        try:
            try:
                made = kind(**{"num_partitions": holders, **self.options})
            except TypeError:
                made = kind(**self.options)
            made.dataset = datasets.Dataset.from_dict(columns)
            parts = [np.asarray(made.load_partition(h)["id"]) for h in range(made.num_partitions)]
        except Exception as error:
            raise InputError(f"{self.partitioner} fails by {type(error).__name__}: {error}.") from error
        if len(parts) != holders:
            raise InputError(f"federation.holders must be {len(parts)}, the partitions made, got {holders}.")
        ids = np.concatenate(parts)
        if not np.array_equal(np.sort(ids), np.arange(material.examples)):
            raise InputError(
                f"{self.partitioner} must give every example to one holder, got {len(np.unique(ids))} of "
                f"{material.examples} examples in {len(ids)} places."
            )
        holder_of = np.empty(material.examples, dtype=np.int64)
        holder_of[ids] = np.repeat(np.arange(holders), [len(part) for part in parts])
        return holder_of


def numbered(owners: Any, holders: int, scheme: str, what: str) -> Ints:
    """Return owners (N,) of any kind as numbers in their sorted order.

    Raises:
        InputError: there are more or fewer than `holders`.
    """
    holder_of = as_numbers(owners)
    found = int(holder_of.max()) + 1 if holder_of.size else 0
    if found != holders:
        more = (
            " Where more were meant: data.holdout_examples and data.train_examples leave out examples, and "
            "with the last of an owner the owner."
        )
        raise InputError(
            f"federation.holders must be {found}, {what}, with federation.partition = {scheme}, got "
            f"{holders}. Set federation.holders={found}.{more if found < holders else ''}"
        )
    return holder_of
