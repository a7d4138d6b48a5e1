"""Holders from a file or another library, and what the concentration of a Dirichlet partition is of."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim.config import FederationConfig
from fedsim.data.partition import Partition, partition
from fedsim.merging import Choice
from fedsim.partitions import Material
from fedsim.partitions.base import as_numbers
from fedsim.validate import InputError


def given(name: str, holders: int, material: Material, seed: int = 0, **options: Any) -> Partition:
    return partition(material, FederationConfig(holders=holders, partition=Choice(name, options)), seed)


def test_a_concentration_per_class_is_that_of_all_times_the_classes() -> None:
    """Of the labels that occur, here seven of them: counted with gaps the total would be another one."""
    labels = np.random.default_rng(1).integers(0, 7, 3000) * 3
    material = Material(3000, labels)
    each = given("dirichlet", 40, material, alpha=0.3, concentration="per_class")
    total = given("dirichlet", 40, material, alpha=0.3 * 7, concentration="total")
    assert np.array_equal(each.holder_of, total.holder_of)
    plain = given("dirichlet", 40, material, alpha=0.3)
    assert np.array_equal(
        plain.holder_of, given("dirichlet", 40, material, alpha=0.3, concentration="total").holder_of
    )
    assert not np.array_equal(each.holder_of, plain.holder_of)
    with pytest.raises(InputError, match=r"concentration.*total, per_class"):
        given("dirichlet", 40, material, concentration="label")


@pytest.mark.parametrize("scheme", ["dirichlet", "shards"])
def test_schemes_by_label_need_labels(scheme: str) -> None:
    with pytest.raises(
        InputError, match=f"{scheme} skews holders by label, and this task's targets have none"
    ):
        given(scheme, 2, Material(6))


# --- a file ---------------------------------------------------------------------------------------------


def test_a_file_of_integers_or_words_says_the_holders(tmp_path: Path) -> None:
    np.save(tmp_path / "h.npy", np.array([30, 10, 10, 20, 30, 30]))
    (tmp_path / "h.txt").write_text("zoe\nann\nann\nben\nzoe\nzoe\n")
    for name in ("h.npy", "h.txt"):
        parts = given("file", 3, Material(6), file=str(tmp_path / name))
        assert parts.holder_of.tolist() == [2, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("suffix", ["npy", "txt"])
def test_a_file_that_does_not_fit_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"h.{suffix}"
    if suffix == "npy":
        np.save(path, np.array([0, 1, 1]))
    else:
        path.write_text("0\n1\n1\n")
    with pytest.raises(InputError, match=r"a holder for each of 4 training examples, got 3 in .*h\."):
        given("file", 2, Material(4), file=str(path))
    with pytest.raises(InputError, match=r"federation.holders must be 2, the number of holders in .*got 3"):
        given("file", 3, Material(3), file=str(path))
    with pytest.raises(InputError, match=r"options.file must be a .npy of integers or text.*absent"):
        given("file", 2, Material(3), file=str(tmp_path / f"absent.{suffix}"))
    path.write_bytes(b"\xff\xfe\x00 no text, no array")
    with pytest.raises(InputError, match=r"options.file must be a .npy of integers or text"):
        given("file", 2, Material(3), file=str(path))


# --- flwr_datasets --------------------------------------------------------------------------------------


class Table:
    """What a partitioner sees, as datasets.Dataset."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = columns

    @classmethod
    def from_dict(cls, columns: dict[str, Any]) -> Table:
        return cls(columns)

    def take(self, rows: Any) -> dict[str, Any]:
        return {name: np.asarray(values)[rows] for name, values in self.columns.items()}


class EveryPartitioner:
    """Example i belongs to partition i modulo their number, or to that of its label."""

    dataset: Table

    def __init__(self, num_partitions: int, partition_by: str = "id", lost: int = 0, twice: int = 0) -> None:
        self.num_partitions, self.by, self.lost, self.twice = num_partitions, partition_by, lost, twice

    def load_partition(self, number: int) -> dict[str, Any]:
        rows = np.flatnonzero(np.asarray(self.dataset.columns[self.by]) % self.num_partitions == number)
        rows = rows[rows >= self.lost]
        return self.dataset.take(np.concatenate([rows, np.arange(self.twice)]))


class NaturalPartitioner:
    """One partition a group, whatever number is wished for."""

    dataset: Table

    def __init__(self, partition_by: str) -> None:
        self.by = partition_by

    @property
    def num_partitions(self) -> int:
        return len(set(self.dataset.columns[self.by].tolist()))

    def load_partition(self, number: int) -> dict[str, Any]:
        return self.dataset.take(
            np.flatnonzero(np.unique(self.dataset.columns[self.by], return_inverse=True)[1] == number)
        )


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    package, partitioners, tables = (
        ModuleType(n) for n in ("flwr_datasets", "flwr_datasets.partitioner", "datasets")
    )
    partitioners.EveryPartitioner = EveryPartitioner  # type: ignore[attr-defined]
    partitioners.NaturalPartitioner = NaturalPartitioner  # type: ignore[attr-defined]
    package.partitioner = partitioners  # type: ignore[attr-defined]
    tables.Dataset = Table  # type: ignore[attr-defined]
    for module in (package, partitioners, tables):
        monkeypatch.setitem(sys.modules, module.__name__, module)


