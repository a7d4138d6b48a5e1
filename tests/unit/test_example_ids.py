"""Examples are named by one int64; where data lies at its holders, by holder and local number in one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds
from fedsim.data.augment import views
from fedsim.data.example_ids import local, split
from fedsim.samplers.keyed import PoissonSampler, in_bin

KEY = seeds.derive(7, "draw", 0)
HOLDERS = 400
SIZES = np.random.default_rng(0).integers(1, 200, HOLDERS)
SAMPLER = PoissonSampler(0.3, int(SIZES.sum()))


def _names() -> NDArray[np.int64]:
    return np.concatenate([local(holder, int(size)) for holder, size in enumerate(SIZES)])


def test_names_are_distinct_and_can_be_taken_apart() -> None:
    ids = _names()
    assert ids.dtype == np.int64
    assert len(np.unique(ids)) == SIZES.sum()
    holders, numbers = split(ids)
    assert np.array_equal(holders, np.repeat(np.arange(HOLDERS), SIZES))
    assert np.array_equal(numbers, np.concatenate([np.arange(size) for size in SIZES]))


def test_a_holder_names_its_examples_without_knowing_the_others() -> None:
    whole = SAMPLER.included(_names(), KEY)
    start = np.concatenate([[0], np.cumsum(SIZES)])
    for holder, size in enumerate(SIZES):
        alone = SAMPLER.included(local(holder, int(size)), KEY)
        assert np.array_equal(alone, whole[start[holder] : start[holder + 1]])


def test_a_holder_that_grows_leaves_every_draw_as_it_was() -> None:
    before = SAMPLER.included(local(3, 50), KEY)
    assert np.array_equal(SAMPLER.included(local(3, 80), KEY)[:50], before)


def test_draws_have_their_rate_and_equal_numbers_of_two_holders_are_independent() -> None:
    picked = np.stack([SAMPLER.included(local(holder, 500), KEY) for holder in range(HOLDERS)])
    mean = picked.mean()
    assert abs(mean - 0.3) < 5 * np.sqrt(0.3 * 0.7 / picked.size)
    together = (picked[:-1] & picked[1:]).mean()  # a draw that forgot the holder would give 0.3
    assert abs(together - 0.09) < 5 * np.sqrt(0.09 * 0.91 / picked[1:].size)


def test_bins_take_every_name_once() -> None:
    ids = _names()
    assert np.array_equal(sum(in_bin(ids, KEY, j, 5).astype(int) for j in range(5)), np.ones(len(ids)))


def test_views_go_by_the_whole_name() -> None:
    images = np.broadcast_to(
        np.random.default_rng(1).integers(0, 255, (1, 9, 9, 1), np.uint8), (64, 9, 9, 1)
    ).copy()
    key = seeds.derive(7, "augment", 0)
    first, second = (views(images, local(h, 64), 1, key, ["mirror_pad_crop"]) for h in (5, 2**20 - 1))
    assert len(np.unique(first.reshape(64, -1), axis=0)) > 10
    assert not np.array_equal(first, second)
