"""What an example adds is never longer than C, however its norm is found and whatever cancels in it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bound import judge, reduced
from benchmarks.bound.hostile import FILLS
from fedsim.grads import FlatClip, clipped_gradient_sum, norms, vmap
from fedsim.grads.bookkeeping import Options, choose, clipped_sum, engine, gram, precision
from fedsim.grads.bookkeeping.precision import SUMMED
from fedsim.grads.bookkeeping.standardise import Origin, standardisations
from fedsim.grads.norms import squared_norms
from fedsim.models import layers
from fedsim.models.layers import WSConv2d
from fedsim.types import ClippedSum

BOUND = 1e-3


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1) * torch.linspace(-1.0, 1.0, outputs[0].numel(), dtype=outputs.dtype)).sum(1)


def longest(model: nn.Module, inputs: Tensor, options: Options) -> tuple[float, float]:
    """Length of the longest contribution / C, and what may be added to it for the rounding of two sums."""
    targets, clip = torch.zeros(len(inputs)), FlatClip(BOUND)
    total, norms, _ = clipped_sum(model, inputs, targets, loss, clip, options)
    assert (norms > BOUND).all(), "nothing is clipped: this would show nothing"
    added = []
    for example in range(len(inputs)):
        rest = [i for i in range(len(inputs)) if i != example]
        without, _, _ = clipped_sum(model, inputs[rest], targets[rest], loss, clip, options)
        added.append(float((total.double() - without.double()).norm()))
    return max(added) / BOUND, 1e-6 * float(total.norm()) / BOUND


class Centred(nn.Module):
    """Output gradients that cancel over positions (of a convolution: over the places of an image)."""

    def __init__(self, layer: nn.Module, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.axes = layer, axes

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        return torch.tanh(outputs - outputs.mean(self.axes, keepdim=True)).square()


class Twice(nn.Module):
    """Uses of one weight that almost cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 40, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) - self.layer(inputs * (1.0 + 1e-4) + 1e-3 * torch.sin(inputs))


