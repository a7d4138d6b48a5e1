"""Per-layer and grouped clipping: every engine against one example at a time, and whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim import models
from fedsim.clipping.base import ClipRule
from fedsim.clipping.grouped import ClipGroup, GroupedClip
from fedsim.clipping.per_layer import PerLayerClip
from fedsim.config import ModelConfig
from fedsim.grads import ENGINES, FlatClip, clipped_gradient_sum, cross_entropy, trainable_names
from fedsim.grads.bookkeeping import Options, clipped_sum
from fedsim.grads.per_example import clipped_gradient_sums
from tests.conftest import final, small, train

NAMES = sorted(ENGINES)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "small_cnn": ({}, (1, 16, 16)),
    "wide_resnet": ({"depth": 10, "width": 1}, (3, 8, 8)),
    "vit": ({"patch": 4, "width": 12, "depth": 2, "heads": 2}, (3, 8, 8)),
    "mlp": ({"hidden": [9, 5], "activation": "tanh"}, (11,)),
}


class Tied(nn.Module):
    """One weight in two places, one layer called twice, a low-rank weight of two modules, a position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.gain = nn.Parameter(torch.ones(6))
        self.position = nn.Parameter(torch.zeros(1, 6))
        self.out = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(inputs + self.position))))
        weight = self.up.weight @ self.down.weight + self.first.weight
        hidden = F.linear(hidden, weight * self.gain, self.first.bias * self.gain)
        return self.out(torch.tanh(self.first(hidden)))


def fill(model: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale)
    return model


def build(name: str, dtype: torch.dtype) -> nn.Module:
    return models.build(ModelConfig(name, MODELS[name][0], str(dtype)[6:]), MODELS[name][1], 5, seed=2)


def batch(
    shape: tuple[int, ...], examples: int, views: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((examples, views, *shape), generator=generator, dtype=torch.float64)
    inputs *= torch.linspace(0.2, 3.0, examples, dtype=torch.float64).reshape(-1, *[1] * (len(shape) + 1))
    return inputs.to(dtype), torch.randint(0, 5, (examples,), generator=generator)


def gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[list[Tensor]]:
    """One example at a time: the gradient of the mean loss over its views, float64, a tensor a parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = []
    for views, target in zip(inputs, targets, strict=True):
        loss = torch.stack([F.cross_entropy(model(v[None]), target[None]) for v in views]).mean()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        out.append(
            [
                (torch.zeros_like(p) if g is None else g).double()
                for g, p in zip(found, parameters, strict=True)
            ]
        )
    return out


def contribution(parts: Sequence[Tensor], groups: Sequence[str], bounds: dict[str, float]) -> Tensor:
    """Clip one example's gradient group by group; written apart from the rules under test."""
    squares = dict.fromkeys(bounds, 0.0)
    for part, group in zip(parts, groups, strict=True):
        squares[group] += part.square().sum().item()
    if not all(math.isfinite(s) for s in squares.values()):
        return torch.zeros(sum(p.numel() for p in parts), dtype=torch.float64)
    factors = {g: min(1.0, bounds[g] / (math.sqrt(s) + 1e-6)) for g, s in squares.items()}
    return torch.cat([factors[g] * part.flatten() for part, g in zip(parts, groups, strict=True)])


def layers(model: nn.Module, clip_norm: float) -> tuple[list[str], dict[str, float]]:
    """Group of each parameter and bound of each group, by walking over modules."""
    owners: dict[int, str] = {}
    for path, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), path)
    groups = [owners[id(p)] for p in model.parameters()]
    return groups, dict.fromkeys(groups, clip_norm / math.sqrt(len(set(groups))))


