"""Loss distributions of one release: the library's own, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from numpy.typing import NDArray

from fedsim.privacy import single_release
from fedsim.privacy.loss_distribution import mixture_weights


def masses(found: pld.PrivacyLossDistribution) -> list[tuple[int, float, NDArray[np.float64]]]:
    both = (found._pmf_remove.to_dense_pmf(), found._pmf_add.to_dense_pmf())
    return [(pmf._lower_loss, pmf._infinity_mass, pmf._probs) for pmf in both]


def equal(a: pld.PrivacyLossDistribution, b: pld.PrivacyLossDistribution) -> bool:
    pairs = zip(masses(a), masses(b), strict=True)
    return all(x[:2] == y[:2] and np.array_equal(x[2], y[2]) for x, y in pairs)


@pytest.mark.parametrize(
    ("sigma", "rate", "step"),
    [
        (1.0, 0.01, 1e-3),
        (0.5, 0.3, 1e-2),
        (3.0, 0.2, 1e-3),
        (0.3, 0.9, 0.1),
        (20.0, 1e-4, 1e-5),
        (1.0, 0.5, 0.25),
        (0.7, 0.999, 0.05),
        (0.1, 1e-6, 1.0),
    ],
)
@np.errstate(all="ignore")
def test_a_sampled_gaussian_is_the_librarys(sigma: float, rate: float, step: float) -> None:
    theirs = pld.from_gaussian_mechanism(sigma, value_discretization_interval=step, sampling_prob=rate)
    assert equal(single_release.sampled_gaussian(sigma, rate, step), theirs)


@pytest.mark.parametrize(
    ("sigma", "rate", "examples", "step"),
    [
        (1.0, 0.01, 20, 0.02),
        (2.98, 0.2, 100, 0.2),
        (5.0, 0.5, 7, 0.02),
        (1.0, 0.001, 300, 0.02),
        (0.5, 0.9, 3, 0.2),
    ],
)
@np.errstate(all="ignore")
def test_a_mixture_is_the_librarys(sigma: float, rate: float, examples: int, step: float) -> None:
    weights = mixture_weights(examples, rate, 1e-12)
    theirs = pld.from_mixture_gaussian_mechanism(
        sigma, *weights, value_discretization_interval=step, log_mass_truncation_bound=-40.0
    )
    assert equal(single_release.mixture(sigma, *weights, step, -40.0), theirs)


@pytest.mark.parametrize(("sigma", "rate", "step"), [(1.0, 1e-17, 1e-17), (50.0, 1e-9, 1e-9)])
@np.errstate(all="ignore")
def test_what_the_library_refuses_is_refused(sigma: float, rate: float, step: float) -> None:
    """Rates so small that round-off takes losses beyond what they leave possible."""
    with pytest.raises(ValueError, match=r"smaller than|greater than"):
        pld.from_gaussian_mechanism(sigma, value_discretization_interval=step, sampling_prob=rate)
    with pytest.raises(ValueError, match="below what sampling leaves possible"):
        single_release.sampled_gaussian(sigma, rate, step)
