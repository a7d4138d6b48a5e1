"""Models that tried to make a contribution longer than C, or to let examples meet: each once succeeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.grads import FlatClip, clipped_gradient_sum
from fedsim.grads.state import ChangesState

BOUND = 0.05


class Model(nn.Module):
    """A head, and a forward pass that does something on the way."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run, self.head = run, nn.Linear(6, 3, bias=False)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run(self, inputs)


class Clamped(torch.autograd.Function):
    """Its backward pass is not linear: gradients of two uses must be added before it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight * 1.0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.05, 0.05)


def hooked_copy(model: Any, inputs: Tensor) -> Tensor:
    weight = model.head.weight.clone()
    weight.register_hook(lambda gradient: gradient * 10.0)
    return F.linear(inputs, weight)


def hooked_parameter(model: Any, inputs: Tensor) -> Tensor:
    model.head.weight.register_hook(lambda gradient: gradient * 0.5)
    return model.head(inputs)


def clamped_twice(model: Any, inputs: Tensor) -> Tensor:
    weight = Clamped.apply(model.head.weight)
    return F.linear(inputs, weight) + F.linear(2.0 * inputs, weight)


def remembers_deep_down(model: Any, inputs: Tensor) -> Tensor:
    before = model.memory["below"].get("mean", torch.zeros(6))
    model.memory["below"]["mean"] = 0.5 * before + 0.5 * inputs.mean(0).detach()
    return model.head(inputs - before)


def frozen_average(model: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        model.average.mul_(0.5).add_(0.5 * inputs.mean(0))
    return model.head(inputs - model.average)


def only_with_gradients(model: Any, inputs: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return frozen_average(model, inputs)
    return model.head(inputs)


def converted(model: Any, inputs: Tensor) -> Tensor:
    return model.head(model.narrow.float()(inputs))


class Average:
    value: Any = 0.0


def remembers_in_an_object(model: Any, inputs: Tensor) -> Tensor:
    before = model.object.value
    model.object.value = float(inputs.mean())
    return model.head(inputs - before)


def through_data(model: Any, inputs: Tensor) -> Tensor:
    model.head.weight.data[0] += float(inputs.mean())
    return model.head(inputs).sum(1, keepdim=True) * torch.ones(
        3
    )  # what is written cannot be seen in the loss


def a_tensor_among_the_attributes(model: Any, inputs: Tensor) -> Tensor:
    model.memory["mean"].mul_(0.5).add_(0.5 * inputs.detach().mean(0))
    return model.head(inputs)


def left_on(model: Any, inputs: Tensor) -> Tensor:
    outputs = model.head(inputs)
    torch.set_autocast_enabled("cpu", True)
    return outputs


def batch(size: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 2, 6, generator=generator) * size, torch.tensor([0, 1, 2, 0, 1])


def longest(model: nn.Module, engine: str) -> float:
    inputs, targets = batch()

    def total(rows: list[int]) -> Tensor:
        return clipped_gradient_sum(model, inputs[rows], targets[rows], FlatClip(BOUND), engine=engine).sum

    every = list(range(5))
    whole = total(every)
    return max(float((whole - total([i for i in every if i != j])).norm()) for j in every) / BOUND


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
@pytest.mark.parametrize("run", [hooked_copy, hooked_parameter, clamped_twice, remembers_deep_down])
def test_nothing_makes_a_contribution_longer(run: Any, engine: str) -> None:
    torch.manual_seed(0)
    model = Model(run, memory={"below": {}})
    nn.init.zeros_(model.head.weight)
    assert longest(model, engine) <= 1.0 + 1e-5
    assert not model.head.weight._backward_hooks
    assert model.memory == {"below": {}}


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_what_an_object_remembers_does_not_reach_the_next_example(engine: str) -> None:
    torch.manual_seed(0)
    model = Model(remembers_in_an_object, object=Average())
    inputs, targets = batch()
    found = clipped_gradient_sum(model, inputs, targets, FlatClip(BOUND), engine=engine)
    plain = clipped_gradient_sum(model.head, inputs, targets, FlatClip(BOUND), engine=engine)
    torch.testing.assert_close(found.sum, plain.sum)
    assert model.object.value == 0.0


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
@pytest.mark.parametrize("run", [frozen_average, only_with_gradients, converted])
def test_a_forward_pass_that_writes_into_the_model_is_refused(run: Any, engine: str) -> None:
    torch.manual_seed(0)
    average = nn.Parameter(torch.zeros(6), requires_grad=False)
    model = Model(run, average=average, narrow=nn.Linear(6, 6).half().requires_grad_(False))
    with pytest.raises(ChangesState, match="must leave the model's parameters alone"):
        longest(model, engine)
    assert model.narrow.weight.dtype == torch.float16


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_what_a_forward_pass_writes_past_autograd_is_refused(engine: str) -> None:
    torch.manual_seed(0)
    model = Model(through_data)
    inputs, targets = batch()
    with pytest.raises(ChangesState, match=r"writes to head.weight"):
        clipped_gradient_sum(model, inputs, targets, FlatClip(BOUND), engine=engine)
    model = Model(a_tensor_among_the_attributes, memory={"mean": torch.zeros(6)})
    with pytest.raises(ChangesState, match="writes into a tensor among its attributes"):
        clipped_gradient_sum(model, inputs, targets, FlatClip(BOUND), engine=engine)


def test_hooks_in_the_forward_pass_are_called() -> None:
    for run in (hooked_copy, hooked_parameter):
        torch.manual_seed(0)
        model, (inputs, targets) = Model(run), batch()
        plain = clipped_gradient_sum(model.head, inputs, targets, FlatClip(1e9))
        found = clipped_gradient_sum(model, inputs, targets, FlatClip(1e9), engine="bookkeeping")
        torch.testing.assert_close(found.sum, plain.sum * (10.0 if run is hooked_copy else 0.5))


def test_uses_of_a_weight_with_a_backward_pass_of_its_own_are_added_first() -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = Model(clamped_twice), batch()
    sums = [
        clipped_gradient_sum(model, inputs, targets, FlatClip(1e9), engine=engine).sum
        for engine in ("bookkeeping", "vmap")
    ]
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_an_autocast_around_the_call_rounds_nothing(engine: str) -> None:
    torch.manual_seed(0)
    model = Model(lambda model, inputs: model.head(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        assert longest(model, engine) <= 1.0 + 3e-6
    try:
        assert longest(Model(left_on), engine) <= 1.0 + 3e-6
    finally:
        torch.set_autocast_enabled("cpu", False)


def test_a_long_but_finite_gradient_is_clipped_and_not_dropped() -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), batch(1e20)
    found, oracle = (
        clipped_gradient_sum(model, inputs, targets, FlatClip(1.0), engine=engine)
        for engine in ("bookkeeping", "vmap")
    )
    torch.testing.assert_close(found.norms, oracle.norms, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.sum, oracle.sum, rtol=1e-5, atol=1e-7)
