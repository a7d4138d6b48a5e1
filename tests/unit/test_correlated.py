"""Correlated noise, exactly: factors, sensitivities, streaming against matrices, resume at every step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import approx_fprime, minimize

from fedsim import seeds
from fedsim.noise import banded as banded_noise
from fedsim.noise import tree as tree_noise
from fedsim.noise.banded import BandedToeplitz, optimal_coefficients
from fedsim.noise.gaussian import standard_normal
from fedsim.noise.stream import Factorisation, Stream
from fedsim.noise.tree import TreeAggregation
from fedsim.samplers.keyed import in_bin
from fedsim.validate import InputError

Array = NDArray[np.float64]
ROOT, COUNT = 5, 7


def banded(bands: int, steps: int) -> BandedToeplitz:
    return BandedToeplitz(optimal_coefficients(bands, steps))


CASES: list[tuple[Factorisation, int]] = [
    *((TreeAggregation(restart), 23) for restart in (1, 2, 3, 7, 8, 13, 23, 40)),
    *((banded(bands, 23), 23) for bands in (1, 2, 3, 8, 23, 40)),
]


def explicit_z(factorisation: Factorisation, steps: int, count: int) -> Array:
    """z in the order of the rows of C, from the keys the docstrings state."""
    if isinstance(factorisation, BandedToeplitz):
        return np.stack([standard_normal(seeds.derive(ROOT, "noise", t), count) for t in range(steps)])
    assert isinstance(factorisation, TreeAggregation)
    rows = []
    for t in range(steps):
        number, level = t % factorisation.restart_every + 1, 0
        while number % 2**level == 0:
            rows.append(standard_normal(seeds.derive(ROOT, "noise", t, level), count))
            level += 1
    return np.stack(rows)


def prefix_error(factorisation: Factorisation, steps: int) -> float:
    """Mean squared error of prefix sums at noise multiplier and clip norm 1."""
    _, decoder = factorisation.factors(steps)
    return factorisation.column_norm(steps) ** 2 * float(np.sum(np.cumsum(decoder, axis=0) ** 2)) / steps


@pytest.mark.parametrize(("factorisation", "steps"), CASES, ids=str)
def test_noisy_gradients_are_unbiased_and_streamed_as_the_matrix_says(
    factorisation: Factorisation, steps: int
) -> None:
    encoder, decoder = factorisation.factors(steps)
    np.testing.assert_allclose(decoder @ encoder, np.eye(steps), atol=1e-12)
    stream = Stream()
    rows = np.stack([stream.sample(factorisation, ROOT, t, COUNT) for t in range(steps)])
    np.testing.assert_allclose(rows, decoder @ explicit_z(factorisation, steps, COUNT), atol=1e-12)


def test_tree_sensitivity_is_the_largest_column_norm_for_every_size() -> None:
    for steps in range(1, 70):
        for restart in {1, 2, 5, 8, 16, 31, 33, 64, steps}:
            tree = TreeAggregation(restart)
            encoder, _ = tree.factors(steps)
            for begin in range(0, steps, restart):  # passes are separate releases
                columns = encoder[:, begin : begin + restart]
                assert np.linalg.norm(columns, axis=0).max() <= tree.column_norm(steps) * (1 + 1e-12)
            assert np.linalg.norm(encoder, axis=0).max() == pytest.approx(tree.column_norm(steps), rel=1e-12)


def test_passes_share_no_row() -> None:
    encoder, decoder = TreeAggregation(5).factors(13)
    for t, s in itertools.combinations(range(13), 2):
        if t // 5 != s // 5:
            assert encoder[:, t] @ encoder[:, s] == 0.0
            assert decoder[t] @ decoder[s] == 0.0


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_banded_sensitivity_over_all_participations_at_least_bands_apart(bands: int) -> None:
    steps = 11
    factorisation = banded(bands, steps)
    encoder, _ = factorisation.factors(steps)
    worst: dict[int, float] = {}
    for chosen in itertools.product((0, 1), repeat=steps):
        places = np.flatnonzero(chosen)
        if len(places) and (len(places) == 1 or np.diff(places).min() >= bands):
            # the worst signs are equal ones where columns overlap; here they must not overlap at all
            moved = float(np.linalg.norm(encoder[:, places].sum(axis=1)))
            worst[len(places)] = max(worst.get(len(places), 0.0), moved)
            gram = encoder[:, places].T @ encoder[:, places]
            np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-15)
    for participations, moved in worst.items():
        bound = np.sqrt(participations) * factorisation.column_norm(steps)
        assert moved <= bound * (1 + 1e-12)
        if participations * bands <= steps:
            assert moved == pytest.approx(bound)


def test_columns_closer_than_bands_do_overlap() -> None:
    """What cyclic sampling is for: without the separation the bound above is wrong."""
    factorisation = banded(4, 12)
    encoder, _ = factorisation.factors(12)
    assert np.linalg.norm(encoder[:, 3] + encoder[:, 4]) > np.sqrt(2) * factorisation.column_norm(12) * 1.1


def test_cycles_of_one_parity_share_no_row() -> None:
    """The step of dp_mf's holder bound: all steps of cycles c and c + 2 have disjoint columns."""
    for bands, steps in ((2, 13), (4, 24), (5, 31)):
        encoder, _ = banded(bands, steps).factors(steps)
        for t, s in itertools.combinations(range(steps), 2):
            if s // bands - t // bands >= 2:
                assert encoder[:, t] @ encoder[:, s] == 0.0


