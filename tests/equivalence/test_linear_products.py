"""Every way of a linear layer, products by oneDNN and Gram matrices in parts, against the vmap oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.grads.bookkeeping import Options, choose, gram, precision
from fedsim.grads.bookkeeping.linear import LinearUse
from tests.equivalence.test_bookkeeping import CASES, assert_agrees, make

PLANS = ("keep", "gram", "drop")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", [name for name in CASES if "linear" in name or "tied" in name])
def test_every_way_of_a_linear_layer_agrees(case: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "linear", lambda *arguments: plan)
    for views in (1, 2):
        model, inputs = make(case, 3, views)
        assert_agrees(model, inputs, torch.float64)


class Mean(nn.Module):
    """The mean over positions of a linear layer, squashed, so that positions matter one by one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.layer(inputs)).mean(1)


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Send products of every size to oneDNN; says of which shapes (rows, in, out) they were."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    assert precision._onednn is not None, "torch has oneDNN, but not under this name any more"
    shapes: list[tuple[int, ...]] = []
    multiply = precision._onednn

    def noted(rows: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        shapes.append((*rows.shape, len(weight)))
        return multiply(rows, weight, *rest)

    monkeypatch.setattr(precision, "_LARGE", 0)
    monkeypatch.setattr(precision, "_onednn", noted)
    return shapes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 19, 10), (33, 5, 50), (40, 64, 1)])
def test_product_by_onednn_is_the_product(
    by_onednn: list[tuple[int, ...]], sizes: tuple[int, int, int], bias: bool
) -> None:
    count, width, out = sizes
    generator = torch.Generator().manual_seed(7)
    rows, weight = (torch.randn(n, width, generator=generator) for n in (count, out))
    offset = torch.randn(out, generator=generator) if bias else None
    expected = F.linear(rows.double(), weight.double(), None if offset is None else offset.double())
    for matrix in (weight, weight.t().contiguous().t()):
        torch.testing.assert_close(
            precision.affine(rows, matrix, offset).double(), expected, rtol=1e-5, atol=1e-5
        )
    assert by_onednn == [sizes] * 2
    spread = rows.t().contiguous().t()  # with gaps: left to torch, as are other dtypes
    torch.testing.assert_close(
        precision.affine(spread, weight, offset).double(), expected, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        precision.affine(rows.double(), weight.double()), rows.double() @ weight.double().t()
    )
    assert len(by_onednn) == 2 + (spread.is_contiguous())


@pytest.mark.parametrize("plan", ["closed", *PLANS])
def test_layers_by_onednn_agree(
    by_onednn: list[tuple[int, ...]], plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "linear", lambda *arguments: plan)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(
        3, 1 if plan == "closed" else 2, *([] if plan == "closed" else [5]), 64, generator=generator
    )
    layers = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 16, bias=False))
    assert_agrees(layers if plan == "closed" else Mean(layers), inputs, torch.float32)
    count = math.prod(inputs.shape[:-1])
    assert sorted(by_onednn) == sorted([(count, 64, 6), (count, 6, 16), (count, 16, 6)])  # and one backwards


@pytest.mark.parametrize("plan", ["closed", *PLANS])
def test_large_layers_agree_without_onednn(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "linear", lambda *arguments: plan)
    monkeypatch.setattr(precision, "_onednn", None)
    monkeypatch.setattr(precision, "_LARGE", 0)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(3, 1, *([] if plan == "closed" else [5]), 64, generator=generator)
    layer = nn.Linear(64, 6)
    assert_agrees(layer if plan == "closed" else Mean(layer), inputs, torch.float32)


@pytest.mark.parametrize("options", [Options(), Options(memory_budget=0, scratch=1)])
@pytest.mark.parametrize("widths", [(7, 5), (400, 3), (3, 400)])
@pytest.mark.parametrize("positions", [1, 16, 63, 64, 65, 96, 100, 131])
def test_gram_matrices_in_parts_agree(
    positions: int, widths: tuple[int, int], options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "linear", lambda *arguments: "gram")
    inputs = torch.randn(3, 1, positions, widths[0], generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float32, torch.float64):
        assert_agrees(Mean(nn.Linear(*widths)), inputs, dtype, options)


@pytest.mark.parametrize("positions", [1, 40, 64, 65, 96, 131])
def test_parts_add_up_to_the_whole_matrix(positions: int) -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randn(4, positions, width, generator=generator).double() for width in (9, 5))
    expected = (first @ first.mT * (second @ second.mT)).sum((1, 2))
    found, doubt = gram.inner(zip(gram.strips(first), gram.strips(second), strict=True), (9, 5))
    torch.testing.assert_close(found, expected)
    assert (doubt < 1e-12 * (first.norm(dim=2) * second.norm(dim=2)).sum(1).square()).all()


def test_early_matrices_stay_within_scratch_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "linear", lambda *arguments: "gram")
    formed: list[bool] = []
    see = LinearUse.see

    def noted(use: LinearUse, rows: Tensor) -> None:
        see(use, rows)
        formed.append(use._gram is not None)

    monkeypatch.setattr(LinearUse, "see", noted)
    inputs = torch.randn(3, 1, 8, 30, generator=torch.Generator().manual_seed(5))
    entries = 3 * 8 * 8
    for options, early in (
        (Options(), True),
        (Options(scratch=8 * entries), True),
        (Options(scratch=8 * entries - 1), False),
        (Options(memory_budget=8 * entries), True),
        (Options(memory_budget=8 * entries - 1), False),
    ):
        formed.clear()
        assert_agrees(Mean(nn.Linear(30, 4)), inputs, torch.float64, options)
        assert formed == [early], options


@pytest.mark.parametrize("plan", ["closed", *PLANS])
def test_norms_do_not_need_the_forward_pass(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where nothing is measured there."""
    monkeypatch.setattr(choose, "linear", lambda *arguments: plan)
    monkeypatch.setattr(LinearUse, "see", lambda use, rows: None)
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(3, 1, *([] if plan == "closed" else [8]), 30, generator=generator)
    layer = nn.Linear(30, 4)
    for dtype in (torch.float32, torch.float64):
        assert_agrees(layer if plan == "closed" else Mean(layer), inputs, dtype)
