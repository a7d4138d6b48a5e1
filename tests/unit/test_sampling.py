"""Poisson draws and availability as functions of (key, id)."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedsim import seeds
from fedsim.samplers.keyed import HolderAvailability, PoissonSampler, sampling_rate
from fedsim.validate import InputError

KEY = seeds.derive(7, "draw", 0)
IDS = np.arange(200_000, dtype=np.int64)
SAMPLER = PoissonSampler(0.03, IDS.size)


def test_the_mask_is_the_definition_word_by_word() -> None:
    words = seeds.words(KEY, 0, 1000)
    limit = int(0.03 * 2**64)
    expected = np.array([int(word) < limit for word in words])
    assert np.array_equal(SAMPLER.included(IDS[:1000], KEY), expected)


@pytest.mark.parametrize(
    "pick",
    [
        np.random.default_rng(0).permutation(IDS.size),
        np.arange(0, IDS.size, 7),
        np.arange(0, IDS.size, 4999),
        np.array([199_999, 0, 31, 31, 65_536, 65_535]),
        np.array([5]),
        np.array([], dtype=np.int64),
    ],
    ids=["permuted", "interleaved", "sparse", "unordered with repeats", "one", "none"],
)
def test_inclusion_does_not_depend_on_which_ids_are_asked_about(pick: np.ndarray) -> None:
    whole = SAMPLER.included(IDS, KEY)
    assert np.array_equal(SAMPLER.included(IDS[pick], KEY), whole[pick])


def test_far_apart_ids_agree_with_asking_one_by_one() -> None:
    ids = np.array([3, 10**6, 10**6 + 1, 10**12, 2**40 + 5], dtype=np.int64)
    sampler = PoissonSampler(0.5, 10)
    single = [bool(sampler.included(ids[i : i + 1], KEY)[0]) for i in range(ids.size)]
    assert sampler.included(ids, KEY).tolist() == single
    assert sampler.included(ids[::-1].copy(), KEY).tolist() == single[::-1]


def test_partitions_join_to_the_whole_draw() -> None:
    owner = np.random.default_rng(1).integers(0, 50, IDS.size)
    joined = np.zeros(IDS.size, dtype=bool)
    for holder in range(50):
        mine = IDS[owner == holder]
        joined[mine] = SAMPLER.included(mine, KEY)
    assert np.array_equal(joined, SAMPLER.included(IDS, KEY))


def test_rate_one_includes_all_and_other_keys_draw_differently() -> None:
    assert PoissonSampler(1.0, IDS.size).included(IDS, KEY).all()
    first = SAMPLER.included(IDS, KEY)
    assert not np.array_equal(first, SAMPLER.included(IDS, seeds.derive(7, "draw", 1)))
    assert not np.array_equal(first, SAMPLER.included(IDS, seeds.derive(7, "holder draw", 0)))


def test_a_larger_rate_includes_a_superset() -> None:
    small = PoissonSampler(0.1, IDS.size).included(IDS, KEY)
    large = PoissonSampler(0.2, IDS.size).included(IDS, KEY)
    assert not (small & ~large).any()
    assert large.sum() > small.sum()


def test_expected_size_and_refusals() -> None:
    assert PoissonSampler(0.25, 400).expected_size == 100.0
    for rate in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="sampling rate"):
            PoissonSampler(rate, 10)
    with pytest.raises(InputError, match="population"):
        PoissonSampler(0.5, 0)
    with pytest.raises(InputError, match="int64"):
        SAMPLER.included(np.arange(3, dtype=np.int32), KEY)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="negative"):
        SAMPLER.included(np.array([1, -1]), KEY)


def test_sampling_rate_keeps_the_expected_batch_when_holders_are_away() -> None:
    assert sampling_rate(100, 1000) == 0.1
    assert sampling_rate(100, 1000, 0.5) == 0.2
    assert sampling_rate(1000, 1000) == 1.0
    assert sampling_rate(100 * 0.7, 100, 0.7) == 1.0
    with pytest.raises(InputError, match="expected batch above N"):
        sampling_rate(1001, 1000)
    with pytest.raises(InputError, match="expected batch above N"):
        sampling_rate(501, 1000, 0.5)
    with pytest.raises(InputError, match="availability"):
        sampling_rate(1, 1000, 0.0)


def test_availability_is_a_draw_of_its_own() -> None:
    holders = np.arange(5000, dtype=np.int64)
    away = HolderAvailability(0.4)
    key = seeds.derive(7, "availability", 0)
    mask = away.available(holders, key)
    assert abs(mask.mean() - 0.4) < 5 * (0.4 * 0.6 / 5000) ** 0.5
    assert np.array_equal(mask, away.available(holders, key))
    assert not np.array_equal(mask, PoissonSampler(0.4, 5000).included(holders, seeds.derive(7, "draw", 0)))
    assert HolderAvailability(1.0).available(holders, key).all()
    with pytest.raises(InputError, match="availability"):
        HolderAvailability(0.0)


def test_a_draw_over_imagenet_is_fast() -> None:
    ids = np.arange(1_300_000, dtype=np.int64)
    sampler = PoissonSampler(0.0128, ids.size)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        sampler.included(ids, KEY)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