MATERIAL = Material(6, np.array([1, 1, 0, 0, 2, 2]), np.array([7, 7, 5, 5, 5, 9]))


@pytest.mark.usefixtures("library")
def test_partitions_of_another_library_are_taken() -> None:
    def by(partitioner: str, **options: Any) -> list[int]:
        chosen = {"partitioner": partitioner, "options": options}
        return given("flwr_datasets", 3, MATERIAL, **chosen).holder_of.tolist()

    assert by("EveryPartitioner") == [0, 1, 2, 0, 1, 2]
    assert by("EveryPartitioner", partition_by="label") == [1, 1, 0, 0, 2, 2]
    assert by("NaturalPartitioner", partition_by="group") == [1, 1, 0, 0, 0, 2]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("partitioner", "options", "message"),
    [
        ("EveryPartitione", {}, "Did you mean 'EveryPartitioner'"),
        ("EveryPartitioner", {"lost": 1}, "every example to one holder, got 5 of 6 examples in 5 places"),
        ("EveryPartitioner", {"twice": 1}, "every example to one holder, got 6 of 6 examples in 9 places"),
        (
            "EveryPartitioner",
            {"num_partitions": 2},
            "federation.holders must be 2, the partitions made, got 3",
        ),
        ("EveryPartitioner", {"partition_by": "owner"}, "EveryPartitioner fails by KeyError"),
        ("EveryPartitioner", {"parts": 2}, "EveryPartitioner fails by TypeError"),
    ],
)
def test_partitions_that_do_not_fit_are_refused(
    partitioner: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        given("flwr_datasets", 3, MATERIAL, partitioner=partitioner, options=options)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(InputError, match="pip install flwr-datasets"):
        given("flwr_datasets", 3, MATERIAL)


def test_owners_of_any_words_are_numbered_and_nobody_is_no_owner() -> None:
    assert as_numbers(["b", "a", "b"]).tolist() == [1, 0, 1]
    assert as_numbers([7.5, -1.0]).tolist() == [1, 0]
    with pytest.raises(InputError, match="every example must have a holder"):
        as_numbers([0.0, float("nan")])
    assert as_numbers(np.array([2, np.int64(1)], object)).tolist() == [1, 0]
    for mixed in ([1, "1"], ["a", None], np.array(["a", 1], object), [None, None]):
        with pytest.raises(InputError, match="all of them words, or all numbers, got"):
            as_numbers(mixed)


# --- what a function gets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "declared", "targets", "strata"),
    [
        ("classification", {"classes": 3}, [2, 0, 1, 2, 2, 0], [2, 0, 1, 2, 2, 0]),
        ("multi_label", {"labels": 2}, [[0, 1], [1, 1], [0, 0], [1, 0], [0, 1], [0, 0]], [1, 0, 2, 0, 1, 2]),
        ("regression", {"values": 1}, [[v] for v in (0.5, 9.0, 3.0, 1.0, 7.0, 2.0)], [0, 9, 6, 2, 8, 4]),
    ],
)
def test_material_holds_labels_and_owners_and_no_inputs(
    task: str, declared: dict[str, int], targets: list[Any], strata: list[int]
) -> None:
    """As docs/data.md says. Deciles of six values are checked by hand: edges lie at every half place."""
    got: list[Material] = []

    def spread(material: Material, holders: int, rng: np.random.Generator) -> np.ndarray:
        got.append(material)
        return np.arange(material.examples) % holders

    inputs = np.arange(12, dtype=np.float32).reshape(6, 2)
    wanted = np.array(targets, np.float32 if task == "regression" else np.int64)
    for owners, groups in (None, None), (list("cabbac"), [2, 0, 1, 1, 0, 2]):
        data = fedsim.Data((inputs, wanted), (inputs, wanted), holders=owners, **declared)
        fedsim.check(
            data=data,
            task=task,
            model="linear",
            partition=spread,
            federation={"holders": 2},
            privacy={"noise_multiplier": 1.0},
            train={"steps": 1, "expected_batch_size": 3},
        )
        assert got[-1].examples == 6
        assert got[-1].strata is not None
        assert got[-1].strata.tolist() == strata
        assert (None if got[-1].groups is None else got[-1].groups.tolist()) == groups
    assert {field.name for field in dataclasses.fields(Material)} == {"examples", "strata", "groups"}
