"""All gradient engines against a plain autograd loop, one backward pass an example."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim import models
from fedsim.config import ModelConfig
from fedsim.grads import ENGINES, ClipRule, FlatClip, NoClip, NormalisedClip, clipped_gradient_sum
from fedsim.types import ClippedSum

NAMES = sorted(ENGINES)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "small_cnn": ({}, (1, 16, 16)),
    "cifar_cnn": ({}, (3, 8, 8)),
    "wide_resnet": ({"depth": 10, "width": 1}, (3, 8, 8)),
    "mlp": ({"hidden": [9, 5], "activation": "tanh"}, (11,)),
}
RULES: dict[str, ClipRule] = {"flat": FlatClip(0.7), "normalised": NormalisedClip(0.7), "none": NoClip()}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    return models.build(ModelConfig(name, MODELS[name][0], str(dtype)[6:]), MODELS[name][1], 5, seed=2)


def batch(
    shape: tuple[int, ...], examples: int, views: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((examples, views, *shape), generator=generator, dtype=torch.float64).to(dtype)
    inputs *= torch.linspace(0.2, 3.0, examples).to(dtype).reshape(-1, *[1] * (len(shape) + 1))
    return inputs, torch.randint(0, 5, (examples,), generator=generator)


def factor(rule: ClipRule, norm: float) -> float:
    """The clip rules once more, written apart from the ones under test."""
    if not math.isfinite(norm):
        return 0.0
    if isinstance(rule, FlatClip):
        return min(1.0, rule.clip_norm / (norm + 1e-6))
    if isinstance(rule, NormalisedClip):
        return rule.clip_norm / (norm + rule.gamma)
    return 1.0


def one_at_a_time(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, float]]:
    """Gradient in float64, and loss, of one example at a time: mean over its views, one backward pass."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = []
    for views, target in zip(inputs, targets, strict=True):
        loss = torch.stack([F.cross_entropy(model(v[None]), target[None]) for v in views]).mean()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        out.append((torch.cat([g.reshape(-1) for g in parts]).double(), loss.item()))
    return out


def added_up(found: list[tuple[Tensor, float]], rule: ClipRule) -> ClippedSum:
    """Clip, add."""
    total = torch.zeros_like(found[0][0])
    norms = torch.tensor([gradient.norm().item() for gradient, _ in found], dtype=torch.float64)
    for (gradient, _), norm in zip(found, norms.tolist(), strict=True):
        if math.isfinite(norm):
            total += factor(rule, norm) * gradient
    losses = torch.tensor([loss for _, loss in found], dtype=torch.float64)
    return ClippedSum(total, len(found), rule.sensitivity, norms, losses)


def reference(model: nn.Module, inputs: Tensor, targets: Tensor, rule: ClipRule) -> ClippedSum:
    """One example at a time, clipped and added."""
    return added_up(one_at_a_time(model, inputs, targets), rule)


