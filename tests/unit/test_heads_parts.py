"""Parts of a release are one Gaussian; the closed form of the papers (budget: 10 s)."""

from __future__ import annotations

import math

import dp_accounting as dp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsim.heads import closed_form, parts
from fedsim.heads.parts import Layout, Part
from fedsim.privacy import accountant
from fedsim.validate import InputError

SHARES = st.lists(st.floats(0.01, 10), min_size=1, max_size=5).map(parts.split)


@given(SHARES, st.floats(0.1, 50), st.integers(0, 10**6))
@settings(deadline=None, derandomize=True)
def test_parts_at_their_bounds_cost_what_one_gaussian_costs(
    shares: tuple[float, ...], noise_multiplier: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    made = [
        Part(str(j), (int(rng.integers(1, 5)),), float(10 ** rng.uniform(-3, 3)), share)
        for j, share in enumerate(shares)
    ]
    layout, worst = Layout(tuple(made)), {}
    for part in made:
        direction = torch.from_numpy(rng.normal(size=part.shape))
        worst[part.name] = part.bound * direction / direction.norm()
    stds = layout.noise_stds(noise_multiplier)
    cost = sum(float((worst[name] / stds[name]).square().sum()) for name in worst)
    assert cost == pytest.approx(1 / noise_multiplier**2, rel=1e-9), "of a release that reaches all bounds"
    flat = layout.flat(worst)
    assert float(flat.norm()) == pytest.approx(layout.sensitivity, rel=1e-9)
    for name, value in layout.named(flat).items():
        torch.testing.assert_close(value, worst[name], rtol=1e-12, atol=0)


def test_noise_of_the_flat_vector_is_each_parts_own() -> None:
    layout = Layout((Part("a", (20_000,), 9.0, 0.25), Part("b", (100, 200), 0.1, 0.75)))
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=layout.length) * 3.0)
    for name, value in layout.named(noise).items():
        standard = value.flatten().numpy() / layout.noise_stds(3.0)[name]
        assert stats.kstest(standard, "norm").pvalue > 1e-3
    assert layout.noise_stds(3.0) == pytest.approx({"a": 54.0, "b": 0.3 / math.sqrt(0.75)})


@given(SHARES, st.floats(0.5, 20))
@settings(deadline=None, derandomize=True)
def test_releases_one_after_the_other_cost_what_one_costs(shares: tuple[float, ...], sigma: float) -> None:
    several = parts.over_steps(sigma, shares)
    assert sum(1 / s**2 for s in several) == pytest.approx(1 / sigma**2, rel=1e-9)
    together = dp.ComposedDpEvent([dp.GaussianDpEvent(s) for s in several])
    exact = accountant.epsilon(dp.GaussianDpEvent(sigma), 1e-5).value
    assert accountant.epsilon(together, 1e-5).value == pytest.approx(exact, rel=1e-6)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4), st.integers(0, 10**6))
@settings(deadline=None, derandomize=True)
def test_no_other_split_leaves_a_smaller_error(errors: list[float], seed: int) -> None:
    best = parts.split(errors)
    other = np.random.default_rng(seed).dirichlet(np.ones(len(errors)))
    error = [sum(e**2 / a for e, a in zip(errors, shares, strict=True)) for shares in (best, other)]
    assert error[0] <= error[1] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((), "different names"),
        ((Part("a", (1,), 1.0, 0.5), Part("a", (1,), 1.0, 0.5)), "different names"),
        ((Part("a", (1,), 1.0, 0.5), Part("b", (1,), 1.0, 0.6)), "add up to 1, got 1.1"),
    ],
)
def test_what_is_no_release_is_refused(made: tuple[Part, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Layout(made)


def test_sums_of_other_shapes_are_refused() -> None:
    layout = Layout((Part("a", (2, 3), 1.0),))
    with pytest.raises(InputError, match="just these sums"):
        layout.flat({"a": torch.zeros(3, 2)})
    with pytest.raises(InputError, match=r"shape \(6,\), got \(5,\)"):
        layout.named(torch.zeros(5))
    with pytest.raises(InputError, match="bound of part a"):
        Part("a", (1,), 0.0)


# Mehta et al. 2023, noise multipliers at epsilon 0.1, 0.5, 1, 2, 4, 8; see the module on how they follow.
TABLE = {
    (8e-7, 3): (91.94, 18.52, 9.338, 4.747, 2.448, 1.292),
    (8e-7, 11): (176.1, 35.46, 17.88, 9.090, 4.687, 2.475),
    (8e-7, 2): (75.07, 15.12, 7.625, 3.876, 1.999, 1.055),
    (1e-5, 3): (83.29, 16.80, 8.488, 4.329, 2.245, 1.196),
    (1e-5, 11): (159.5, 32.17, 16.25, 8.289, 4.299, 2.290),
    (1e-5, 2): (68.01, 13.72, 6.930, 3.535, 1.833, 0.976),
}


@pytest.mark.parametrize(("delta", "releases"), TABLE)
def test_the_tables_of_the_paper_come_out(delta: float, releases: int) -> None:
    found = [closed_form.noise_multiplier(e, delta, releases) for e in (0.1, 0.5, 1, 2, 4, 8)]
    assert found == pytest.approx(TABLE[delta, releases], rel=5e-3)
    assert closed_form.noise_multiplier(0.01, 1e-5, 3) == pytest.approx(831.3, rel=5e-3)


@given(st.floats(1e-4, 50), st.floats(1e-12, 0.1))
@settings(deadline=None, derandomize=True)
def test_the_closed_form_is_inverted_and_above_the_exact_epsilon(epsilon: float, delta: float) -> None:
    beta = closed_form.beta(epsilon, delta)
    assert closed_form.epsilon(beta, delta) == pytest.approx(epsilon, rel=1e-9)
    exact = accountant.epsilon(dp.GaussianDpEvent(beta**-0.5), delta).value
    assert exact is not None
    assert exact <= epsilon


def test_how_loose_the_closed_form_is() -> None:
    for stated, exact in ((8.0, 6.76), (0.01, 0.0046)):
        event = dp.GaussianDpEvent(closed_form.noise_multiplier(stated, 1e-5))
        assert accountant.epsilon(event, 1e-5).value == pytest.approx(exact, rel=1e-2)