def test_tree_estimates_are_least_squares_within_each_subtree() -> None:
    """Independent construction: the best unbiased estimate of a subtree's total from the nodes inside it."""
    steps = 16
    _, decoder = TreeAggregation(steps).factors(steps)
    prefix_variance = np.sum(np.cumsum(decoder, axis=0) ** 2, axis=1)
    for t in range(steps):
        expected = 0.0
        for level in range(5):
            if (t + 1) >> level & 1:
                width = 1 << level
                nodes = [
                    [float(begin <= leaf < begin + size) for leaf in range(width)]
                    for size in (1 << k for k in range(level + 1))
                    for begin in range(0, width, size)
                ]
                expected += float(np.sum((np.ones(width) @ np.linalg.pinv(np.array(nodes))) ** 2))
        assert prefix_variance[t] == pytest.approx(expected)


@pytest.mark.parametrize(("factorisation", "steps"), CASES, ids=str)
def test_any_step_is_the_same_after_resuming_anywhere(factorisation: Factorisation, steps: int) -> None:
    unbroken, states = [], []
    stream = Stream()
    for t in range(steps):
        states.append(stream.state_dict())
        unbroken.append(stream.sample(factorisation, ROOT, t, COUNT))
    for saved in range(steps):
        resumed = Stream()
        resumed.load_state_dict(states[saved])
        for t in range(saved, steps):
            assert np.array_equal(resumed.sample(factorisation, ROOT, t, COUNT), unbroken[t])


@pytest.mark.parametrize("factorisation", [TreeAggregation(8), banded(4, 20)], ids=str)
def test_a_step_depends_on_root_and_step_alone(factorisation: Factorisation) -> None:
    ordered = Stream()
    expected = [ordered.sample(factorisation, ROOT, t, COUNT) for t in range(20)]
    wandering = Stream()
    for t in (7, 7, 3, 19, 0, 1, 12, 11):  # forward, again, backward
        assert np.array_equal(wandering.sample(factorisation, ROOT, t, COUNT), expected[t])
    empty = Stream()
    empty.load_state_dict({})
    assert np.array_equal(empty.sample(factorisation, ROOT, 13, COUNT), expected[13])
    assert not np.array_equal(empty.sample(factorisation, 99, 14, COUNT), expected[14])
    assert np.array_equal(empty.sample(factorisation, ROOT, 15, COUNT), expected[15])
    assert empty.sample(factorisation, ROOT, 16, 3).shape == (3,)


def test_a_failure_inside_a_step_does_not_spoil_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    factorisation = TreeAggregation(16)
    ordered = Stream()
    expected = [ordered.sample(factorisation, ROOT, t, COUNT) for t in range(9)]
    stream = Stream()
    for t in range(7):
        stream.sample(factorisation, ROOT, t, COUNT)
    real, calls = tree_noise.standard_normal, []

    def full(key: bytes, count: int) -> Array:
        calls.append(key)
        if len(calls) == 2:
            raise MemoryError
        return real(key, count)

    with monkeypatch.context() as patch:
        patch.setattr(tree_noise, "standard_normal", full)
        with pytest.raises(MemoryError):
            stream.sample(factorisation, ROOT, 7, COUNT)
    for t in (7, 8):
        assert np.array_equal(stream.sample(factorisation, ROOT, t, COUNT), expected[t])


def test_returned_noise_is_not_the_memory() -> None:
    for factorisation in (TreeAggregation(8), banded(3, 8)):
        stream, clean = Stream(), Stream()
        for t in range(8):
            values = stream.sample(factorisation, ROOT, t, COUNT)
            assert np.array_equal(values, clean.sample(factorisation, ROOT, t, COUNT))
            values[:] = np.nan


