"""Partitions: exact cover, at least one example each, determinism, the shape each scheme promises (8 s)."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.config import DataConfig, FederationConfig
from fedsim.data import datasets
from fedsim.data.partition import Partition, partition
from fedsim.merging import Choice
from fedsim.partitions import PARTITIONS, Material
from fedsim.partitions.base import as_numbers, deal, in_random_order
from fedsim.report import partition_picture
from fedsim.validate import InputError

GIVEN = {"natural", "file", "flwr_datasets"}
SPREADING = [name for name in PARTITIONS.own() if name not in GIVEN]


def balanced(n: int, classes: int) -> np.ndarray:
    return np.random.default_rng(1).permutation(np.arange(n) % classes)


def spread(labels: np.ndarray, scheme: str, holders: int, seed: int = 0, **options: Any) -> Partition:
    config = FederationConfig(holders=holders, partition=Choice(scheme, options))
    return partition(Material(len(labels), labels), config, seed)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, FederationConfig, int]:
    holders = draw(st.integers(1, 60))
    per_holder = draw(st.integers(1, 3))
    n = draw(st.integers(holders * per_holder, holders * per_holder + 200))
    classes = draw(st.integers(1, 12))
    labels = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, classes, n)
    options: dict[str, dict[str, Any]] = {
        "iid": {},
        "dirichlet": {
            "alpha": draw(st.sampled_from([1e-6, 1e-3, 0.1, 0.5, 10.0, 1e6])),
            "concentration": draw(st.sampled_from(["total", "per_class"])),
        },
        "shards": {"per_holder": per_holder},
        "power_law": {"exponent": draw(st.sampled_from([0.01, 1.0, 1.5, 8.0]))},
    }
    scheme = draw(st.sampled_from(SPREADING))
    config = FederationConfig(holders=holders, partition=Choice(scheme, options[scheme]))
    return labels, config, draw(st.integers(0, 2**63 - 1))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_every_scheme_covers_every_example_and_every_holder(
    problem: tuple[np.ndarray, FederationConfig, int],
) -> None:
    labels, config, seed = problem
    material = Material(len(labels), labels)
    parts = partition(material, config, seed)
    assert parts.holder_of.shape == labels.shape
    assert parts.holder_of.dtype == np.min_scalar_type(config.holders - 1)
    sizes = parts.sizes()
    assert sizes.shape == (config.holders,)
    assert sizes.min() >= 1
    assert sizes.sum() == len(labels)
    assert np.array_equal(partition(material, config, seed).holder_of, parts.holder_of)
    nodes = max(1, config.holders // 3)
    ids = [parts.ids_of_node(node, nodes) for node in range(nodes)]
    assert all(np.all(np.diff(part) > 0) for part in ids)
    assert np.array_equal(np.sort(np.concatenate(ids)), np.arange(len(labels)))
    for node, part in enumerate(ids):
        holders = parts.holders_of_node(node, nodes)
        assert np.array_equal(np.unique(parts.holder_of[part]), holders)
        assert np.all(holders % nodes == node)
    counts = parts.label_counts(labels, 12)
    assert np.array_equal(counts.sum(axis=0), np.bincount(labels, minlength=12))
    assert np.array_equal(counts.sum(axis=1), sizes)


@pytest.mark.parametrize("scheme", SPREADING)
def test_another_seed_gives_another_partition(scheme: str) -> None:
    labels = balanced(500, 10)
    a, b = (spread(labels, scheme, 20, seed=seed).holder_of for seed in (0, 1))
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("scheme", SPREADING)
def test_one_holder_has_everything(scheme: str) -> None:
    assert not spread(balanced(50, 5), scheme, 1).holder_of.any()


@pytest.mark.parametrize("scheme", SPREADING)
def test_as_many_holders_as_examples(scheme: str) -> None:
    parts = spread(balanced(300, 7), scheme, 300, **({"per_holder": 1} if scheme == "shards" else {}))
    assert np.all(parts.sizes() == 1)


@pytest.mark.parametrize("scheme", SPREADING)
@pytest.mark.parametrize("holders", [1_000, 10_000])
def test_thousands_of_holders(scheme: str, holders: int) -> None:
    parts = spread(balanced(50_000, 100), scheme, holders)
    assert parts.sizes().min() >= 1
    assert len(parts.sizes()) == holders


def test_iid_sizes_are_even_and_labels_are_mixed() -> None:
    labels = balanced(10_007, 10)
    parts = spread(labels, "iid", 100)
    assert set(parts.sizes()) == {100, 101}
    assert spread(labels, "iid", 10).label_counts(labels, 10).min() > 50  # mean 100, standard deviation 9


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_has_the_concentration_it_states(alpha: float) -> None:
    """The mean squared label share of holders against its expectation.

    For q ~ Dirichlet(alpha p) and m draws, the share c/m has E sum (c/m)^2 = 1/m + (1 - 1/m) E sum q^2 with
    E sum q^2 = (1 + alpha / 10) / (1 + alpha). Labels run short for the holders served last, which moves the
    mean by some per cent: the band of 6 % covers it. A concentration of alpha per label, ten times as much
    in total, is outside.
    """
    labels, holders, m = balanced(60_000, 10), 600, 100
    parts = spread(labels, "dirichlet", holders, alpha=alpha)
    assert np.all(parts.sizes() == m)
    measured = np.mean(np.sum((parts.label_counts(labels, 10) / m) ** 2, axis=1))

    def expected(total: float) -> float:
        return 1 / m + (1 - 1 / m) * (1 + total / 10) / (1 + total)

    assert abs(measured / expected(alpha) - 1) < 0.06
    assert abs(measured / expected(10 * alpha) - 1) > 0.06


@given(st.integers(1, 700), st.integers(1, 300), st.integers(0, 9), st.sampled_from([1, 300]))
@settings(max_examples=60, deadline=None)
def test_examples_are_dealt_in_the_order_of_a_permutation(
    n: int, holders: int, seed: int, scale: int
) -> None:
    """What is dealt a block at a time in few bytes is what is dealt plainly; also past 2^16 examples."""
    n, holders = n * scale, min(holders, n * scale)
    sizes = np.diff(np.sort(np.r_[0, np.random.default_rng(seed + 1).integers(0, n + 1, holders - 1), n]))
    order = np.random.default_rng(seed).permutation(n)
    plain = np.empty(n, np.int64)
    plain[order] = np.repeat(np.arange(holders), sizes)
    found = deal(in_random_order(n, np.random.default_rng(seed)), sizes)
    assert np.array_equal(found, plain)
    assert found.itemsize <= (1 if holders <= 256 else 2)


@given(owners=st.lists(st.integers(0, 10**6), min_size=1, max_size=50), wide=st.booleans())
@settings(max_examples=60, deadline=None)
def test_owners_are_numbered_in_their_order(owners: list[int], wide: bool) -> None:
    """Small numbers by a table, others by sorting: the same."""
    held = np.array(owners, np.uint32 if wide else np.int64)
    expected = np.unique(held, return_inverse=True)[1]
    assert np.array_equal(as_numbers(held), expected)
    assert np.array_equal(as_numbers(held.astype(np.int64) - 5), expected)
    assert np.array_equal(as_numbers(held.astype(np.int64) + 2**40), expected)
    assert np.array_equal(as_numbers([f"{owner:07d}" for owner in owners]), expected)


@pytest.mark.parametrize("scheme", ["iid", "power_law", "natural"])
def test_a_partition_of_a_million_is_made_in_few_bytes_an_example(scheme: str) -> None:
    """The largest that is held while it is made, not what stays: the order, the holders, and blocks."""
    n, holders = 1_000_000, 1000
    owners = np.arange(n, dtype=np.uint32) % holders
    material = Material(n, None, owners if scheme == "natural" else None)
    chosen = FederationConfig(holders=holders, partition=Choice(scheme))
    tracemalloc.start()
    try:
        found = partition(material, chosen, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.holder_of.nbytes == 2 * n
    assert peak < 7 * n + 4 * 2**20, peak / n


def test_dirichlet_extremes() -> None:
    labels = balanced(10_000, 10)
    iid = spread(labels, "iid", 100).summary(labels)["mean_label_entropy_bits"]
    flat = spread(labels, "dirichlet", 100, alpha=1e6).summary(labels)["mean_label_entropy_bits"]
    assert abs(flat - iid) < 0.02
    skewed = spread(labels, "dirichlet", 100, alpha=1e-6).summary(labels)
    assert skewed["mean_effective_classes"] < 1.3
    # Far fewer holders than labels: shares of 1e-7 a label underflow unless they are kept as logarithms, and
    # then holders mix labels once their first has run out. A tenth of 100 labels is ten for each holder.
    many = balanced(10_000, 100)
    few = spread(many, "dirichlet", 10, alpha=1e-5).summary(many)
    assert few["mean_effective_classes"] < 13


def test_shards_limit_the_labels_of_a_holder() -> None:
    labels = np.sort(balanced(6_000, 10))  # 600 of each label: shards of 30 never straddle two labels
    counts = spread(labels, "shards", 100, per_holder=2).label_counts(labels, 10)
    assert np.all((counts > 0).sum(axis=1) <= 2)
    assert np.all(counts[counts > 0] % 30 == 0)
    assert np.mean((counts > 0).sum(axis=1)) > 1.7  # shards are dealt at random: 1.9 expected


def test_power_law_sizes_follow_the_rank() -> None:
    labels = balanced(100_000, 10)
    sizes = spread(labels, "power_law", 50, exponent=1.2).sizes()
    assert np.all(np.diff(sizes) <= 0)
    slope = np.polyfit(np.log(np.arange(1, 51)), np.log(sizes), 1)[0]
    assert abs(slope + 1.2) < 0.01
    tail = spread(labels, "power_law", 5_000, exponent=2.0).sizes()
    assert tail[0] > 50_000
    assert tail[-1] == 1


def test_natural_follows_the_groups() -> None:
    groups = np.array([30, 10, 10, 20, 30, 30])
    material = Material(6, groups=groups)
    config = FederationConfig(holders=3, nodes=1, partition=Choice("natural"))
    parts = partition(material, config, 0)
    assert parts.holder_of.tolist() == [2, 0, 0, 1, 2, 2]
    assert parts.sizes().tolist() == [2, 1, 3]
    with pytest.raises(InputError, match=r"federation.holders must be 3.*got 5"):
        partition(material, FederationConfig(holders=5, partition=Choice("natural")), 0)
    with pytest.raises(InputError, match=r"needs data with owners.*use another"):
        partition(Material(6), config, 0)
    with pytest.raises(InputError, match="groups must have one entry for each of 6"):
        Material(6, groups=groups[:4])


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        ("iid", {"holders": 31}, "must be at most 30.*got 31"),
        ("dirichlet", {"holders": 31}, "must be at most 30.*got 31"),
        ("shards", {"holders": 10, "per_holder": 4}, "at most 3 for 10 holders and 30 examples"),
        ("dirichet", {"holders": 3}, "Did you mean 'dirichlet'"),
        ("dirichlet", {"holders": 3, "alpha": 0.0}, "alpha must be a positive"),
    ],
)
def test_impossible_requests_are_refused(scheme: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spread(balanced(30, 3), scheme, **changes)


def test_a_partition_checks_itself() -> None:
    with pytest.raises(InputError, match="each of 3 holders"):
        Partition(np.array([0, 2, 2]), 3)
    with pytest.raises(InputError, match="each of 2 holders"):
        Partition(np.array([0, 1, 2]), 2)
    with pytest.raises(InputError, match="non-negative"):
        Partition(np.array([0, -1]), 1)
    parts = Partition(np.array([0, 1, 1]), 2)
    with pytest.raises(InputError, match="nodes must be between 1 and 2"):
        parts.ids_of_node(0, 3)
    with pytest.raises(InputError, match="node must be between 0 and 1"):
        parts.holders_of_node(2, 2)
    with pytest.raises(InputError, match="one entry for each of 3"):
        parts.label_counts(np.array([0, 1]), 2)
    with pytest.raises(InputError, match=r"lie in 0 \.\. 1, got 0 \.\. 2"):
        parts.label_counts(np.array([0, 1, 2]), 2)


def test_summary_by_hand() -> None:
    parts = Partition(np.array([0, 0, 0, 0, 1, 1, 2]), 3)
    summary = parts.summary(np.array([0, 1, 2, 3, 0, 1, 5]))
    assert summary == {
        "holders": 3,
        "min_size": 1,
        "median_size": 2.0,
        "max_size": 4,
        "mean_label_entropy_bits": pytest.approx((2 + 1 + 0) / 3),
        "mean_effective_classes": pytest.approx((4 + 2 + 1) / 3),
    }


def test_real_labels_and_the_picture() -> None:
    labels = datasets.load(DataConfig()).train.targets
    images = {}
    for scheme, holders in (("dirichlet", 1_000), ("iid", 1_000), ("iid", 3), ("power_law", 10_000)):
        parts = spread(labels, scheme, holders)
        picture = partition_picture.figure(parts.label_counts(labels, 10))
        images[scheme, holders] = partition_picture.as_image(picture)
        assert images[scheme, holders].shape == (3, 500, 800)
        assert images[scheme, holders].dtype == np.uint8
        assert f"{holders:,} holders, 10,000 examples" in picture.axes[0].get_title()

    # Shares near 0 and 1 are the dark and bright ends of the map: skew shows as more of both.
    def bright(image: np.ndarray) -> float:
        return float(np.mean((image[0] > 240) & (image[1] > 220) & (image[2] < 60)))

    assert bright(images["dirichlet", 1_000]) > 5 * bright(images["iid", 1_000])
    with pytest.raises(InputError, match="label_counts must be"):
        partition_picture.figure(np.array([[1, 2], [0, 0]]))


@pytest.mark.parametrize("holders", [3, 255, 256, 257, 65_536])
def test_every_holder_may_have_a_node_of_its_own(holders: int) -> None:
    """At 256 holders the numbers of holders fit into a byte, and that of nodes does not."""
    held = Partition(np.arange(2 * holders) % holders, holders)
    for node in {0, 1, holders // 2, holders - 1}:
        assert held.ids_of_node(node, holders).tolist() == [node, node + holders]
    assert held.ids_of_node(holders - 2, holders - 1).tolist() == [holders - 2, 2 * holders - 2]
