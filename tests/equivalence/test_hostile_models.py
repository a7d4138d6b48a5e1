"""Models that tried to make a contribution longer than C, or to let examples meet: each once succeeded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.grads import FlatClip, clipped_gradient_sum
from fedsim.grads.state import ChangesState
from fedsim.validate import InputError

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


class Complex(nn.Module):
    """Complex weights: parameters themselves, or computed from real ones."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        kind = torch.complex128 if how == "layer" else torch.float64
        self.weight = nn.Parameter(torch.randn(3, 4, 2, dtype=torch.float64))
        if how == "layer":
            self.weight = nn.Parameter(torch.view_as_complex(self.weight.detach()).to(kind))

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight if self.how == "layer" else torch.view_as_complex(self.weight)
        rows = torch.fft.rfft(inputs)
        return (rows @ weight.t() if self.how == "product" else F.linear(rows, weight)).abs()


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
@pytest.mark.parametrize("how", ["layer", "linear", "product"])
def test_gradients_of_complex_weights_are_those_of_autograd(how: str, engine: str) -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = Complex(how), batch()
    inputs = inputs.double()
    found = clipped_gradient_sum(model, inputs, targets, FlatClip(1e9), engine=engine).sum
    total = torch.zeros_like(found)
    for views, target in zip(inputs, targets, strict=True):
        loss = F.cross_entropy(model(views), target.expand(2))
        total += torch.autograd.grad(loss, model.weight)[0].flatten()
    torch.testing.assert_close(found, total)


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_parameters_that_are_computed_have_their_gradients(engine: str) -> None:
    torch.manual_seed(0)
    model = Model(lambda model, inputs: F.linear(inputs, model.head.weight * 1.0))
    inputs, targets = batch()
    plain = clipped_gradient_sum(model, inputs, targets, FlatClip(1e9)).sum
    base = nn.Parameter(model.head.weight.detach() / 2.0)
    model.head._parameters["weight"] = base * 2.0  # type: ignore[assignment]
    found = clipped_gradient_sum(model, inputs, targets, FlatClip(1e9), engine=engine).sum
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("bound", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_coefficients_below_the_smallest_normal_number_lengthen_nothing(engine: str, bound: float) -> None:
    model = nn.Linear(10**5, 1, bias=False)
    inputs = torch.full((1, 1, 10**5), 1.3e38)
    found = clipped_gradient_sum(
        model, inputs, torch.zeros(1), FlatClip(bound), loss=lambda y, _: y[:, 0], engine=engine
    )
    assert 0.9 * bound <= float(found.sum.double().norm()) <= bound * (1 + 1e-6)


def _closure() -> Callable[[Any, Tensor], Tensor]:
    held = [0.0]

    def run(model: Any, inputs: Tensor) -> Tensor:
        before = held[0]
        held[0] += float(inputs.mean()) ** 3
        return model.head(inputs) + before * torch.tensor([1.0, 0.0, 0.0])

    return run


def _array() -> Callable[[Any, Tensor], Tensor]:
    held = np.zeros(1)

    def run(model: Any, inputs: Tensor) -> Tensor:
        before = float(held[0])
        held[0] += float(inputs.mean()) ** 3
        return model.head(inputs) + before * torch.tensor([1.0, 0.0, 0.0])

    return run


class Slots:
    __slots__ = ("mean",)

    def __init__(self) -> None:
        self.mean = 0.0


def _slots() -> Callable[[Any, Tensor], Tensor]:
    held = Slots()

    def run(model: Any, inputs: Tensor) -> Tensor:
        before = held.mean
        held.mean += float(inputs.mean()) ** 3
        return model.head(inputs) + before * torch.tensor([1.0, 0.0, 0.0])

    return run


@pytest.mark.parametrize("remembers", [_closure, _array, _slots])
def test_memory_that_an_outlier_alone_moves_is_refused(remembers: Any) -> None:
    """The look before the call takes the first examples, which move it by a millionth."""
    torch.manual_seed(0)
    inputs, targets = batch(1e-3)
    inputs[3] *= 3e4
    with pytest.raises(InputError, match="must not remember earlier ones"):
        clipped_gradient_sum(Model(remembers()), inputs, targets, FlatClip(BOUND))


def test_what_a_hidden_module_or_tensor_holds_is_put_back_and_refused() -> None:
    def run(model: Any, inputs: Tensor) -> Tensor:
        model.hidden[0].mean.data.add_(float(inputs.mean()))
        return model.head(inputs)

    hidden = nn.Module()
    hidden.register_buffer("mean", torch.zeros(1))
    inputs, targets = batch()
    with pytest.raises(ChangesState, match="writes into a tensor among its attributes"):
        clipped_gradient_sum(Model(run, hidden=[hidden]), inputs, targets, FlatClip(BOUND))
    assert float(hidden.mean) == 0.0


def test_models_that_share_a_module_in_threads() -> None:
    torch.manual_seed(0)
    shared, (inputs, targets) = nn.Linear(6, 6), batch()
    models = [nn.Sequential(shared, nn.Tanh(), nn.Linear(6, 3)) for _ in range(3)]
    before = dict(shared.named_parameters())

    def total(model: nn.Module) -> Tensor:
        return clipped_gradient_sum(model, inputs, targets, FlatClip(1.0), engine="vmap").sum

    expected = [total(model) for model in models]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda turn: total(models[turn % 3]), range(60)))
    finally:
        sys.setswitchinterval(interval)
    for turn, one in enumerate(found):
        torch.testing.assert_close(one, expected[turn % 3])
    assert dict(shared.named_parameters()) == before