def grouped(
    assignment: dict[str, str], clip_norm: float, weights: dict[str, float]
) -> tuple[GroupedClip, list[str], dict[str, float]]:
    """A rule that names every parameter, with the group of each and the bounds."""
    rule = GroupedClip(
        clip_norm,
        {g: ClipGroup([n for n, of in assignment.items() if of == g], w) for g, w in weights.items()},
    )
    total = math.sqrt(sum(w**2 for w in weights.values()))
    return rule, list(assignment.values()), {g: clip_norm * w / total for g, w in weights.items()}


def check(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    rule: ClipRule,
    groups: list[str],
    bounds: dict[str, float],
    physical: Sequence[int] = (3, 256),
    engines: Sequence[str] = NAMES,
) -> None:
    """Compare all engines, and the sums by owner, with one example at a time."""
    tolerance = TOLERANCE[inputs.dtype]
    found = gradients(model, inputs, targets)
    expected = [contribution(parts, groups, bounds) for parts in found]
    norms = torch.stack([torch.cat([p.flatten() for p in parts]).norm() for parts in found])
    over = [
        any(
            math.sqrt(sum(p.square().sum().item() for p, of in zip(parts, groups, strict=True) if of == g))
            > bounds[g]
            for g in bounds
        )
        for parts in found
    ]
    whole = torch.stack(expected).sum(0)
    scale = max(1e-3, whole.norm().item())
    for engine in engines:
        for size in physical:
            got = clipped_gradient_sum(model, inputs, targets, rule, engine=engine, physical_batch_size=size)
            assert got.sum.dtype == inputs.dtype
            assert got.sensitivity == rule.sensitivity
            assert (got.sum.double() - whole).norm().item() <= tolerance * scale, engine
            torch.testing.assert_close(got.norms, norms, rtol=tolerance, atol=tolerance)
            assert got.clipped is not None
            assert got.clipped.tolist() == over
    owners = torch.arange(len(targets)) % 2
    totals = torch.zeros((2, len(whole)), dtype=inputs.dtype)
    own_norms, _, own_clipped = clipped_gradient_sums(model, inputs, targets, rule, owners, totals)
    for owner in (0, 1):
        of_owner = torch.stack(expected[owner::2]).sum(0)
        assert (totals[owner].double() - of_owner).norm().item() <= tolerance * scale
    torch.testing.assert_close(own_norms, norms, rtol=tolerance, atol=tolerance)
    assert own_clipped is not None
    assert own_clipped.tolist() == over


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_per_layer_equals_the_loop(name: str, dtype: torch.dtype, views: int) -> None:
    model = build(name, dtype)
    inputs, targets = batch(MODELS[name][1], 7, views, dtype)
    groups, bounds = layers(model, 0.7)
    assert len(bounds) > 2
    check(model, inputs, targets, PerLayerClip(0.7), groups, bounds)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_grouped_equals_the_loop_also_across_a_layer(name: str, dtype: torch.dtype, views: int) -> None:
    """Groups that part weight, gain and bias: the gain and weight of a standardised kernel among them."""
    model = build(name, dtype)
    inputs, targets = batch(MODELS[name][1], 7, views, dtype)
    assignment = {
        n: "matrices" if n.endswith("weight") and p.dim() > 1 else n.rpartition(".")[2]
        for n, p in model.named_parameters()
    }
    weights = {group: 1.0 + place for place, group in enumerate(sorted(set(assignment.values())))}
    rule, groups, bounds = grouped(assignment, 0.5, weights)
    check(model, inputs, targets, rule, groups, bounds)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_tied_and_computed_weights(dtype: torch.dtype, views: int) -> None:
    model = fill(Tied()).to(dtype)
    inputs, targets = batch((6,), 5, views, dtype)
    engines = [e for e in NAMES if e != "opacus"]  # knows no weight outside of a layer
    groups, bounds = layers(model, 0.4)
    assert len(bounds) == 6
    check(model, inputs, targets, PerLayerClip(0.4), groups, bounds, engines=engines)
    names = trainable_names(model)
    rule, groups, bounds = grouped({n: n for n in names}, 0.4, dict.fromkeys(names, 1.0))
    check(model, inputs, targets, rule, groups, bounds, engines=engines)


