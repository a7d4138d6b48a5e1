"""Every way of a linear layer, products in blocks and Gram matrices in parts, against the vmap oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.grads.bookkeeping import Options, choose, linear
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
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiply in blocks whatever the size; says how many rows each block had."""
    monkeypatch.setattr(linear, "_LARGE", 0)
    monkeypatch.setattr(linear, "_BLOCK", 7)
    monkeypatch.setattr(linear, "_NARROW", 40)
    sizes: list[int] = []
    see = LinearUse.see

    def counted(use: LinearUse, rows: Tensor) -> None:
        sizes.append(len(rows))
        see(use, rows)

    monkeypatch.setattr(LinearUse, "see", counted)
    return sizes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 10, 16, 32, 50])
@pytest.mark.parametrize("views", [1, 3])
def test_products_in_blocks_agree(blocks: list[int], views: int, width: int, bias: bool) -> None:
    inputs = torch.randn(11, views, 19, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float64):
        blocks.clear()
        assert_agrees(nn.Linear(19, width, bias=bias), inputs, dtype)
        whole = [11 * views]
        expected = {1: [7, 4], 3: [6, 6, 6, 6, 6, 3]}[views]  # a block holds all views of its examples
        assert blocks == (whole if width >= 40 else expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("positions", [5, 9])
def test_blocks_hold_whole_examples(
    blocks: list[int], plan: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "linear", lambda *arguments: plan)
    inputs = torch.randn(3, 2, positions, 64, generator=torch.Generator().manual_seed(2))
    assert_agrees(Mean(nn.Linear(64, 6)), inputs, torch.float64)
    assert blocks == [2 * positions] * 3


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
    found = linear._Gram(first).inner(linear._Gram(second))
    torch.testing.assert_close(found, expected)


def test_early_matrices_stay_within_scratch_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "linear", lambda *arguments: "gram")
    formed: list[Any] = []
    see = LinearUse.see

    def noted(use: LinearUse, rows: Tensor) -> None:
        see(use, rows)
        formed.append(len(use._grams))

    monkeypatch.setattr(LinearUse, "see", noted)
    inputs = torch.randn(3, 1, 8, 30, generator=torch.Generator().manual_seed(5))
    entries = 3 * 8 * 8
    for options, early in (
        (Options(), 1),
        (Options(scratch=8 * entries), 1),
        (Options(scratch=8 * entries - 1), 0),
        (Options(memory_budget=8 * entries), 1),
        (Options(memory_budget=8 * entries - 1), 0),
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
