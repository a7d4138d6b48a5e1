"""Products are made in the precision that is configured, whatever the process is set to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.engine.evaluate import by_class, evaluate
from fedsim.grads import FlatClip, arithmetic, clipped_gradient_sum
from fedsim.grads.bookkeeping import Options, clipped_sum
from fedsim.grads.local_training import LocalTraining, local_update
from fedsim.tasks.classification import Classification

SWITCHES = [*arithmetic._ON_CUDA, *arithmetic._ON_CPU]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _switches_come_back() -> Iterator[None]:
    before = [switch.fp32_precision for switch in SWITCHES]
    yield
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.fp32_precision = value


def seen() -> list[str]:
    return [switch.fp32_precision for switch in SWITCHES]


class Noting(nn.Module):
    """Notes the switches, and whether an autocast is on, whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        NOTED.append((seen(), torch.is_autocast_enabled("cpu")))
        return self.layer(inputs)


NOTED: list[tuple[list[str], bool]] = []


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def gradients(engine: str) -> Callable[[nn.Module], Any]:
    inputs, targets = torch.randn(3, 1, 3), torch.tensor([0, 1, 1])
    return lambda model: clipped_gradient_sum(model, inputs, targets, FlatClip(1.0), engine=engine)


RUNS: dict[str, Callable[[nn.Module], Any]] = {
    **{f"gradients, {engine}": gradients(engine) for engine in ("bookkeeping", "vmap", "opacus")},
    "local training": lambda model: local_update(
        model, torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), LocalTraining(), np.random.default_rng(0)
    ),
    "evaluation": lambda model: evaluate(
        model, [(torch.randn(2, 3), torch.tensor([0, 1]))], Classification()
    ),
    "accuracy by class": lambda model: by_class(
        model, [(torch.randn(2, 3), torch.tensor([0, 1]))], Classification(), 2
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_float32_is_float32_whatever_the_process_is_set_to(name: str) -> None:
    torch.set_float32_matmul_precision("medium")  # TF32 on CUDA, bfloat16 on CPUs that have it
    torch.backends.cudnn.allow_tf32 = True
    before = seen()
    assert "tf32" in before
    NOTED.clear()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            RUNS[name](Noting())
        assert NOTED
        assert all(switches == ["ieee"] * 6 and not cast for switches, cast in NOTED)
        assert seen() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_a_reduced_precision_is_for_cuda_alone(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Options, "check_device", lambda *_: None)
    with Options(precision=precision).arithmetic(CPU):
        assert seen() == ["tf32"] * 3 + ["ieee"] * 3


def test_switches_come_back_after_a_problem() -> None:
    before = seen()
    with pytest.raises(ZeroDivisionError):
        clipped_sum(
            nn.Linear(3, 2), torch.ones(2, 1, 3), torch.tensor([0, 1]), lambda *_: 1 / 0, FlatClip(1.0)
        )
    assert seen() == before