def test_tied_layers_in_opacus() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    model = fill(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(6, 5))).double()
    inputs, targets = batch((6,), 5, 2, torch.float64)
    groups, bounds = layers(model, 0.3)
    assert len(bounds) == 3
    check(model, inputs, targets, PerLayerClip(0.3), groups, bounds)


CNN = {
    "conv": nn.Conv2d(2, 4, 3, padding=1),
    "norm": nn.GroupNorm(2, 4),
    "strided": nn.Conv2d(4, 3, 2, stride=2, bias=False),
    "head": nn.Linear(12, 5),
}


def random_network(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    if kind == "tied":
        return fill(Tied()).double(), (6,)
    if kind == "standardised":
        return build("wide_resnet", torch.float64), (3, 8, 8)
    parts = [CNN["conv"], CNN["norm"], nn.Tanh(), CNN["strided"], nn.Flatten(), CNN["head"]]
    return fill(nn.Sequential(*parts), 3).double(), (2, 4, 4)


@given(st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_random_groupings(data: st.DataObject) -> None:
    model, shape = random_network(data.draw(st.sampled_from(["plain", "plain", "tied", "standardised"])))
    names = trainable_names(model)
    drawn = data.draw(st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names)))
    weights = {str(g): data.draw(st.sampled_from([0.3, 1.0, 4.0])) for g in sorted(set(drawn))}
    rule, groups, bounds = grouped(
        {n: str(g) for n, g in zip(names, drawn, strict=True)},
        data.draw(st.sampled_from([0.1, 1.0, 5.0])),
        weights,
    )
    views = data.draw(st.integers(1, 3))
    inputs, targets = batch(shape, 4, views, torch.float64, seed=data.draw(st.integers(0, 99)))
    expected = torch.stack([contribution(p, groups, bounds) for p in gradients(model, inputs, targets)])
    assert (expected.norm(dim=1) <= rule.sensitivity).all()
    for options in (Options(), Options(memory_budget=0, scratch=1)):
        total, _, _ = clipped_sum(model, inputs, targets, cross_entropy, rule, options)
        assert (total - expected.sum(0)).norm() <= 1e-10 * max(1.0, expected.sum(0).norm().item())
    got = clipped_gradient_sum(model, inputs, targets, rule, engine="vmap")
    assert (got.sum - expected.sum(0)).norm() <= 1e-10 * max(1.0, expected.sum(0).norm().item())


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("name", ["small_cnn", "wide_resnet"])
def test_every_part_of_a_contribution_keeps_its_bound(name: str, engine: str) -> None:
    model = build(name, torch.float32)
    inputs, targets = batch(MODELS[name][1], 5, 2, torch.float32)
    groups, bounds = layers(model, 0.05)  # everything is clipped
    sizes = [p.numel() for p in model.parameters()]
    flat_exceeds = False
    for i in range(5):
        one = inputs[i : i + 1], targets[i : i + 1]

        def longest(rule: ClipRule) -> float:
            got = clipped_gradient_sum(model, *one, rule, engine=engine).sum.double()  # noqa: B023
            parts = got.split(sizes)
            squares = dict.fromkeys(bounds, 0.0)
            for part, group in zip(parts, groups, strict=True):
                squares[group] += part.square().sum().item()
            assert got.norm().item() <= rule.sensitivity * (1 + 1e-6)
            return max(math.sqrt(s) / bounds[g] for g, s in squares.items())

        assert longest(PerLayerClip(0.05)) <= 1 + 1e-6
        flat_exceeds |= longest(FlatClip(0.05)) > 1.1  # the wrong version this test rejects
    assert flat_exceeds


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("name", ["small_cnn", "wide_resnet", "mlp"])
def test_one_group_is_flat_bit_for_bit(name: str, engine: str) -> None:
    model = build(name, torch.float32)
    inputs, targets = batch(MODELS[name][1], 7, 2, torch.float32)
    one = GroupedClip(0.3, {"all": ClipGroup(["*"], 5.0)})
    got = clipped_gradient_sum(model, inputs, targets, one, engine=engine)
    flat = clipped_gradient_sum(model, inputs, targets, FlatClip(0.3), engine=engine)
    assert torch.equal(got.sum, flat.sum)
    assert torch.equal(got.norms, flat.norms)
    assert got.clipped is not None
    assert torch.equal(got.clipped, flat.norms > 0.3)
    assert flat.clipped is None


