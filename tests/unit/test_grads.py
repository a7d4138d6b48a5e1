"""Clip rules, flat vectors, and the contract of clipped_gradient_sum apart from the numbers' equality."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim import grads, models
from fedsim.config import ModelConfig
from fedsim.grads import ClipRule, FlatClip, NoClip, NormalisedClip, clipped_gradient_sum, opacus_engine
from fedsim.grads.clip import clip_and_sum
from fedsim.grads.microbatch import CannotFollow, slices
from fedsim.validate import InputError

ENGINES = sorted(grads.ENGINES)


def small(dtype: str = "float64") -> nn.Module:
    return models.build(ModelConfig("small_cnn", dtype=dtype), (1, 14, 14), 4, seed=0)


def batch(examples: int, views: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(examples + 100 * views)
    inputs = torch.randn((examples, views, 1, 14, 14), generator=generator, dtype=dtype)
    return inputs, torch.randint(0, 4, (examples,), generator=generator)


@given(st.floats(0.0, 1e30), st.floats(1e-6, 1e6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_contributions_never_exceed_the_sensitivity(norm: float, clip_norm: float) -> None:
    norms = torch.tensor([norm], dtype=torch.float64)
    for rule in (FlatClip(clip_norm), NormalisedClip(clip_norm)):
        coefficient = rule.coefficients(norms)
        assert coefficient.dtype == norms.dtype
        assert (coefficient * norms).item() <= rule.sensitivity * (1 + 1e-12)
        assert rule.sensitivity == clip_norm


def test_coefficients() -> None:
    norms = torch.tensor([0.0, 0.5, 2.0, math.inf, math.nan], dtype=torch.float64)
    flat = FlatClip(1.0).coefficients(norms)
    assert flat.tolist() == pytest.approx([1.0, 1.0, 1 / 2.000001, 0.0, 0.0], rel=1e-15)
    normalised = NormalisedClip(2.0, gamma=0.5).coefficients(norms)
    assert normalised.tolist() == pytest.approx([4.0, 2.0, 0.8, 0.0, 0.0], rel=1e-15)
    assert NoClip().coefficients(norms).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert NoClip().sensitivity == math.inf
    assert FlatClip(1.0).coefficients(norms.float()).dtype == torch.float32


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_clip_norm_must_be_positive(bad: float) -> None:
    with pytest.raises(InputError, match="clip_norm"):
        FlatClip(bad)
    with pytest.raises(InputError, match="clip_norm"):
        NormalisedClip(bad)
    with pytest.raises(InputError, match="gamma"):
        NormalisedClip(1.0, bad)


@pytest.mark.parametrize("width", [1, 1023, 1024, 1025, 600_000])
def test_float32_norms_are_right_for_long_gradients(width: int) -> None:
    rows = torch.randn((3, width), generator=torch.Generator().manual_seed(width)) + 1.0
    _, norms = clip_and_sum([rows], NoClip())
    exact = rows.double().norm(dim=1)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, exact, rtol=2e-7, atol=0)


def test_float32_contribution_stays_within_the_bound() -> None:
    rows = torch.randn((1, 600_000), generator=torch.Generator().manual_seed(0)) + 1.0
    total, _ = clip_and_sum([rows], FlatClip(1.0))
    assert total.double().norm().item() <= 1 + 1e-6
    one_long_reduction = (rows / rows.norm()).double().norm().item()  # the wrong version this guards against
    assert one_long_reduction > 1 + 1e-6


def test_flat_round_trip_and_order() -> None:
    model = small()
    model.get_submodule("features.0").requires_grad_(False)
    spec = grads.spec(model)
    assert spec.names == grads.trainable_names(model)
    assert spec.names[0] == "features.3.weight"
    vector = grads.get_flat(model)
    assert vector.shape == (spec.total,)
    assert torch.equal(vector[: spec.sizes[0]].reshape(spec.shapes[0]), model.get_parameter(spec.names[0]))
    frozen = model.get_parameter("features.0.weight").clone()
    grads.set_flat(model, torch.arange(spec.total, dtype=torch.float64))
    assert torch.equal(grads.get_flat(model), torch.arange(spec.total, dtype=torch.float64))
    assert torch.equal(model.get_parameter("features.0.weight"), frozen)
    for part, name in zip(spec.split(grads.get_flat(model)), spec.names, strict=True):
        assert torch.equal(part, model.get_parameter(name))
    vector += 1  # a copy: the model does not follow
    assert grads.get_flat(model)[0] == 0


def test_flat_refuses_what_does_not_fit() -> None:
    model = small()
    with pytest.raises(InputError, match="must have shape"):
        grads.set_flat(model, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(InputError, match="dtype"):
        grads.set_flat(model, torch.zeros(grads.spec(model).total))
    with pytest.raises(InputError, match="one dtype"):
        grads.get_flat(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
    with pytest.raises(InputError, match="none"):
        grads.spec(nn.Linear(2, 2).requires_grad_(False))


@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 20))
@settings(deadline=None, derandomize=True)
def test_slices_cover_everything_once_within_the_limit(examples: int, views: int, physical: int) -> None:
    pieces = list(slices(examples, views, physical))
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(examples))
    for piece in pieces:
        size = piece.stop - piece.start
        assert size >= 1
        assert size * views <= physical or size == 1


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a call could leave behind: attributes, hooks, modes, gradients, keys, values."""
    out: dict[str, Any] = {"state": list(model.state_dict()), "flat": grads.get_flat(model).tolist()}
    for name, module in model.named_modules():
        hooks = {k: list(v) for k, v in vars(module).items() if isinstance(v, OrderedDict) and "hook" in k}
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | str | None)}
        out[name] = (sorted(dir(module)), hooks, plain)
    for name, p in model.named_parameters():
        gradient = None if p.grad is None else (id(p.grad), p.grad.tolist())
        out[f"parameter {name}"] = (id(p), sorted(vars(p)), p.requires_grad, gradient)
    return out