def assert_same(got: ClippedSum, expected: ClippedSum, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    assert got.sum.dtype == dtype
    assert got.count == expected.count
    assert got.sensitivity == expected.sensitivity
    error = (got.sum.double() - expected.sum).norm() / expected.sum.norm()
    assert error.item() <= tolerance
    for a, b in ((got.norms, expected.norms), (got.losses, expected.losses)):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


# Over the three numbers of views every rule meets every physical batch size.
PHYSICAL = (1, 7, 256)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_engines_equal_the_loop(name: str, dtype: torch.dtype, views: int) -> None:
    model = build(name, dtype)
    inputs, targets = batch(MODELS[name][1], 8, views, dtype)
    alone = one_at_a_time(model, inputs, targets)
    for place, rule in enumerate(RULES.values()):
        expected = added_up(alone, rule)
        if isinstance(rule, FlatClip):  # otherwise clipping would not be tested
            assert (expected.norms > rule.clip_norm).any()
        physical = PHYSICAL[(place + views) % len(PHYSICAL)]
        for engine in NAMES:
            got = clipped_gradient_sum(
                model, inputs, targets, rule, engine=engine, physical_batch_size=physical
            )
            assert_same(got, expected, dtype)


def test_views_are_averaged_before_clipping() -> None:
    """The wrong version clips each view and averages after; the comparison must tell them apart."""
    model = build("mlp", torch.float64)
    inputs, targets = batch((11,), 6, 3, torch.float64)
    rule = FlatClip(0.3)
    right = reference(model, inputs, targets, rule).sum
    wrong = reference(model, inputs.flatten(0, 1)[:, None], targets.repeat_interleave(3), rule).sum / 3
    assert (right - wrong).norm() / right.norm() > 1e-2
    for engine in NAMES:
        got = clipped_gradient_sum(model, inputs, targets, rule, engine=engine).sum
        assert (got - right).norm() / right.norm() < 1e-10


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("physical", [1, 7, 256])
@pytest.mark.parametrize("name", ["small_cnn", "wide_resnet", "mlp"])
def test_non_finite_examples_add_nothing_and_poison_nothing(name: str, physical: int, rule: ClipRule) -> None:
    model = build(name, torch.float64)
    inputs, targets = batch(MODELS[name][1], 6, 2, torch.float64)
    good = [0, 2, 3, 5]
    expected = reference(model, inputs[good], targets[good], rule)
    inputs[1, 0].view(-1)[3] = math.nan
    inputs[4, 1].view(-1)[0] = math.inf
    for engine in NAMES:
        got = clipped_gradient_sum(model, inputs, targets, rule, engine=engine, physical_batch_size=physical)
        assert got.count == 6
        assert torch.isfinite(got.norms).tolist() == [True, False, True, True, False, True]
        assert ((got.sum - expected.sum).norm() / expected.sum.norm()).item() <= 1e-10
        torch.testing.assert_close(got.norms[good], expected.norms, rtol=1e-10, atol=0)


@pytest.mark.parametrize("engine", NAMES)
def test_only_non_finite_examples_give_an_exact_zero(engine: str) -> None:
    model = build("mlp", torch.float32)
    inputs, targets = torch.full((3, 2, 11), math.nan), torch.zeros(3, dtype=torch.long)
    got = clipped_gradient_sum(model, inputs, targets, NoClip(), engine=engine)
    assert not got.sum.any()
    assert got.norms.isnan().all()


class _Tied(nn.Module):
    """One weight in two places, one layer called twice, one frozen layer, one bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.out = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(inputs))))
        return self.out(torch.tanh(self.frozen(torch.tanh(self.first(hidden)))))


def test_tied_repeated_and_frozen_layers() -> None:
    tied = _Tied().double()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for p in tied.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    inputs, targets = batch((6,), 5, 2, torch.float64)
    expected = reference(tied, inputs, targets, FlatClip(0.7))
    for engine in NAMES:
        got = clipped_gradient_sum(tied, inputs, targets, FlatClip(0.7), engine=engine)
        assert_same(got, expected, torch.float64)


@st.composite
def random_models(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A small convolutional or fully connected network of random shape."""
    activation = draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU]))
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        shape: tuple[int, ...] = (draw(st.integers(1, 3)), draw(st.integers(5, 8)), draw(st.integers(5, 8)))
        channels = shape[0]
        for largest in draw(st.sampled_from([(3,), (3, 2)])):  # a 5x5 image is 2x2 or more after the first
            groups = draw(st.sampled_from([1, 2]))
            out = 2 * draw(st.integers(1, 3))
            kernel, stride = draw(st.integers(1, largest)), draw(st.integers(1, 2))
            padding, bias = draw(st.integers(0, 1)), draw(st.booleans())
            conv_groups = groups if channels % groups == 0 else 1
            layers.append(nn.Conv2d(channels, out, kernel, stride, padding, groups=conv_groups, bias=bias))
            layers.append(nn.GroupNorm(1, out))
            layers.append(activation())
            channels = out
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        width = channels * 4
    else:
        shape = (draw(st.integers(1, 9)),)
        width = shape[0]
        for size in draw(st.lists(st.integers(1, 9), max_size=3)):
            layers += [nn.Linear(width, size, bias=draw(st.booleans())), activation(), nn.LayerNorm(size)]
            width = size
    model = nn.Sequential(*layers, nn.Linear(width, 5)).double()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7)
    return model, shape


@given(
    random_models(), st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.sampled_from(sorted(RULES))
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_engines_agree_on_random_networks(
    network: tuple[nn.Module, tuple[int, ...]], examples: int, views: int, physical: int, rule: str
) -> None:
    model, shape = network
    inputs, targets = batch(shape, examples, views, torch.float64, seed=examples)
    expected = reference(model, inputs, targets, RULES[rule])
    scale = max(1.0, expected.sum.norm().item())
    for engine in NAMES:
        got = clipped_gradient_sum(
            model, inputs, targets, RULES[rule], engine=engine, physical_batch_size=physical
        )
        assert (got.sum - expected.sum).norm().item() <= 1e-10 * scale
        torch.testing.assert_close(got.norms, expected.norms, rtol=1e-8, atol=1e-10)
