"""What an example adds is never longer than C, however its norm is found and whatever cancels in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.grads import FlatClip
from fedsim.grads.bookkeeping import Options, choose, clipped_sum, engine
from fedsim.grads.bookkeeping.standardise import Origin, standardisations
from fedsim.grads.norms import squared_norms
from fedsim.models import layers
from fedsim.models.layers import WSConv2d

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
        found, doubt = own.squares(rows.norm(dim=2), rows.sum(2), (rows * own.direction).sum(2))
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
def test_norms_of_equal_entries_are_exact_to_a_millionth(width: int) -> None:
    """They round to one side in every step of a float32 sum."""
    values = torch.rand(60, 1, generator=torch.Generator().manual_seed(2)) * 2.0 + 0.01
    rows = values.expand(60, width).contiguous()
    exact = rows.double().square().sum(1)
    assert ((squared_norms(rows) - exact).abs() <= 1.5e-6 * exact).all()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e18, 1e25])
def test_norms_of_entries_whose_squares_float32_does_not_have(size: float) -> None:
    rows = torch.full((3, 700), size)
    torch.testing.assert_close(squared_norms(rows), rows.double().square().sum(1), rtol=2e-6, atol=0.0)
