"""What the bookkeeping engine promises beyond exact sums: memory, locality, nothing silently wrong."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.grads import FlatClip, NoClip, clipped_gradient_sum
from fedsim.grads.bookkeeping import Options, clipped_sum, norm
from fedsim.grads.bookkeeping.repeat import _told
from fedsim.grads.bookkeeping.tape import Unsupported
from fedsim.grads.norms import BLOCK, squared_norms
from fedsim.grads.per_example import cross_entropy
from fedsim.validate import InputError

CLIP = FlatClip(0.5)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )


def batch(examples: int = 6, views: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((examples, views, 3, 4, 4), generator=generator), torch.arange(examples) % 5


@pytest.fixture(autouse=True)
def _say_again() -> None:
    _told.clear()


class Transposed(nn.Module):
    """Puts places first, as many as there are examples in one batch: no shape shows the mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.linear(inputs.transpose(0, 1))).transpose(0, 1).sum(1)


class Mixing(nn.Module):
    """Lets examples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs + 0.5 * inputs.roll(1, 0))


class Hidden(torch.autograd.Function):
    """Uses a weight where no torch function is seen to do so."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor) -> Tensor:
        return inputs * weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        return gradient * weight, (gradient * inputs).sum(0)


class UsesHidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(4, 5), nn.Parameter(torch.ones(5))

    def forward(self, inputs: Tensor) -> Tensor:
        return Hidden.apply(self.linear(inputs), self.gain)


class Scripted(nn.Module):
    """Uses a weight in compiled code, which no torch function of Python's is seen to run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(4, 5), nn.Parameter(torch.ones(5))
        self.scale = torch.jit.trace(torch.mul, (torch.ones(1, 5), torch.ones(5)))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale(self.linear(inputs), self.gain)


class OnceOnly(nn.Module):
    """Fails in the middle of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        self.linear(inputs)
        raise KeyError("in the middle")


def state(model: nn.Module) -> list[Any]:
    """Everything the engine could leave behind on a model."""
    found: list[Any] = []
    for module in model.modules():
        found += [sorted(vars(module)), list(module._forward_hooks), list(module._backward_hooks)]
        found += [type(module).forward, "forward" in vars(module)]
    for parameter in model.parameters():
        found += [id(parameter), parameter.grad, sorted(vars(parameter)), parameter._backward_hooks]
    return found


def test_the_model_is_left_as_it_came() -> None:
    model = net()
    before, values = state(model), [p.clone() for p in model.parameters()]
    clipped_sum(model, *batch(), cross_entropy, CLIP)
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True))


def test_the_model_is_left_as_it_came_after_an_exception() -> None:
    model = OnceOnly()
    before = state(model)
    with pytest.raises(KeyError):
        clipped_sum(model, torch.randn(2, 1, 4), torch.zeros(2), cross_entropy, CLIP)
    assert state(model) == before
    assert not torch.overrides._is_torch_function_mode_enabled()


def test_inputs_are_left_as_they_came() -> None:
    inputs, targets = batch()
    kept = inputs.clone()
    clipped_sum(net(), inputs, targets, cross_entropy, CLIP)
    assert torch.equal(inputs, kept)
    assert not vars(inputs)