def test_memory_is_small() -> None:
    for factorisation, most in ((TreeAggregation(1000), 10), (banded(6, 1000), 5), (banded(1, 1000), 0)):
        stream, largest = Stream(), 0
        for t in range(1000):
            stream.sample(factorisation, ROOT, t, 2)
            largest = max(largest, stream.state_dict()["memory"].shape[0])
        assert largest <= most


def test_one_band_is_independent_noise_bit_for_bit() -> None:
    stream = Stream()
    for t in range(3):
        expected = standard_normal(seeds.derive(ROOT, "noise", t), COUNT)
        assert np.array_equal(stream.sample(BandedToeplitz((1.0,)), ROOT, t, COUNT), expected)
    assert BandedToeplitz((1.0,)).column_norm(3) == 1.0


def test_the_gradient_of_the_loss_is_right() -> None:
    at = np.array([0.7, 0.5, 0.9, 0.3])
    value, gradient = banded_noise._log_error(at, 30)
    numeric = approx_fprime(at, lambda r: banded_noise._log_error(r, 30)[0], 1e-7)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5)
    factorisation = BandedToeplitz((1.0, *np.cumprod(at)))
    assert value == pytest.approx(np.log(prefix_error(factorisation, 30)))


@pytest.mark.parametrize(("bands", "steps"), [(2, 20), (3, 50), (4, 12)])
def test_coefficients_are_optimal_without_the_bounds(bands: int, steps: int) -> None:
    """A search without derivatives or bounds, over coefficients, finds nothing better."""

    def error(c: Array) -> float:
        w = np.zeros(steps)
        w[0] = 1.0
        for t in range(1, steps):
            w[t] = -sum(c[j - 1] * w[t - j] for j in range(1, min(bands - 1, t) + 1))
        w = np.cumsum(w)
        return (1.0 + c @ c) * float(np.sum(w**2 * (steps - np.arange(steps)))) / steps

    found = minimize(
        error, np.full(bands - 1, 0.3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}
    )
    ours = prefix_error(banded(bands, steps), steps)
    assert ours == pytest.approx(found.fun, rel=1e-6)


def test_coefficients_improve_on_the_square_root_and_are_repeatable() -> None:
    for bands, steps in ((2, 10), (8, 100), (32, 500)):
        ours = optimal_coefficients(bands, steps)
        root = np.cumprod([1.0, *((2 * j - 1) / (2 * j) for j in range(1, bands))])
        assert len(ours) == bands
        assert prefix_error(BandedToeplitz(ours), steps) < prefix_error(BandedToeplitz(tuple(root)), steps)
        assert optimal_coefficients.__wrapped__(bands, steps) == ours
    assert len(optimal_coefficients(9, 4)) == 4


@pytest.mark.parametrize("steps", [16, 64, 100])
def test_prefix_sums_banded_beat_tree_beat_independent(steps: int) -> None:
    independent = prefix_error(BandedToeplitz((1.0,)), steps)
    assert independent == pytest.approx((steps + 1) / 2)
    tree = prefix_error(TreeAggregation(steps), steps)
    full = prefix_error(banded(steps, steps), steps)
    assert full < 0.5 * tree
    assert tree < 0.9 * independent
    errors = [prefix_error(banded(bands, steps), steps) for bands in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("wrong", [(), (2.0, 1.0), (1.0, 1.1), (1.0, 0.5, 0.6), (1.0, -0.1)])
def test_coefficients_that_could_grow_are_refused(wrong: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="never rise"):
        BandedToeplitz(wrong)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(InputError, match="restart_every"):
        TreeAggregation(0)
    for bands, steps in ((0, 5), (5, 0)):
        with pytest.raises(InputError):
            optimal_coefficients(bands, steps)


def test_every_id_is_in_exactly_one_bin_whoever_asks() -> None:
    ids = np.concatenate([np.arange(500), np.array([10_000, 2_000_000])])
    for bins in (1, 2, 3, 7, 100):
        key = seeds.derive(1, "test", bins)
        masks = np.stack([in_bin(ids, key, j, bins) for j in range(bins)])
        assert (masks.sum(axis=0) == 1).all()
        for part in (ids[::3], ids[::-1], ids[250:]):
            for j in range(bins):
                assert np.array_equal(in_bin(part, key, j, bins), masks[j][np.searchsorted(ids, part)])
    for index in (-1, 3):
        with pytest.raises(InputError, match="bin index"):
            in_bin(ids, seeds.derive(1, "test"), index, 3)
