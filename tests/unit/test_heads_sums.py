"""Sums of private heads: the same for any partition, right in every dtype, refused shapes (budget: 30 s)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.heads import packing
from fedsim.heads.feature_covariance import FeatureCovariance
from fedsim.heads.gradient import Gradient
from fedsim.heads.logistic import Logistic
from fedsim.heads.moments import Moments, default_shares
from fedsim.heads.newton import Newton
from fedsim.heads.rows import Rows
from fedsim.validate import InputError

N, D, K = 5_000, 12, 3
RNG = np.random.default_rng(11)
X = RNG.normal(size=(N, D)) * 10 ** RNG.uniform(-1, 1, (N, 1))
Y = RNG.integers(K, size=N)
T = RNG.normal(size=(N, 2))
W = torch.from_numpy(RNG.normal(size=(K, D + 1)))
ROWS = Rows(1.5, bias=0.5)

_ROOT = torch.from_numpy(RNG.normal(size=(D + 1, D + 1)))
GRADIENT = Gradient(ROWS, Logistic(K), 0.5)
MAPPED = Gradient(ROWS, Logistic(K, "softmax"), 0.5, _ROOT + _ROOT.t())


def gradient(of: Gradient, features: np.ndarray, labels: np.ndarray, weights: Tensor) -> Tensor:
    return of.mapped(of.sums(features, labels, weights, of.lengths(features))[0])


SUMS = {
    "moments": lambda ids: Moments(ROWS, D, K, per_class=True).sums(X[ids], Y[ids]),
    "targets": lambda ids: Moments(ROWS, D, 2, target_bound=1.0).sums(X[ids], T[ids]),
    "newton": lambda ids: Newton(ROWS, Logistic(K, alpha=0.3), D).sums(X[ids], Y[ids], W),
    "softmax": lambda ids: Newton(ROWS, Logistic(K, "softmax"), D).sums(X[ids], Y[ids], W),
    "gradient": lambda ids: {"sum": gradient(GRADIENT, X[ids], Y[ids], W)},
    "mapped": lambda ids: {"sum": gradient(MAPPED, X[ids], Y[ids], W)},
    "covariance": lambda ids: FeatureCovariance(ROWS, D).sums(X[ids]),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("holders", [1, 10, 1000])
def test_holders_add_up_to_the_centralized_sum(name: str, holders: int) -> None:
    whole = SUMS[name](np.arange(N))
    order = np.random.default_rng(holders).permutation(N)
    total: dict[str, Tensor] = {}
    for ids in np.array_split(order, holders):
        for part, value in SUMS[name](ids).items():
            total[part] = total.get(part, torch.zeros_like(value)) + value
    assert total.keys() == whole.keys()
    for part, value in total.items():
        torch.testing.assert_close(value, whole[part], rtol=1e-8, atol=1e-8)
    for value in SUMS[name](np.arange(0)).values():
        assert not bool(value.any()), "a holder without examples"


def by_hand() -> tuple[np.ndarray, np.ndarray]:
    full = np.concatenate([X, np.full((N, 1), 0.5)], 1)
    rows = full * np.minimum(1, 1.5 / np.linalg.norm(full, axis=1))[:, None]
    return rows, np.eye(K)[Y]


@pytest.mark.parametrize("residual_clip", [None, 0.5])
def test_a_mapped_gradient_is_that_of_mapped_rows(residual_clip: float | None) -> None:
    """Written out: rows mapped and clipped one by one, at the weights that give the same scores on them."""
    mapping = MAPPED.mapping
    assert mapping is not None
    rows = torch.from_numpy(by_hand()[0]) @ mapping
    lengths = rows.norm(dim=1, keepdim=True)
    rows = rows * (5 / lengths.clamp(min=5))
    assert 0.1 < float((lengths > 5).double().mean()) < 0.9, "some are clipped"
    scores = rows @ (W @ torch.linalg.inv(mapping)).t()
    residuals = scores.softmax(1) - torch.from_numpy(by_hand()[1])
    if residual_clip is not None:
        residuals = residuals * (residual_clip / residuals.norm(dim=1, keepdim=True)).clamp(max=1)
    found = gradient(Gradient(ROWS, Logistic(K, "softmax"), residual_clip, mapping, 5.0), X, Y, W)
    torch.testing.assert_close(found, residuals.t() @ rows, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_moments_are_what_they_are_called(dtype: type) -> None:
    rows, hot = by_hand()
    found = Moments(ROWS, D, K, per_class=True).sums(X.astype(dtype), Y)
    rtol = {np.float64: 1e-10, np.float32: 1e-5, np.float16: 1e-2}[dtype]
    scale = float(np.linalg.norm(rows.T @ rows))
    second = packing.unpack(found["second"]).numpy()
    np.testing.assert_allclose(second, rows.T @ rows, rtol=0, atol=rtol * scale)
    np.testing.assert_allclose(found["first"], hot.T @ rows, rtol=0, atol=rtol * scale)
    for own, label in zip(packing.unpack(found["by_class"]), range(K), strict=True):
        mine = rows[label == Y]
        np.testing.assert_allclose(own, mine.T @ mine, rtol=0, atol=rtol * scale)
    np.testing.assert_allclose(found["by_class"].sum(0), found["second"], rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("loss", [Logistic(K, alpha=0.3, offset=-1.0), Logistic(K, "softmax")])
def test_newton_sums_are_the_derivatives_of_the_loss(loss: Logistic) -> None:
    """By automatic differentiation of the loss, written down here again."""
    rows = torch.from_numpy(by_hand()[0][:200])
    labels = torch.from_numpy(Y[:200])

    def value(weights: Tensor) -> Tensor:
        scores = rows @ weights.t() + loss.offset
        if loss.kind == "softmax":
            return torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
        hot = torch.nn.functional.one_hot(labels, K).double()
        each = torch.nn.functional.binary_cross_entropy_with_logits(scores, hot, reduction="none")
        return ((hot + loss.alpha * (1 - hot)) * each).sum()

    found = Newton(ROWS, loss, D).sums(X[:200], Y[:200], W)
    torch.testing.assert_close(found["gradient"], torch.func.grad(value)(W), rtol=1e-9, atol=1e-9)
    whole = torch.func.hessian(value)(W)
    hessians = packing.unpack(found["hessian"])
    for label in range(K):
        torch.testing.assert_close(hessians[label], whole[label, :, label], rtol=1e-9, atol=1e-9)


def test_a_file_that_is_mapped_into_memory_is_read_in_blocks(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for moments in (Moments(ROWS, D, K), Moments(ROWS, D, K, per_class=True)):
        for part, value in moments.sums(mapped, Y).items():
            whole = moments.sums(torch.from_numpy(X.astype(np.float16)), torch.from_numpy(Y))
            torch.testing.assert_close(value, whole[part], rtol=1e-12, atol=0)


def test_shares_are_equal_where_the_paper_says_so() -> None:
    assert default_shares(10) == (0.5, 0.5)
    assert default_shares(10, per_class=True) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert default_shares(10, gain=10.0)[0] > 0.8
    layout = Moments(ROWS, D, K).layout((0.3, 0.7))
    assert [(part.name, part.share, part.bound) for part in layout.parts] == [
        ("second", 0.3, 2.25),
        ("first", 0.7, 1.5),
    ]


def test_other_shapes_are_refused() -> None:
    moments, newton = Moments(ROWS, D, K), Newton(ROWS, Logistic(K), D)
    for features, labels in ((X[:, 1:], Y), (X, Y[:, None]), (X, Y[1:])):
        with pytest.raises(InputError, match="features"):
            moments.sums(features, labels)
        with pytest.raises(InputError, match="features"):
            newton.sums(features, labels, W)
    with pytest.raises(InputError, match=r"shape \(3, 13\)"):
        newton.layout(W[:, 1:])
    with pytest.raises(InputError, match="shares must be 2 numbers"):
        moments.layout((1.0,))
    with pytest.raises(InputError, match="must have classes"):
        Moments(ROWS, D, K, target_bound=1.0, per_class=True)
    with pytest.raises(InputError, match="softmax must have alpha=1"):
        Logistic(K, "softmax", alpha=0.5)