def test_two_calls_give_the_same_bits() -> None:
    first, second = (clipped_sum(net(), *batch(), cross_entropy, CLIP) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_memory_is_released_without_the_cycle_collector() -> None:
    import gc
    import weakref

    model, (inputs, targets) = net(), batch()
    seen: list[weakref.ref[Tensor]] = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        seen.append(weakref.ref(outputs))
        return cross_entropy(outputs, labels)

    gc.disable()
    try:
        clipped_sum(model, inputs, targets, loss, CLIP)
        assert seen[0]() is None
    finally:
        gc.enable()


def test_threads_do_not_disturb_each_other() -> None:
    models = [net() for _ in range(4)]
    batches = [batch(examples) for examples in (3, 4, 5, 6)]
    alone = [clipped_sum(m, *b, cross_entropy, CLIP)[0] for m, b in zip(models, batches, strict=True)]
    together: list[Tensor | None] = [None] * 4

    def work(index: int) -> None:
        for _ in range(5):
            together[index] = clipped_sum(models[index], *batches[index], cross_entropy, CLIP)[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, together, strict=True):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def one_at_a_time(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Callable[..., Tensor] = cross_entropy
) -> Tensor:
    """Gradients (B, P), each of a call of the model that sees nothing but the example's views."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for views, target in zip(inputs, targets, strict=True):
        value = loss(model(views), target.expand(len(views), *target.shape)).mean()
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("model", [Transposed(), Mixing()], ids=["transposed", "mixing"])
def test_an_example_is_never_seen_by_another(model: nn.Module) -> None:
    inputs = torch.randn(4, 1, 4, 4) if isinstance(model, Transposed) else torch.randn(4, 1, 4)
    targets = torch.arange(4)
    gradients = one_at_a_time(model, inputs, targets)
    total, norms, _ = clipped_sum(model, inputs, targets, cross_entropy, CLIP)
    torch.testing.assert_close(norms, gradients.double().norm(dim=1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(total, CLIP.coefficients(norms).float() @ gradients)


def test_a_parameter_used_by_a_custom_function_is_followed() -> None:
    model, inputs, targets = UsesHidden(), torch.randn(3, 1, 4), torch.arange(3)
    gradients = one_at_a_time(model, inputs, targets)
    total, norms, _ = clipped_sum(model, inputs, targets, cross_entropy, CLIP)
    torch.testing.assert_close(norms, gradients.double().norm(dim=1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(total, CLIP.coefficients(norms).float() @ gradients)


def test_a_parameter_used_out_of_sight_is_found() -> None:
    with pytest.raises(Unsupported, match="gain reach the loss"):
        clipped_sum(Scripted(), torch.randn(3, 1, 4), torch.arange(3), cross_entropy, CLIP)


class Reversed(nn.Module):
    """Turns gradients around on the way back, where it is told that there will be some."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.linear(inputs)
        if outputs.requires_grad:
            outputs.register_hook(torch.neg)
        return outputs


def test_a_hook_on_what_a_layer_gives_is_called() -> None:
    model, inputs, targets = Reversed(), torch.randn(3, 1, 4), torch.arange(3)
    expected = one_at_a_time(model, inputs, targets).sum(0)
    found = clipped_gradient_sum(model, inputs, targets, NoClip(), engine="bookkeeping").sum
    torch.testing.assert_close(found, expected)


class Calls(nn.Module):
    """Calls a function of its one parameter and the inputs."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(5, generator=torch.manual_seed(0)))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self.weight, inputs)


def _written_into_rows(weight: Tensor, inputs: Tensor) -> Tensor:
    result = inputs * 1.0
    result[:, 2] = weight
    return result.sum(1)


def _written_after_selection(weight: Tensor, inputs: Tensor) -> Tensor:
    changed = weight.clone()
    changed.mul_(3.0)
    changed[0] = 0.5
    return (inputs * changed).sum(1)


def _filled_into_rows(weight: Tensor, inputs: Tensor) -> Tensor:
    return (inputs * 1.0).masked_fill_(inputs > 0, weight[0]).sum(1)


def _collected(weight: Tensor, inputs: Tensor) -> Tensor:
    collected = torch.zeros(inputs.shape)
    collected[:, :2] = inputs[:, :2]
    return (collected * weight).sum(1)


def _changed_by_a_view(weight: Tensor, inputs: Tensor) -> Tensor:
    changed = weight.clone()
    changed.view(-1)[:3].mul_(3.0)
    return (inputs * changed).sum(1)


def _read_through_a_view(weight: Tensor, inputs: Tensor) -> Tensor:
    collected = torch.zeros_like(inputs)
    seen = collected[:, 1]
    collected += inputs * weight
    return seen * 2.0


@pytest.mark.parametrize(
    "function",
    [
        _written_into_rows,
        _filled_into_rows,
        _written_after_selection,
        _collected,
        _changed_by_a_view,
        _read_through_a_view,
    ],
)
def test_writing_in_place_is_followed(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, inputs, targets = Calls(function), torch.randn(3, 1, 4, 5), torch.arange(3)
    gradients = one_at_a_time(model, inputs, targets)
    found = clipped_gradient_sum(model, inputs, targets, CLIP, engine="bookkeeping")
    total, norms = found.sum, found.norms
    torch.testing.assert_close(norms, gradients.double().norm(dim=1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(total, CLIP.coefficients(norms).float() @ gradients)


def _changed_after_its_use(weight: Tensor, inputs: Tensor) -> Tensor:
    own = weight * 2.0
    result = (inputs * own).sum(1)
    own.mul_(3.0)
    return result


def test_a_weight_changed_after_its_use_is_refused() -> None:
    """Its graph is then of other values than the operation saw."""
    with pytest.raises(Unsupported, match="changed in place"):
        clipped_sum(
            Calls(_changed_after_its_use), torch.randn(3, 1, 4, 5), torch.arange(3), cross_entropy, CLIP
        )


def test_an_operation_without_a_rule_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.PReLU())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            clipped_sum(model, torch.randn(3, 1, 4), torch.arange(3), cross_entropy, CLIP)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "1.weight" in lines[0]
    assert "PReLU" in lines[0]
    assert "prelu" in lines[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_an_example_that_is_not_finite_adds_exactly_nothing(bad: float) -> None:
    model, (inputs, targets) = net(), batch()
    inputs[2, 0, 0, 0, 0] = bad
    total, norms, _ = clipped_sum(model, inputs, targets, cross_entropy, CLIP)
    keep = torch.tensor([0, 1, 3, 4, 5])
    alone, _, _ = clipped_sum(model, inputs[keep], targets[keep], cross_entropy, CLIP)
    assert torch.isfinite(norms).sum() == (5 if bad != 1e30 else torch.isfinite(norms).sum())
    if not torch.isfinite(norms[2]):
        assert torch.equal(total, alone)
    assert torch.isfinite(total).all()


def test_all_examples_not_finite_give_zero() -> None:
    model, (inputs, targets) = net(), batch()
    total, norms, _ = clipped_sum(model, inputs * float("nan"), targets, cross_entropy, CLIP)
    assert torch.equal(total, torch.zeros_like(total))
    assert not torch.isfinite(norms).any()


def test_contributions_stay_within_the_bound() -> None:
    model, (inputs, targets) = net(), batch()
    for index in range(len(inputs)):
        one = slice(index, index + 1)
        total, norms, _ = clipped_sum(model, inputs[one], targets[one], cross_entropy, CLIP)
        assert norms[0] > CLIP.clip_norm
        assert total.double().norm() <= CLIP.clip_norm * (1 + 1e-6)


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.used = net()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs)


def test_parameters_keep_their_order_and_unused_ones_are_zero() -> None:
    model = WithUnused()
    inputs, targets = batch()
    total, _, _ = clipped_sum(model, inputs, targets, cross_entropy, NoClip())
    losses = cross_entropy(model(inputs.flatten(0, 1)), targets.repeat_interleave(2))
    (losses.sum() / 2).backward()
    expected = torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()]
    )
    torch.testing.assert_close(total, expected)


def test_long_norms_are_exact_to_float32() -> None:
    rows = torch.rand((2, 37 * BLOCK + 11), generator=torch.Generator().manual_seed(0))
    exact = rows.double().square().sum(1)
    torch.testing.assert_close(squared_norms(rows), exact, rtol=3e-7, atol=0.0)


_PEAK = """
import sys
from pathlib import Path
import torch
from torch import nn
from fedsim.grads import FlatClip
from fedsim.grads.bookkeeping import clipped_sum
from fedsim.grads.per_example import cross_entropy

def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

torch.set_num_threads(1)
if sys.argv[1] == "1":
    model, shape = nn.Linear(1280, 1000), (1280,)
else:
    model, shape = nn.Sequential(nn.Linear(64, 1000), nn.Flatten(), nn.Linear(2000, 10)), (2, 64)
clipped_sum(model, torch.randn(3, 1, *shape), torch.arange(3), cross_entropy, FlatClip(1.0))
inputs, targets = torch.randn(4096, 1, *shape), torch.arange(4096) % 10
before = held("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
clipped_sum(model, inputs, targets, cross_entropy, FlatClip(1.0))
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from /proc (Linux)")
@pytest.mark.parametrize("positions", [1, 2])
def test_a_wide_head_at_a_large_batch_does_not_exhaust_memory(positions: int) -> None:
    """1,000 outputs at 4,096 examples: formed gradients would take 21 GB (one position) or 1 GB (two)."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(positions)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 400.0  # MB; outputs and their gradients alone are 16 to 33 MB each


def test_a_budget_of_nothing_keeps_nothing_larger_than_output_gradients() -> None:
    from fedsim.grads.bookkeeping import choose
    from fedsim.grads.bookkeeping.tape import Tape

    model = nn.Linear(192, 768)
    rich, poor = (Tape(model, dict(model.named_parameters()), 16, budget, 2**24) for budget in (2**31, 0))
    assert choose.linear(rich, 1024, 192, 768, 4) == "keep"
    assert choose.linear(poor, 8, 192, 768, 4) != "keep"


@pytest.mark.parametrize(
    "wrong",
    [{"precision": "float8"}, {"memory_budget": -1}, {"scratch": 0}],
    ids=["precision", "budget", "scratch"],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Options(**wrong)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_reduced_precision_needs_cuda(precision: str) -> None:
    with pytest.raises(InputError, match="needs a CUDA device"):
        clipped_sum(net(), *batch(), cross_entropy, CLIP, Options(precision=precision))


@pytest.mark.parametrize(
    "layer", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)], ids=["group", "instance"]
)
def test_norms_are_split_below_what_a_cuda_kernel_can_launch(
    layer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block for each row and group along one axis: at most 65,535."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer, nn.Flatten(), nn.Linear(64, 5))
    inputs, targets = batch()
    whole = clipped_sum(model, inputs, targets, cross_entropy, CLIP)
    asked: list[int] = []
    backward = norm._backward

    def watched(*arguments: Any) -> Any:
        asked.append(arguments[8])
        return backward(*arguments)

    monkeypatch.setattr(norm, "_backward", watched)
    monkeypatch.setattr(norm, "_BLOCKS", 9)
    found = clipped_sum(model, inputs, targets, cross_entropy, CLIP)
    assert len(asked) > 1
    assert max(asked) <= 9
    torch.testing.assert_close(found[:2], whole[:2], rtol=1e-6, atol=1e-7)