class OnTheSphere(nn.Module):
    """A weight made of length one, as by weight normalisation: what lies along it cancels on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 50))

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight / self.weight.norm(dim=1, keepdim=True))


def _spread(shape: tuple[int, ...], mean: float) -> Tensor:
    return torch.randn(6, 1, *shape, generator=torch.Generator().manual_seed(1)) + mean


def _along(model: OnTheSphere) -> Tensor:
    """Inputs whose gradient lies almost along the weight."""
    directions = model.weight.detach().sum(0)
    return directions / directions.norm() * 30.0 + 1e-3 * _spread((50,), 0.0)


def _linear(plan: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(choose, "linear", lambda *_: plan)


def _conv(plan: str, keep: bool) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(choose, "convolution", lambda *_: (plan, keep))


LINEAR: tuple[Callable[[], nn.Module], tuple[int, ...]] = (
    lambda: Centred(nn.Linear(300, 40), (-2,)),
    (12, 300),
)
CONV: tuple[Callable[[], nn.Module], tuple[int, ...]] = (
    lambda: Centred(nn.Conv2d(30, 8, 3), (-1, -2)),
    (30, 6, 6),
)
STANDARD: tuple[Callable[[], nn.Module], tuple[int, ...]] = (lambda: WSConv2d(30, 8, 3), (30, 6, 6))
CASES: dict[str, tuple[Any, Callable[[pytest.MonkeyPatch], None]]] = {
    **{f"linear, {plan}": (LINEAR, _linear(plan)) for plan in ("gram", "drop", "keep")},
    **{
        f"convolution, {plan}{', kept' * keep}": (CONV, _conv(plan, keep))
        for plan, keep in (("gram", False), ("loop", False), ("loop", True), ("patches", False))
    },
    **{
        f"standardised, {plan}{', kept' * keep}": (STANDARD, _conv(plan, keep))
        for plan, keep in (("gram", False), ("loop", False), ("loop", True), ("slices", True))
    },
}


@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("case", CASES)
def test_what_cancels_is_not_measured_too_short(
    case: str, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    (build, shape), force = CASES[case]
    torch.manual_seed(3)
    model = build()
    if isinstance(model, WSConv2d):
        nn.init.normal_(model.gain, mean=1.0, std=0.3)
    force(monkeypatch)
    found, rounding = longest(model, _spread(shape, mean), Options())
    assert found <= 1.0 + 1e-6 + rounding


@pytest.mark.parametrize("options", [Options(), Options(memory_budget=0, scratch=1)], ids=["kept", "tight"])
def test_uses_that_cancel_are_measured_together(options: Options) -> None:
    torch.manual_seed(3)
    for model, inputs in ((Twice(), _spread((5, 40), 50.0)), (sphere := OnTheSphere(), _along(sphere))):
        found, rounding = longest(model, inputs, options)
        assert found <= 1.0 + 1e-6 + rounding


def test_the_gain_of_a_standardised_kernel_is_rounded_in_proportion_to_all_of_it() -> None:
    """Long kernels make the weight's gradient short: the gain's is then all there is, and mostly cancels."""
    for seed in range(50):
        torch.manual_seed(seed)
        layer = WSConv2d(12, 3, 1, bias=False)
        with torch.no_grad():
            layer.weight.mul_(1e4)
        origin = Origin(layer.weight, layer.gain, layers.standardise(layer.weight, layer.gain))
        (own,) = standardisations([origin])
        rows = 1e4 * (1.0 + 1e-5 * torch.randn(1, 3, 12))
        found, doubt = own.squares(
            rows.norm(dim=2), rows.sum(2), (rows * own.direction).sum(2), (SUMMED, SUMMED)
        )
        exact = sum(
            float(part.square().sum()) for _, part in own.pull_back(rows.double().view(1, 3, 12, 1, 1))
        )
        assert abs(float(found) - exact) <= float(doubt)


def test_terms_that_cancel_before_the_way_back_are_told_from_ordinary_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Tensor | None] = []
    judge = engine._too_short
    monkeypatch.setattr(engine, "_too_short", lambda *given: found.append(judge(*given)) or found[-1])
    torch.manual_seed(3)
    model = nn.utils.parametrizations.weight_norm(nn.Linear(30, 20, bias=False))
    inputs = torch.randn(3, 1, 2, 30)
    inputs[1, 0, 1] = inputs[1, 0, 0] * (1.0 + 1e-5)  # as much as the other place, with an opposite gradient
    targets = torch.randn(3, 2, 20)
    targets[1, 1] = -targets[1, 0]

    def product(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets).flatten(1).sum(1)

    clipped_sum(model, inputs, targets, product, FlatClip(1e-9))
    assert found[0] is not None
    assert found[0].tolist() == [False, True, False]


@pytest.mark.parametrize("plan", ["gram", "drop"])
def test_ordinary_norms_keep_their_digits(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on rounding scales an example down by 1e-5 at most, and ordinary ones by less."""
    torch.manual_seed(3)
    model, inputs = nn.Sequential(nn.Linear(192, 192), nn.Tanh(), nn.Linear(192, 50)), _spread((64, 192), 0.0)
    exact = clipped_sum(model, inputs, torch.zeros(6), loss, FlatClip(BOUND))[0]
    monkeypatch.setattr(choose, "linear", lambda *_: "keep")
    kept = clipped_sum(model, inputs, torch.zeros(6), loss, FlatClip(BOUND))[0]
    monkeypatch.setattr(choose, "linear", lambda *_: plan)
    found = clipped_sum(model, inputs, torch.zeros(6), loss, FlatClip(BOUND))[0]
    for other in (exact, kept):
        assert (found - other).norm() < 1e-5 * kept.norm()


@pytest.mark.parametrize("width", [300, 512, 4096, 4100, 40_000])
def test_norms_are_exact_to_half_a_millionth(width: int) -> None:
    """They round to one side in every step of a float32 sum."""
    values = torch.rand(60, 1, generator=torch.Generator().manual_seed(2)) * 2.0 + 0.01
    rows = values.expand(60, width).contiguous()
    for large in ([], [0], [width // 2], slice(0, width, 7), slice(0, width, 8), slice(3, width, 16)):
        for size in (3.0, 64.0, 512.0, 2048.0):  # beside which the others are rounded away
            hostile = rows.clone()
            hostile[:, large] *= size
            exact = hostile.double().square().sum(1)
            assert ((squared_norms(hostile) - exact).abs() <= 1e-6 * exact).all()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e18, 1e25])