def broken_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    raise ZeroDivisionError("in the loss")


@pytest.mark.parametrize("engine", ENGINES)
def test_model_is_left_as_it_came(engine: str) -> None:
    model = small()
    model.get_submodule("features").eval()
    model.get_parameter("head.0.weight").grad = torch.ones_like(model.get_parameter("head.0.weight"))
    model.get_submodule("features.0").requires_grad_(False)
    model.get_submodule("head").register_forward_hook(lambda *_: None)
    before = snapshot(model)
    inputs, targets = batch(5, 2)
    with torch.no_grad():  # the caller's mode must not matter
        result = clipped_gradient_sum(model, inputs, targets, FlatClip(1.0), engine=engine)
    assert result.sum.any()
    assert not result.sum.requires_grad
    assert not result.losses.requires_grad
    assert snapshot(model) == before
    with pytest.raises(InputError, match="ZeroDivisionError: in the loss"):
        clipped_gradient_sum(model, inputs, targets, FlatClip(1.0), engine=engine, loss=broken_loss)
    assert snapshot(model) == before
    with pytest.raises(InputError, match=r"Inputs are \(5, 2, 1, 14, 5\) float64"):
        clipped_gradient_sum(model, inputs[..., :5], targets, FlatClip(1.0), engine=engine)
    assert snapshot(model) == before


def opacus_sum(model: nn.Module, inputs: Tensor) -> Tensor:
    """By Opacus alone, without the ways that follow it."""
    targets = torch.zeros(len(inputs), dtype=torch.long)
    return opacus_engine.clipped_sum(model, inputs, targets, grads.cross_entropy, NoClip())[0]


def test_opacus_that_refuses_the_model_leaves_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU(), nn.BatchNorm1d(3)).double()
    before = snapshot(model)
    with pytest.raises(NotImplementedError):
        opacus_sum(model, torch.ones(2, 1, 3, dtype=torch.float64))
    assert snapshot(model) == before


class _FailsWhenCopied(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise OSError("no copy")


def test_opacus_that_fails_between_two_layers_leaves_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), _FailsWhenCopied(3, 2))
    before = snapshot(model)
    with pytest.raises(OSError, match="no copy"):
        opacus_sum(model, torch.ones(2, 1, 3))
    assert snapshot(model) == before


