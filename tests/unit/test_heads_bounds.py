"""What one example can change in the sums of private heads, by brute force (budget: 40 s)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.heads.feature_covariance import FeatureCovariance
from fedsim.heads.gradient import Gradient
from fedsim.heads.logistic import Logistic
from fedsim.heads.moments import Moments
from fedsim.heads.newton import Newton
from fedsim.heads.parts import Layout
from fedsim.heads.rows import Rows
from fedsim.validate import InputError

D, K = 6, 4
SEEDS = st.integers(0, 10**9)
CLIPS = st.sampled_from([0.05, 1.0, 7.0])
DTYPES = st.sampled_from([np.float32, np.float64])
KINDS = ("ordinary", "axis", "zero", "tiny", "long", "huge", "largest", "nan", "infinite", "mixed")


def hostile(rng: np.random.Generator, kind: str, dtype: type) -> np.ndarray:
    row = rng.normal(size=D)
    with np.errstate(over="ignore"):
        match kind:
            case "axis":
                row = np.eye(D)[rng.integers(D)] * rng.choice([-1, 1]) * 10 ** rng.uniform(-3, 3)
            case "zero":
                row *= 0
            case "tiny":
                row *= 1e-40
            case "long":
                row *= 10 ** rng.uniform(0, 6)
            case "huge":
                row *= 1e30
            case "largest":
                row = np.sign(row) * float(np.finfo(dtype).max)
            case "nan":
                row[rng.integers(D)] = np.nan
            case "infinite":
                row[rng.integers(D)] = rng.choice([-np.inf, np.inf])
            case "mixed":
                row *= 10 ** rng.uniform(-30, 30, D)
        return row.astype(dtype)


def lost(kind: str) -> bool:
    return kind in ("nan", "infinite")


def example(seed: int, kind: str, dtype: type) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return hostile(rng, kind, dtype)[None], rng.integers(K, size=1), rng


def in_units(layout: Layout, added: dict[str, Tensor]) -> float:
    """The length of all parts together, in units of the noise at noise multiplier 1."""
    return math.sqrt(sum(p.share * float(added[p.name].norm() / p.bound) ** 2 for p in layout.parts))


def check(layout: Layout, added: dict[str, Tensor], nothing: bool, tight: bool = False) -> None:
    for part in layout.parts:
        own = float(added[part.name].norm())
        assert own <= part.bound * (1 + 1e-6), part.name
        assert not tight or own >= part.bound * (1 - 1e-5), part.name
    length = in_units(layout, added)
    assert length <= 1 + 1e-6
    assert not tight or length >= 1 - 1e-5
    assert not nothing or length == 0


@given(SEEDS, st.sampled_from(KINDS), CLIPS, DTYPES, st.sampled_from([0.0, 1.0, 100.0]), st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_moments(seed: int, kind: str, clip: float, dtype: type, bias: float, per_class: bool) -> None:
    row, label, _ = example(seed, kind, dtype)
    moments = Moments(Rows(clip, bias), D, K, per_class=per_class)
    tight = kind in ("huge", "largest") or (bias == 100.0 and not lost(kind))
    check(moments.layout(), moments.sums(row, label), lost(kind), tight)


@given(SEEDS, st.sampled_from(KINDS), st.sampled_from(KINDS), CLIPS, DTYPES)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_moments_of_general_targets(seed: int, kind: str, other: str, clip: float, dtype: type) -> None:
    row, _, rng = example(seed, kind, dtype)
    target = hostile(rng, other, dtype)[None, :K]
    moments = Moments(Rows(clip), D, K, target_bound=3.0)
    gone = lost(kind) or not np.isfinite(target).all()
    sums = moments.sums(row, target)
    check(moments.layout(), sums, gone, kind == other == "huge")
    assert all(bool(torch.isfinite(value).all()) for value in sums.values())


@given(SEEDS, st.sampled_from(KINDS), CLIPS, DTYPES)
@settings(deadline=None, derandomize=True)
def test_covariance(seed: int, kind: str, clip: float, dtype: type) -> None:
    row, _, _ = example(seed, kind, dtype)
    covariance = FeatureCovariance(Rows(clip), D)
    check(covariance.layout(), covariance.sums(row), lost(kind), kind == "huge")


LOSSES = [
    Logistic(K),
    Logistic(K, alpha=0.1),
    Logistic(K, alpha=3.0),
    Logistic(K, offset=-10.0),
    Logistic(K, alpha=0.5, offset=2.0),
    Logistic(K, "softmax"),
    Logistic(2, "softmax"),
]


def weights_of(rng: np.random.Generator, classes: int, zero: bool) -> Tensor:
    return torch.from_numpy(rng.normal(size=(classes, D)) * 10 ** rng.uniform(-2, 1.5) * (not zero))


@given(SEEDS, st.sampled_from(KINDS), CLIPS, DTYPES, st.sampled_from(LOSSES), st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_newton(seed: int, kind: str, clip: float, dtype: type, loss: Logistic, zero: bool) -> None:
    row, label, rng = example(seed, kind, dtype)
    label, weights = label % loss.classes, weights_of(rng, loss.classes, zero)
    for shared in {False, loss.shared(weights)}:
        newton = Newton(Rows(clip), loss, D, shared=shared)
        tight = zero and kind == "huge" and loss.offset == 0 and loss.alpha == 1
        check(newton.layout(weights), newton.sums(row, label, weights), lost(kind), tight)
        check(
            newton.layout(None) if not shared else newton.layout(weights),
            newton.sums(row, label, weights),
            lost(kind),
        )


@given(
    SEEDS,
    st.sampled_from(KINDS),
    CLIPS,
    DTYPES,
    st.sampled_from(LOSSES),
    st.sampled_from(["", "map", "wild"]),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_gradients(seed: int, kind: str, clip: float, dtype: type, loss: Logistic, mapping: str) -> None:
    """Whatever the map, also one of very different scales, and whatever the weights."""
    row, label, rng = example(seed, kind, dtype)
    label, weights = label % loss.classes, weights_of(rng, loss.classes, False)
    found = None
    if mapping:
        vectors, _ = np.linalg.qr(rng.normal(size=(D, D)))
        values = 10 ** rng.uniform(-1, 2, D) * (10 ** rng.uniform(-6, 6, D) if mapping == "wild" else 1)
        found = torch.from_numpy((vectors * values) @ vectors.T)
    for residual_clip in (None, 0.2):
        gradient = Gradient(Rows(clip), loss, residual_clip, found)
        added, norms = gradient.sums(row, label, weights, gradient.lengths(row))
        own = float(gradient.mapped(added).norm())
        assert own <= gradient.bound * (1 + 1e-6)
        assert not lost(kind) or own == 0
        assert own <= float(norms[0]) * (1 + 1e-6) + 1e-30, "of before the clips; tiny rows are rounded"
        if mapping != "wild" and kind == "ordinary" and float(norms[0]) < 0.2 * min(1.0, clip):
            assert own == pytest.approx(float(norms[0]), rel=1e-6), "what is short is not clipped"


def test_a_map_that_is_no_number_is_refused_and_one_that_overflows_adds_nothing() -> None:
    with pytest.raises(InputError, match="map of rows must be finite"):
        Gradient(Rows(1.0), Logistic(K), None, torch.full((D, D), torch.nan).double())
    gradient = Gradient(Rows(1.0), Logistic(K), None, torch.full((D, D), 1e308, dtype=torch.float64))
    row = np.ones((1, D))
    added, _ = gradient.sums(row, np.zeros(1, int), torch.zeros(K, D), gradient.lengths(row))
    assert not bool(added.any())


@given(SEEDS, CLIPS, st.sampled_from(LOSSES), st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_the_bounds_of_residuals_and_curvatures_hold_without_a_clip(
    seed: int, clip: float, loss: Logistic, zero: bool
) -> None:
    """Over rows that reach for them: along weights and their differences, on scores where chances are 1/2."""
    rng = np.random.default_rng(seed)
    weights = weights_of(rng, loss.classes, zero)
    towards = torch.cat(
        [weights, (weights[:, None] - weights).reshape(-1, D), torch.from_numpy(rng.normal(size=(40, D)))]
    )
    lengths = towards.norm(dim=1, keepdim=True).clamp(min=1e-300)
    far = torch.cat(
        [sign * size * towards / lengths for sign in (-1, 1) for size in (clip, clip * rng.uniform())]
    )
    for own in range(loss.classes):
        hot = torch.eye(loss.classes).double()[[own] * len(far)]
        residuals, curvatures = loss.terms(far @ weights.t(), hot)
        assert float(residuals.norm(dim=1).max()) <= loss.residual_bound(weights, clip) * (1 + 1e-9)
        assert float(curvatures.norm(dim=1).max()) <= loss.curvature_bound(weights, clip) * (1 + 1e-9)
        # And they are never clipped where the bound is that of the loss, but for rounding.
        kept = loss.residuals(far @ weights.t(), hot, loss.residual_bound(weights, clip))
        torch.testing.assert_close(kept, residuals, rtol=1e-9, atol=0)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_what_is_longer_than_a_bound_is_scaled_down_to_it(loss: Logistic) -> None:
    """Rounding may make it so, and whoever gives a smaller bound than the loss promises."""
    scores = torch.randn(40, loss.classes, generator=torch.Generator().manual_seed(0)).double()
    hot = torch.eye(loss.classes).double()[torch.arange(40) % loss.classes]
    for cut, whole in zip((loss.residuals, loss.curvatures), loss.terms(scores, hot), strict=True):
        lengths = whole.norm(dim=1, keepdim=True)
        bound = float(lengths.median())
        expected = whole * (bound / lengths).clamp(max=1.0)
        torch.testing.assert_close(cut(scores, hot, bound), expected, rtol=1e-6, atol=0)
        assert float(cut(scores, hot, bound).norm(dim=1).max()) <= bound * (1 + 1e-9)


def test_bounds_are_those_that_are_stated() -> None:
    zero = torch.zeros(10, 3)
    assert Logistic(10).residual_bound(zero, 5.0) == pytest.approx(math.sqrt(10) / 2)
    assert Logistic(10).curvature_bound(zero, 5.0) == pytest.approx(math.sqrt(10) / 4)
    assert Logistic(10, alpha=0.1).residual_bound(zero, 5.0) == pytest.approx(math.sqrt(1.09) / 2)
    assert Logistic(10, alpha=2.0).curvature_bound(zero, 5.0) == pytest.approx(math.sqrt(37) / 4)
    assert Logistic(10, offset=-10.0).residual_bound(zero, 5.0) == pytest.approx(1, rel=1e-4)
    softmax = Logistic(10, "softmax")
    assert softmax.residual_bound(zero, 5.0) == pytest.approx(math.sqrt(0.9))
    assert softmax.curvature_bound(zero, 5.0) == pytest.approx(9 / 10**1.5)
    far = torch.eye(10, 3) * 1e3
    assert softmax.residual_bound(far, 5.0) == pytest.approx(math.sqrt(2))
    assert softmax.curvature_bound(far, 5.0) == pytest.approx(math.sqrt(4 / 27))
    thirds = torch.tensor([[0.0, 0, 0, -60]]).double()
    third = Logistic(4, "softmax").terms(thirds, torch.eye(4).double()[:1])[1]
    assert float(third.norm()) == pytest.approx(math.sqrt(4 / 27)), "three classes of a third reach it"


def test_one_hessian_for_all_classes_is_for_zero_weights_only() -> None:
    rows, zero = Rows(2.0), torch.zeros(K, D)
    shared = Newton(rows, Logistic(K), D, shared=True)
    each = Newton(rows, Logistic(K), D)
    values, labels = np.random.default_rng(0).normal(size=(30, D)), np.arange(30) % K
    one = shared.sums(values, labels, zero)["hessian"]
    torch.testing.assert_close(each.sums(values, labels, zero)["hessian"], one.expand(K, -1))
    bounds = [newton.layout(zero).parts[1].bound for newton in (shared, each)]
    assert bounds == pytest.approx([1.0, math.sqrt(K)]), "C^2 / 4, without and with the root of classes"
    away, weighted = torch.full((K, D), 1e-3), Newton(rows, Logistic(K, alpha=0.5), D, shared=True)
    for newton, weights in ((shared, away), (weighted, zero)):
        with pytest.raises(InputError, match="must have zero weights and alpha=1"):
            newton.layout(weights)
        with pytest.raises(InputError, match="must have zero weights and alpha=1"):
            newton.sums(values, labels, weights)


@given(SEEDS, st.sampled_from(KINDS), DTYPES, CLIPS)
@settings(deadline=None, derandomize=True)
def test_neighbours_differ_by_no_more_than_the_bound(seed: int, kind: str, dtype: type, clip: float) -> None:
    """With and without one example among others: the sum over the others is the same."""
    row, label, rng = example(seed, kind, dtype)
    others = rng.normal(size=(20, D)).astype(dtype)
    labels, weights = rng.integers(K, size=20), weights_of(rng, K, False)
    moments, newton = Moments(Rows(clip, 1.0), D, K, per_class=True), Newton(Rows(clip), Logistic(K), D)
    features, classes = np.concatenate([others, row]), np.concatenate([labels, label])
    pairs = [
        (moments.layout(), moments.sums(features, classes), moments.sums(others, labels)),
        (
            newton.layout(weights),
            newton.sums(features, classes, weights),
            newton.sums(others, labels, weights),
        ),
    ]
    rounding = 21 * 4 * float(np.finfo(dtype).eps)
    for layout, with_it, without in pairs:
        moved = {name: with_it[name] - without[name] for name in with_it}
        assert in_units(layout, moved) <= 1 + 1e-6 + rounding


@pytest.mark.parametrize("label", [-1, K, 10**6])
def test_a_class_that_is_none_adds_nothing(label: int) -> None:
    row, labels = np.ones((1, D), np.float32), np.array([label])
    for per_class in (False, True):
        moments = Moments(Rows(1.0, 1.0), D, K, per_class=per_class)
        check(moments.layout(), moments.sums(row, labels), nothing=True)
    for loss in (Logistic(K), Logistic(K, "softmax")):
        newton = Newton(Rows(1.0), loss, D)
        check(newton.layout(torch.zeros(K, D)), newton.sums(row, labels, torch.zeros(K, D)), nothing=True)


def test_the_bias_counts_in_the_norm() -> None:
    rows = Rows(2.0, bias=1.0).of(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8], [30.0, 40.0]]))
    assert rows.shape == (4, 3)
    np.testing.assert_allclose(rows.norm(dim=1), [2.0, 1.0, math.sqrt(2), 2.0], rtol=1e-6)
    assert rows[3, 2] == pytest.approx(2 / math.sqrt(2501))