def test_norms_of_entries_whose_squares_float32_does_not_have(size: float) -> None:
    rows = torch.full((3, 700), size)
    torch.testing.assert_close(squared_norms(rows), rows.double().square().sum(1), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("at_once", [1, 1500, norms._AT_ONCE])
def test_rows_that_float32_cannot_square_are_found_among_others(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "_AT_ONCE", at_once)
    sizes = torch.tensor([1.0, 0.0, 1e-25, 1.0, 1e25, 0.0, 3.0, 1e-22, math.inf, math.nan])
    rows = sizes[:, None] * torch.rand(10, 700, generator=torch.Generator().manual_seed(0)).add(0.1)
    exact = torch.stack([row.double().square().sum() for row in rows])
    found = norms.squared_norms_of([rows, rows.flip(0)])
    for one, other in ((found[0], exact), (found[1], exact.flip(0))):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=0.0, equal_nan=True)


def test_examples_without_a_gradient_cost_no_more_than_others() -> None:
    """A model that is sure of its examples has many of them."""

    class Launches(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for examples in (2, 200):
        with Launches() as seen:
            squared_norms(torch.zeros(examples, 300))
        counts.append(seen.count)
    assert counts[0] == counts[1]


def excess_of_products(length: int, device: str, dtype: torch.dtype = torch.float32) -> float:
    """Largest error of inner products of `length`, over what `precision.of_product` allows them."""
    generator = torch.Generator().manual_seed(length)
    worst = 0.0
    for left, right in ((1.0 / 3.0, 1.0 / 7.0), (0.7, 1.0 + 2.0**-12), (1.9999, 1.3)):
        for noise in (0.0, 1e-3, 1.0):
            one = left + noise * torch.randn(8, 40, length, generator=generator)
            other = right + noise * torch.randn(8, length, 24, generator=generator)
            one, other = (factor.to(device, dtype) for factor in (one, other))
            exact = torch.bmm(one.double(), other.double())
            allowed = torch.bmm(one.double().abs(), other.double().abs())
            allowed = allowed * precision.of_product(length, torch.float32)
            for found in (
                precision.batch_product(one, other),
                torch.stack([precision.product(a, b) for a, b in zip(one, other, strict=True)]),
            ):
                worst = max(worst, float(((found.double() - exact).abs() / allowed).max()))
    return worst


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100, 513, 4096, 20_000])
def test_products_are_as_exact_as_the_bound_takes_them_to_be(length: int) -> None:
    """A measured number (`precision.of_product`), measured again wherever the tests run."""
    assert excess_of_products(length, "cpu") <= 1.0


