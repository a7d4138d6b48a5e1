"""Heads without noise are those that independent solvers find; with noise, defaults hold (budget: 30 s)."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from scipy.special import expit, logsumexp

from fedsim.heads import feature_covariance, packing, solve, spectrum
from fedsim.heads.feature_covariance import FeatureCovariance
from fedsim.heads.gradient import Gradient
from fedsim.heads.logistic import Logistic
from fedsim.heads.moments import Moments
from fedsim.heads.newton import Newton
from fedsim.heads.rows import Rows
from fedsim.validate import InputError

N, D, K = 400, 7, 3
RNG = np.random.default_rng(2)
CENTRES = RNG.normal(size=(K, D))
Y = RNG.integers(K, size=N)
X = CENTRES[Y] + RNG.normal(size=(N, D))
FREE = Rows(1e9)  # nothing is clipped
HOT = np.eye(K)[Y]


def test_least_squares_is_scipys() -> None:
    sums = Moments(FREE, D, K).sums(X, Y)
    found = solve.least_squares(spectrum.of_packed(sums["second"]).projected(), sums["first"], 3.0)
    stacked = np.concatenate([X, np.sqrt(3.0) * np.eye(D)])
    wanted = scipy.linalg.lstsq(stacked, np.concatenate([HOT, np.zeros((D, K))]))[0].T
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)
    centred = solve.least_squares(spectrum.of_packed(sums["second"]), solve.centred(sums["first"]), 3.0)
    np.testing.assert_array_equal((X @ wanted.T).argmax(1), (X @ centred.numpy().T).argmax(1))
    assert centred.norm() < found.norm()


def test_least_squares_with_general_targets_is_scipys() -> None:
    targets = RNG.normal(size=(N, 2))
    sums = Moments(FREE, D, 2, target_bound=100.0).sums(X, targets)
    found = solve.least_squares(spectrum.of_packed(sums["second"]), sums["first"], 0.0)
    np.testing.assert_allclose(found, scipy.linalg.lstsq(X, targets)[0].T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_weighted_least_squares_minimises_its_objective(alpha: float) -> None:
    sums = Moments(FREE, D, K, per_class=True).sums(X, Y)
    found = solve.weighted_least_squares(sums["by_class"], sums["second"], sums["first"], 0.5, alpha)
    for label in range(K):
        own = X[label == Y]

        def objective(w: np.ndarray, own: np.ndarray = own) -> float:
            return float(((own @ w - 1) ** 2).sum() + alpha * ((X @ w) ** 2).sum() + 0.5 * w @ w)

        wanted = scipy.optimize.minimize(objective, np.zeros(D), tol=1e-12, options={"gtol": 1e-9})
        assert objective(found[label].numpy()) <= wanted.fun * (1 + 1e-12)
        np.testing.assert_allclose(found[label], wanted.x, rtol=0, atol=1e-6)


def minimum(loss: Logistic, penalty: float) -> np.ndarray:
    weights = HOT + loss.alpha * (1 - HOT)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(K, D)
        z = X @ w.T + loss.offset
        if loss.kind == "softmax":
            value, residual = (
                (logsumexp(z, 1) - (HOT * z).sum(1)).sum(),
                np.exp(z - logsumexp(z, 1)[:, None]) - HOT,
            )
        else:
            value, residual = (weights * (np.logaddexp(0, z) - HOT * z)).sum(), weights * (expit(z) - HOT)
        return value + penalty / 2 * flat @ flat, (residual.T @ X).ravel() + penalty * flat

    options = {"maxiter": 10_000, "gtol": 1e-10}
    return scipy.optimize.minimize(objective, np.zeros(K * D), jac=True, method="BFGS", options=options).x


@pytest.mark.parametrize("loss", [Logistic(K), Logistic(K, alpha=0.3, offset=-2.0), Logistic(K, "softmax")])
def test_newton_steps_end_in_the_minimum(loss: Logistic) -> None:
    """Softmax's steps see the diagonal blocks alone: more of them, shorter."""
    newton, weights = Newton(FREE, loss, D), torch.zeros(K, D).double()
    steps, rate, penalty = (200, 0.5, 20.0) if loss.kind == "softmax" else (12, 1.0, 1.0)
    for _ in range(steps):
        sums = newton.sums(X, Y, weights)
        weights = solve.newton_step(weights, sums["gradient"], sums["hessian"], 0.0, rate, penalty)
    np.testing.assert_allclose(weights.ravel(), minimum(loss, penalty), rtol=0, atol=1e-6)


def test_the_first_step_is_the_same_with_one_hessian_for_all() -> None:
    zero, results = torch.zeros(K, D).double(), []
    for shared in (False, True):
        sums = Newton(FREE, Logistic(K), D, shared=shared).sums(X, Y, zero)
        results.append(solve.newton_step(zero, sums["gradient"], sums["hessian"], 2.0))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_preconditioned_steps_end_in_the_minimum() -> None:
    """DP-FC without noise: G / 4 is above every Hessian, so full steps converge."""
    loss, weights = Logistic(K), torch.zeros(K, D).double()
    second = spectrum.of_packed(FeatureCovariance(FREE, D).sums(X)["second"]).projected()
    gradients = Gradient(FREE, loss)
    for _ in range(600):
        slope = gradients.sums(X, Y, weights, gradients.lengths(X))[0] + weights
        weights = weights - 4.0 * second.solve(slope, 4.0)
    np.testing.assert_allclose(weights.ravel(), minimum(loss, 1.0), rtol=0, atol=1e-6)


def test_whitened_features_have_the_covariance_that_is_stated() -> None:
    second = spectrum.of_packed(FeatureCovariance(FREE, D).sums(X)["second"])
    mapped = X @ feature_covariance.whitening(second, N, 0.2).numpy()
    assert np.square(mapped).sum(1).mean() == pytest.approx(1.0)
    shape = X.T @ X / N @ np.linalg.inv(X.T @ X / N + 0.2 * np.eye(D))
    np.testing.assert_allclose(mapped.T @ mapped / N, shape / np.trace(shape), rtol=0, atol=1e-9)


def test_the_default_ridge_makes_noisy_moments_positive() -> None:
    """Nothing but the noise level is asked: also where there is nothing below the noise."""
    rng = np.random.default_rng(0)
    for width in (50, 200):
        noise = torch.from_numpy(rng.normal(size=packing.length(width)) * 5)
        ridge = solve.ridge(5.0, width, factor=1.1)
        weights = solve.least_squares(spectrum.of_packed(noise), torch.ones(1, width), ridge)
        assert bool(weights.isfinite().all())
        assert ridge == pytest.approx(1.1 * 5 * np.sqrt(2 * width))


def test_impossible_steps_are_refused() -> None:
    zero = torch.zeros(K, D)
    packed = packing.pack(torch.eye(D))
    with pytest.raises(InputError, match="a Hessian for each of 3 classes, got 2"):
        solve.newton_step(zero, zero, packed.expand(2, -1), 1.0)
    with pytest.raises(InputError, match="a matrix for each of 3 classes, got 2"):
        solve.weighted_least_squares(packed.expand(2, -1), packed, zero, 1.0)
    with pytest.raises(InputError, match="ridge"):
        solve.weighted_least_squares(packed.expand(3, -1), packed, zero, 0.0)
