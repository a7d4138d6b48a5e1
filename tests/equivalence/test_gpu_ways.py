"""The ways that GPUs go, gone on the CPU: the same sums, and nothing asked of the device on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.grads import gpu
from fedsim.grads.bookkeeping import Options, choose, precision
from fedsim.grads.bookkeeping.geometry import Geometry
from fedsim.grads.bookkeeping.tape import Tape
from tests.equivalence.test_bookkeeping import CASES, TIGHT, assert_agrees, make


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