def rows_that_round_one_way(kind: str, positions: int, width: int, generator: torch.Generator) -> Tensor:
    """Rows (20, positions, width) in whose inner products all additions may round to one side."""
    rows = (torch.rand(20, 1, 1, generator=generator) + 0.5).expand(20, positions, width).clone()
    if kind == "halves":  # sums go up, and down again
        rows[:, 1::2, width // 2 :] *= -1.0
    elif kind == "nearly equal":
        rows *= 1.0 + 1e-6 * torch.randn(rows.shape, generator=generator)
    elif kind == "one large":
        rows[:, :, 0] *= 1024.0
    return rows


@pytest.mark.parametrize("kind", ["equal", "halves", "nearly equal", "one large"])
@pytest.mark.parametrize("positions", [1, 2, 4, 16, 70])
@pytest.mark.parametrize("width", [16, 64, 150, 256, 1000])
def test_norms_by_gram_matrices_are_rounded_up(width: int, positions: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(width + positions)
    first, second = (rows_that_round_one_way(kind, positions, n, generator) for n in (width, 256))
    grams = zip(gram.strips(first), gram.strips(second), strict=True)
    found, doubt = gram.inner(grams, (gram.length(width), gram.length(256)))
    exact = (second.double().mT @ first.double()).square().sum((1, 2))
    assert (found + doubt >= exact).all()
    assert (doubt <= 2.0 * engine.TOLERATED * exact).all()  # or every such example would be taken alone


@pytest.mark.parametrize("plan", [("gram", False), ("loop", False), ("loop", True), ("slices", True)])
@pytest.mark.parametrize("stretch", [0.1, 0.3, 0.6])
def test_norms_of_inputs_along_a_standardised_kernel_are_rounded_up(
    plan: tuple[str, bool], stretch: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of equal size and sign: the gradient along the kernel is off by as much as can be."""
    torch.manual_seed(4)
    layer = WSConv2d(64, 8, 3, bias=False)
    signs = torch.ones(8, 64 * 9)
    signs[:, 1::2] = -1.0
    with torch.no_grad():
        layer.weight.copy_(signs.view_as(layer.weight))
        layer.gain.copy_(stretch * (torch.rand(8) + 0.5))
    _conv(*plan)(monkeypatch)
    sizes = torch.rand(40, 1, 1, 1, 1) + 0.5
    inputs = sizes * signs[0].view(64, 3, 3)
    targets = torch.zeros(40)
    norms = clipped_sum(layer, inputs, targets, loss, FlatClip(1.0))[1]
    exact = vmap.clipped_sum(copy.deepcopy(layer).double(), inputs.double(), targets, loss, FlatClip(1.0))[1]
    assert (norms >= exact / (1.0 + 1e-6)).all(), float((exact / norms).max() - 1.0)


class Added(nn.Module):
    """A layer, a multiple of whose outputs is added up: output gradients are all equal."""

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.layer(inputs) * self.factor).flatten(1).sum(1)


HOW: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[pytest.MonkeyPatch], None]]] = {
    "linear, drop": (lambda: nn.Linear(600, 8, bias=False), (400, 600), _linear("drop")),
    "linear, gram": (lambda: nn.Linear(600, 8, bias=False), (gram.MOST, 600), _linear("gram")),
    **{
        f"convolution, {plan}": (lambda: nn.Conv2d(32, 4, 3, bias=False), (32, 20, 20), _conv(plan, False))
        for plan in ("loop", "grouped", "patches", "slices")
    },
}


@pytest.mark.parametrize("how", HOW)
def test_what_is_added_is_as_long_as_was_measured(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many equal terms, in the norm's product and the sum's: both round, and not to the same side."""
    build, shape, force = HOW[how]
    force(monkeypatch)
    generator = torch.Generator().manual_seed(5)
    options = Options(memory_budget=0)
    for _ in range(12):
        size, factor, bound = (torch.rand(3, generator=generator) + 0.2).tolist()
        model, clip = Added(build(), factor), FlatClip(0.1 * bound)
        inputs, targets = torch.full((2, 1, *shape), size), torch.tensor([100.0, 0.0])
        arguments = torch.mul, clip, options
        whole, norms, _ = clipped_sum(model, inputs, targets, *arguments)
        assert norms[0] > clip.clip_norm
        rest = clipped_sum(model, inputs[1:], targets[1:], *arguments)[0]
        assert (whole.double() - rest.double()).norm() <= clip.clip_norm * (1.0 + 1e-6)


@pytest.mark.parametrize("engine_name", ["bookkeeping", "vmap"])
@pytest.mark.parametrize("steep", ["plain", "equal"])
def test_how_inputs_lie_in_memory_changes_nothing(engine_name: str, steep: str) -> None:
    """Channels last, as from a picture: copies that fill a batch up would lie otherwise."""
    torch.manual_seed(10)
    draw, model = random.Random(10), reduced.build("wide resnet")
    inputs, targets = FILLS["cancelling"](draw, (2, 1, 3, 16, 16)), FILLS[steep](draw, (2, 5))
    turned = inputs.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)

    def sum_of(inputs: Tensor, targets: Tensor, bound: float) -> ClippedSum:
        return clipped_gradient_sum(
            model,
            inputs,
            targets,
            FlatClip(bound),
            loss=judge.product,
            engine=engine_name,
            physical_batch_size=2,
        )

    bound = float(sum_of(inputs, targets, 1.0).norms.median()) * 1e-2
    for given in (inputs, turned):
        whole, alone = (sum_of(given[:n], targets[:n], bound).sum.double() for n in (2, 1))
        assert (whole - alone).norm() <= bound * (1.0 + 1e-6) + 1e-6 * whole.norm()
    assert torch.equal(sum_of(turned, targets, bound).sum, sum_of(inputs, targets, bound).sum)
