"""Shares of the budget of a release; the closed form of the papers (budget: 10 s)."""

from __future__ import annotations

import dp_accounting as dp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.heads import closed_form, parts
from fedsim.heads.parts import Layout, Part
from fedsim.privacy import accountant
from fedsim.validate import InputError


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


def test_a_part_must_have_a_bound() -> None:
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
