"""The clip bound in bfloat16, emulated on the CPU by its autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import models
from fedsim.config import ModelConfig
from fedsim.grads import FlatClip
from fedsim.grads.bookkeeping import Options, clipped_sum
from fedsim.grads.per_example import cross_entropy

BOUND = 1e-2
MODELS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "mlp": ("mlp", (3, 8, 8), {}),
    "cnn": ("cifar_cnn", (3, 16, 16), {}),
    "wide resnet": ("wide_resnet", (3, 16, 16), {"depth": 10, "width": 1}),
    "vision transformer": ("vit", (3, 16, 16), {}),
}


@pytest.fixture(autouse=True)
def _on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Options, "check_device", lambda *_: None)


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    family, shape, options = MODELS[name]
    model = models.build(ModelConfig(family, options), shape, 5, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a last layer that starts at zero would hide what is behind it
                parameter.normal_(0.0, 0.1)
    generator = torch.Generator().manual_seed(2)
    return model, torch.randn((5, 2, *shape), generator=generator), torch.arange(5)


@pytest.mark.parametrize("name", MODELS)
def test_contributions_are_within_the_bound(name: str) -> None:
    model, inputs, targets = build(name)
    options = Options(precision="bfloat16")
    every = torch.arange(5)

    def total(rows: Tensor) -> tuple[Tensor, Tensor]:
        found, norms, _ = clipped_sum(
            model, inputs[rows], targets[rows], cross_entropy, FlatClip(BOUND), options
        )
        return found, norms

    whole, norms = total(every)
    assert whole.dtype == torch.float32
    assert norms.dtype == torch.float64
    assert (norms > BOUND).all(), "nothing is clipped: this would show nothing"
    for example in every:
        added = float((whole - total(every[every != example])[0]).norm())
        assert options.margin * 0.99 * BOUND <= added <= BOUND * (1 + 1e-6)


def plain(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The sum of gradients by ordinary autograd, one example at a time, under the same autocast."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters))
    for views, target in zip(inputs, targets, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(views)
        loss = cross_entropy(outputs.float(), target.expand(len(views))).mean()
        total += torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
    return total


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_ordinary_training_in_bfloat16(name: str) -> None:
    model, inputs, targets = build(name)
    seen: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *given: seen.add(given[2].dtype) or None)
    options = Options(precision="bfloat16")
    found, _, _ = clipped_sum(model, inputs, targets, cross_entropy, FlatClip(1e9), options)
    assert torch.bfloat16 in seen
    expected = plain(model, inputs, targets)
    assert (found / options.margin - expected).norm() < 0.02 * expected.norm()