@pytest.mark.parametrize("engine", NAMES)
def test_non_finite_examples_add_nothing(engine: str) -> None:
    model = build("small_cnn", torch.float64)
    inputs, targets = batch((1, 16, 16), 6, 2, torch.float64)
    good = [0, 2, 3, 5]
    rule = PerLayerClip(0.7)
    expected = clipped_gradient_sum(model, inputs[good], targets[good], rule, engine=engine)
    inputs[1, 0, 0, 3, 3], inputs[4, 1, 0, 0, 0] = math.nan, math.inf
    got = clipped_gradient_sum(model, inputs, targets, rule, engine=engine)
    assert torch.isfinite(got.norms).tolist() == [True, False, True, True, False, True]
    torch.testing.assert_close(got.norms[good], expected.norms, rtol=1e-10, atol=0)
    assert (got.sum - expected.sum).norm() <= 1e-10 * expected.sum.norm()
    nothing = clipped_gradient_sum(model, inputs[[1, 4]], targets[[1, 4]], rule, engine=engine)
    assert not nothing.sum.any()


FIRST, REST = "first: {parameters: ['layers.0.*'], weight: 2.0}", "rest: {parameters: ['layers.[!0].*']}"
GROUPS = f"privacy.clipping.options.groups={{{FIRST}, {REST}}}"
RUNS = {
    "per_layer": ["privacy.clipping=per_layer"],
    "grouped": ["privacy.clipping=grouped", GROUPS],
}


@pytest.mark.parametrize("clipping", RUNS)
def test_a_federated_run_equals_the_centralized_one(clipping: str, tmp_path: Path) -> None:
    base = [
        *RUNS[clipping],
        "model.dtype=float64",
        "train.augment_multiplicity=2",
        "train.augmentations=[flip]",
    ]
    spread = ["federation.holders=50", "federation.nodes=5", "engine.physical_batch_size=14"]
    train(small(*base, "federation.holders=1", "federation.nodes=1"), tmp_path / "central")
    train(small(*base, *spread), tmp_path / "federated")
    train(small(*base, *spread, "engine.gradients=vmap"), tmp_path / "vmap")
    train(small(*base[len(RUNS[clipping]) :]), tmp_path / "flat")
    central = final(tmp_path / "central")
    assert torch.max(torch.abs(final(tmp_path / "federated") - central)) <= 1e-10
    assert torch.max(torch.abs(final(tmp_path / "vmap") - central)) <= 1e-10
    assert torch.max(torch.abs(final(tmp_path / "flat") - central)) > 1e-3


def test_noise_and_epsilon_are_those_of_flat_clipping(tmp_path: Path) -> None:
    results = {
        name: train(small(*given, "train.steps=2", "train.eval_every=2"), tmp_path / name)
        for name, given in {"flat": [], **RUNS}.items()
    }
    for name in RUNS:
        assert results[name]["epsilon"] == results["flat"]["epsilon"]
        assert results[name]["noise_multiplier"] == results["flat"]["noise_multiplier"]
        ledgers = [
            [json.loads(line).get("event") for line in path.read_text().splitlines()]
            for path in (tmp_path / name / "ledger.jsonl", tmp_path / "flat" / "ledger.jsonl")
        ]
        assert ledgers[0] == ledgers[1]