class _BatchInsideLayer(nn.Module):
    """Folds a second axis into the batch axis, so that layers see more rows than examples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        n = inputs.shape[0]
        return self.linear(inputs.reshape(-1, 3)).reshape(n, -1, 2).mean(1)


def test_opacus_refuses_rows_it_cannot_attribute() -> None:
    model = _BatchInsideLayer()
    inputs = torch.randn((4, 1, 5, 3), generator=torch.Generator().manual_seed(0))
    with pytest.raises(CannotFollow, match="20 rows for 4 views where"):
        opacus_sum(model, inputs)
    targets = torch.zeros(4).long()
    sums = [clipped_gradient_sum(model, inputs, targets, FlatClip(0.1), engine=e).sum for e in ENGINES]
    for found in sums[1:]:
        torch.testing.assert_close(found, sums[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", [FlatClip(0.5), NormalisedClip(0.5), NoClip()])
def test_empty_draw_is_a_zero_sum(engine: str, rule: ClipRule) -> None:
    model = small("float32")
    inputs, targets = batch(0, 3, torch.float32)
    result = clipped_gradient_sum(model, inputs, targets, rule, engine=engine)
    assert result.count == 0
    assert result.sum.shape == grads.get_flat(model).shape
    assert result.sum.dtype == torch.float32
    assert not result.sum.any()
    assert result.norms.shape == result.losses.shape == (0,)
    assert result.norms.dtype == result.losses.dtype == torch.float64
    assert result.sensitivity == rule.sensitivity


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs)


@pytest.mark.parametrize("engine", ENGINES)
def test_unused_parameters_get_zeros(engine: str) -> None:
    result = clipped_gradient_sum(
        _Unused(), torch.ones(3, 2, 3), torch.zeros(3).long(), FlatClip(1.0), engine=engine
    )
    assert result.sum[:8].all()
    assert not result.sum[8:].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_are_brought_to_the_model_dtype(engine: str) -> None:
    inputs, targets = batch(4, 1, torch.float32)
    result = clipped_gradient_sum(small("float64"), inputs, targets, FlatClip(1.0), engine=engine)
    assert result.sum.dtype == torch.float64


@pytest.mark.parametrize("engine", ENGINES)
def test_integer_inputs_stay_integers(engine: str) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))
    tokens = torch.randint(0, 7, (5, 1, 3), generator=torch.Generator().manual_seed(0))
    result = clipped_gradient_sum(model, tokens, torch.zeros(5).long(), FlatClip(1.0), engine=engine)
    assert result.sum[:28].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_random_layers_are_refused(engine: str) -> None:
    inputs, targets = torch.ones(2, 1, 3), torch.zeros(2).long()
    model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5))
    with pytest.raises(InputError, match="must not be random"):
        clipped_gradient_sum(model, inputs, targets, NoClip(), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_wrong_arguments_are_refused(engine: str) -> None:
    model = small()
    inputs, targets = batch(3, 2)
    with pytest.raises(InputError, match="Did you mean 'vmap'"):
        clipped_gradient_sum(model, inputs, targets, NoClip(), engine="vmpa")
    with pytest.raises(InputError, match="physical_batch_size"):
        clipped_gradient_sum(model, inputs, targets, NoClip(), engine=engine, physical_batch_size=0)
    with pytest.raises(InputError, match="targets"):
        clipped_gradient_sum(model, inputs, targets[:2], NoClip(), engine=engine)
    with pytest.raises(InputError, match="views"):
        clipped_gradient_sum(model, inputs[:, :0], targets, NoClip(), engine=engine)
    with pytest.raises(InputError, match="one value a view"):
        clipped_gradient_sum(
            model,
            inputs,
            targets,
            NoClip(),
            engine=engine,
            loss=lambda o, t: grads.cross_entropy(o, t).mean(),
        )


def test_opacus_leaves_logging_alone() -> None:
    """In a fresh process: pytest's own handlers would hide the one Opacus adds at import."""
    code = (
        "import logging, torch; from fedsim.grads import FlatClip, clipped_gradient_sum as f\n"
        "f(torch.nn.Linear(2, 2), torch.ones(1, 1, 2), torch.zeros(1).long(), FlatClip(1), engine='opacus')\n"
        "print(logging.getLogger().handlers)"
    )
    root = Path(grads.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
