"""Standardised kernels: closed forms where they hold, and their other uses, against the vmap oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.grads.bookkeeping import Options, joint
from fedsim.models.layers import standardised
from tests.equivalence.test_bookkeeping import Apply, assert_agrees, weight

Function = Callable[[nn.Module, Tensor], Tensor]


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    kernel = standardised(m.w, m.g)
    kernel[0] *= 2.0
    return F.conv2d(x, kernel)


def with_weight_too(m: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, standardised(m.w, m.g)) * F.conv2d(x, m.w)


CLOSED: dict[str, Function] = {
    "plain": lambda m, x: F.conv2d(x, standardised(m.w, m.g)),
    "strided": lambda m, x: F.conv2d(x, standardised(m.w, m.g), stride=2, padding=1),
    "one dimension": lambda m, x: F.conv1d(x.flatten(2), standardised(m.v, m.g)),
    "gain frozen": lambda m, x: F.conv2d(x, standardised(m.w, m.g.detach())),
    "weight frozen": lambda m, x: F.conv2d(x, standardised(m.w.detach(), m.g)),
}

OPEN: dict[str, Function] = {
    "changed in place": in_place,
    "scaled": lambda m, x: F.conv2d(x, 3.0 * standardised(m.w, m.g)),
    "turned round": lambda m, x: F.conv2d(x, standardised(m.w, m.g).flip(2)),
    "gain computed": lambda m, x: F.conv2d(x, standardised(m.w, 2.0 * m.g)),
    "weight computed": lambda m, x: F.conv2d(x, standardised(m.w + 1.0, m.g)),
    "two uses": lambda m, x: F.conv2d(x, k := standardised(m.w, m.g)) + F.conv2d(x.tanh(), k),
    "weight used too": with_weight_too,
    "linear": lambda m, x: F.linear(x.flatten(1)[:, :27], standardised(m.w, m.g).flatten(1)),
}


def model(function: Function, gain: Tensor) -> nn.Module:
    torch.manual_seed(5)
    return Apply(function, w=weight(4, 3, 3, 3), v=weight(4, 3, 3), g=nn.Parameter(gain))


@pytest.mark.parametrize("gain", [1.0, 0.0], ids=["gains", "a gain of zero"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("case", [*CLOSED, *OPEN])
def test_standardised_kernels_agree(
    case: str, views: int, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart: list[bool] = []
    groups = joint.groups

    def noted(watch: object) -> list[joint.Group]:
        found = groups(watch)  # type: ignore[arg-type]
        apart.append(not found)
        return found

    monkeypatch.setattr(joint, "groups", noted)
    built = model((CLOSED | OPEN)[case], torch.tensor([gain, 0.7, -1.3, 1.0]))
    inputs = torch.randn(3, views, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    for options in (Options(), Options(memory_budget=0, scratch=1), Options(channels_last=True)):
        assert_agrees(built, inputs, torch.float64, options)
    assert_agrees(built, inputs, torch.float32)
    assert set(apart) == {case in CLOSED}
