"""The ways that GPUs go, gone on the CPU: the same sums, and nothing asked of the device on the way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.grads import FlatClip, gpu, vmap
from fedsim.grads.bookkeeping import Options, choose, clipped_sum, precision
from fedsim.grads.bookkeeping.geometry import Geometry
from fedsim.grads.bookkeeping.tape import Tape
from tests.equivalence.test_bookkeeping import CASES, TIGHT, assert_agrees, loss, make


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "on", lambda _: True)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_kind_agrees_with_the_oracle(case: str, views: int) -> None:
    model, inputs = make(case, 5, views)
    assert_agrees(model, inputs, torch.float64)
    assert_agrees(model, inputs, torch.float32)
    assert_agrees(model, inputs, torch.float64, TIGHT)


@pytest.mark.parametrize("case", [name for name in CASES if name != "prelu (no rule)"])
def test_every_layer_kind_takes_bfloat16(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and sums near those in float64. (torch has no PReLU of mixed dtypes under vmap.)"""
    monkeypatch.setattr(Options, "check_device", lambda *_: None)
    model, inputs = make(case, 4, 2)
    wide = inputs.double() if inputs.is_floating_point() else inputs
    targets = torch.linspace(-1.0, 1.0, 4)
    expected = vmap.clipped_sum(copy.deepcopy(model).double(), wide, targets, loss, FlatClip(1e6))
    narrow = inputs.float() if inputs.is_floating_point() else inputs
    options = Options(precision="bfloat16", fill=2)
    total, norms, _ = clipped_sum(model.float(), narrow, targets, loss, FlatClip(1e6), options)
    assert (total - expected[0]).norm() <= 0.15 * expected[0].norm()
    assert (norms - expected[1]).abs().max() <= 0.06 * expected[1].max()


class _Dtypes(TorchDispatchMode):
    """What layer norms are computed of."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.startswith("aten::native_layer_norm"):
            self.found |= {value.dtype for value in args if isinstance(value, Tensor)}
        return func(*args, **(kwargs or {}))


def test_layer_norms_are_of_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA's autocast has them: its kernel takes no bfloat16 with a gradient of float32."""
    monkeypatch.setattr(Options, "check_device", lambda *_: None)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    inputs, targets = torch.randn(4, 2, 6), torch.randn(4)
    with _Dtypes() as seen:
        clipped_sum(model, inputs, targets, loss, FlatClip(1.0), Options(precision="bfloat16"))
    assert seen.found == {torch.float32}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("plan", ["shifts", "gram"])
@pytest.mark.parametrize("case", [name for name in CASES if "conv" in name])
def test_every_way_of_a_convolution_agrees(
    case: str, plan: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forced(tape: Tape, kernel: Any, inputs: Tensor, geometry: Geometry, *_: Any) -> Any:
        return ("grouped" if geometry.groups > 1 else plan), keep and plan != "gram"

    monkeypatch.setattr(choose, "convolution", forced)
    for views in (1, 2):
        model, inputs = make(case, 3, views)
        assert_agrees(model, inputs, torch.float64)
        assert_agrees(model, inputs, torch.float64, Options(channels_last=True, scratch=1))


def test_three_parts_of_bfloat16_are_all_of_a_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(10_000, generator=generator) * torch.logspace(-25, 30, 10_000)
    parts = precision.thirds(values)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), values.double())


@pytest.mark.parametrize("wide", ["left", "right"])
def test_a_product_with_bfloat16_loses_nothing_of_the_float32(wide: str) -> None:
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(20, 300, generator=generator), torch.randn(300, 10, generator=generator)
    if wide == "left":
        right = right.bfloat16()
    else:
        left = left.bfloat16()
    found, exact = precision.product(left, right), left.double() @ right.double()
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-6 * (left.double().abs() @ right.double().abs()).max()
