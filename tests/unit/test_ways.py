"""The chain of ways: what starts the next one, what passes through, what is said and remembered."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedsim.grads import FlatClip, autograd, clipped_gradient_sum, cross_entropy, ways
from fedsim.grads.batch_size import OverLimit
from fedsim.validate import InputError


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


INPUTS, TARGETS = torch.arange(12.0).reshape(4, 1, 3), torch.zeros(4, dtype=torch.long)


class Fails(nn.Module):
    """Has a layer that raises."""

    def __init__(self, problem: BaseException | None = None) -> None:
        super().__init__()
        self.head, self.problem = nn.Linear(3, 2), problem
        self.inner = _Inner(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


class _Inner(nn.Module):
    def __init__(self, outer: Fails) -> None:
        super().__init__()
        object.__setattr__(self, "outer", outer)

    def forward(self, x: Tensor) -> Tensor:
        if self.outer.problem is not None:
            raise self.outer.problem
        return x


def chain(model: nn.Module, **fakes: Any) -> Any:
    everything = {**fakes, ways.LAST: autograd.clipped_sum}
    return ways.first_that_works(everything, model, INPUTS, TARGETS, cross_entropy, FlatClip(1.0))


def test_any_exception_starts_the_next_way_once_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    def fast(model: nn.Module, inputs: Tensor, *_: Any) -> Any:
        calls.append("fast")
        model.problem = LookupError("this layer is unheard of")
        model(inputs[0])

    def slow(*_: Any) -> Any:
        calls.append("slow")
        raise ZeroDivisionError

    model = Fails()
    first = chain(model, fast=fast, slow=slow)
    again = chain(model, fast=fast, slow=slow)
    assert calls == ["fast", "slow"], "what ended is not tried again"
    assert torch.equal(first[0], again[0])
    assert first[0].any()
    (line,) = caplog.messages
    for part in (
        "Fails",
        "autograd, one example at a time",
        "fast ended at 'inner' (_Inner) by LookupError: this",
    ):
        assert part in line
    assert "slow ended by ZeroDivisionError" in line
    other = Fails()
    chain(other, fast=fast, slow=slow)
    assert calls == ["fast", "slow"] * 2, "another model is another matter"


@pytest.mark.parametrize("change", ["shape", "dtype", "loss", "model dtype"])
def test_what_worked_is_remembered_by_form_of_the_call(change: str) -> None:
    calls: list[int] = []

    def fast(*_: Any) -> Any:
        calls.append(1)
        raise ValueError

    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    model(INPUTS[:, 0])
    everything = {"fast": fast, ways.LAST: lambda *_: "answer"}

    def ask(x: Tensor, loss: Any = cross_entropy) -> Any:
        return ways.first_that_works(everything, model, x, TARGETS[: len(x)], loss)

    ask(INPUTS)
    ask(INPUTS[:2])
    ask(INPUTS[:1], cross_entropy)
    assert len(calls) == 1, "not by the number of examples"
    if change == "shape":
        ask(INPUTS.reshape(4, 1, 3, 1))
    elif change == "dtype":
        ask(INPUTS.long())
    elif change == "loss":
        ask(INPUTS, lambda o, t: cross_entropy(o, t))
    else:
        model.double()
        ask(INPUTS)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "problem",
    [
        InputError("wrong"),
        MemoryError(),
        torch.OutOfMemoryError("no memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        OverLimit(),
        KeyboardInterrupt(),
        SystemExit(3),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_these_pass_through_at_once(problem: BaseException) -> None:
    def fast(*_: Any) -> Any:
        raise problem

    model = Fails()
    with pytest.raises(type(problem)) as caught:
        chain(model, fast=fast)
    assert caught.value is problem
    with pytest.raises(type(problem)):  # and are not remembered as a way's end
        chain(model, fast=fast)
    model.problem = problem
    with pytest.raises(type(problem)):
        clipped_gradient_sum(model, INPUTS, TARGETS, FlatClip(1.0), engine="bookkeeping")


def test_where_no_way_works_the_words_are_ours() -> None:
    model = Fails(ArithmeticError("such a pity\nsecond line"))
    with pytest.raises(InputError) as caught:
        clipped_gradient_sum(model, INPUTS, TARGETS, FlatClip(1.0), engine="bookkeeping")
    said = str(caught.value)
    for name in ("bookkeeping", "vmap", "autograd"):
        assert f"{name} ended at 'inner' (_Inner) by ArithmeticError: such a pity" in said
    assert "second line" not in said
    assert "Inputs are (4, 1, 3) float32, targets (4,) int64" in said
    assert isinstance(caught.value.__cause__, ArithmeticError)
    model.problem = None
    assert clipped_gradient_sum(model, INPUTS, TARGETS, FlatClip(1.0), engine="bookkeeping").sum.any()


def test_the_next_way_finds_data_and_model_as_they_came() -> None:
    seen: list[Any] = []

    def spoils(model: nn.Module, inputs: Tensor, targets: Tensor, *_: Any) -> Any:
        inputs.zero_()
        targets.add_(7)
        model.head.register_forward_hook(lambda *_: torch.ones(1, 2))
        model.left, model.training = 3, False
        next(model.parameters()).grad = torch.ones(2, 3)
        raise ValueError("after all that")

    def looks(model: nn.Module, inputs: Tensor, targets: Tensor, *_: Any) -> Any:
        seen.append((inputs.clone(), targets.clone(), hasattr(model, "left"), model.training))
        seen.append((next(model.parameters()).grad, dict(model.head._forward_hooks)))
        return "answer"

    assert ways.first_that_works({"fast": spoils, ways.LAST: looks}, Fails(), INPUTS, TARGETS, cross_entropy)
    (inputs, targets, left, training), (gradient, hooks) = seen
    assert torch.equal(inputs, INPUTS)
    assert torch.equal(targets, TARGETS)
    assert (left, training, gradient, hooks) == (False, True, None, {})
    assert torch.equal(INPUTS, torch.arange(12.0).reshape(4, 1, 3)), "nor is the caller's data touched"


def test_models_are_not_kept_alive() -> None:
    gc.collect()
    before = len(ways._known)
    model = Fails()
    chain(model)
    assert len(ways._known) == before + 1
    del model
    gc.collect()
    assert len(ways._known) == before


def test_hooks_on_accumulated_gradients_are_refused() -> None:
    model = nn.Linear(3, 2)
    model.bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(InputError, match="parameter bias must not have a hook by register_post_accumulate"):
        clipped_gradient_sum(model, INPUTS, TARGETS, FlatClip(1.0))


def test_hooks_on_all_modules_are_called() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    plain = clipped_gradient_sum(model, INPUTS, TARGETS, FlatClip(1e9), engine="bookkeeping").sum
    double = lambda module, before, after: tuple(None if g is None else 2 * g for g in before)  # noqa: E731
    handle = nn.modules.module.register_module_full_backward_hook(double)
    try:
        found = clipped_gradient_sum(model, INPUTS, TARGETS, FlatClip(1e9), engine="bookkeeping").sum
    finally:
        handle.remove()
    torch.testing.assert_close(found[8:], plain[8:])
    torch.testing.assert_close(found[:8], 4 * plain[:8])  # through the Tanh and the last layer


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda y: torch.tanh(self.inner(y)), self.first(x), use_reentrant=True))


@pytest.mark.filterwarnings("ignore")
def test_threads_do_not_disturb_each_other() -> None:
    """Four threads on one model whose gradients go through `.grad`."""
    model = Reentrant().double()
    kept = [p.grad for p in model.parameters()]
    batches = [torch.randn(9, 1, 3, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    labels = torch.arange(9) % 2
    ask = lambda x: clipped_gradient_sum(model, x, labels, FlatClip(0.1), engine="bookkeeping").sum  # noqa: E731
    wanted = [ask(x) for x in batches]
    found: dict[int, list[Tensor]] = {}

    def work(index: int) -> None:
        found[index] = [ask(batches[index]) for _ in range(6)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(wanted):
        assert expected.any()
        assert all(torch.equal(total, expected) for total in found[index])
    assert [p.grad for p in model.parameters()] == kept


def test_under_inference_mode() -> None:
    model = nn.Linear(3, 2)
    wanted = clipped_gradient_sum(model, INPUTS, TARGETS, FlatClip(0.1), engine="bookkeeping").sum
    with torch.inference_mode():
        for engine in ("bookkeeping", "vmap", "opacus"):
            inputs = INPUTS * 1.0
            found = clipped_gradient_sum(model, inputs, TARGETS, FlatClip(0.1), engine=engine).sum
            torch.testing.assert_close(found, wanted)
