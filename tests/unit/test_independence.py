"""The tripwire for models that mix examples: what it must see, and what it must not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.grads import FlatClip, clipped_gradient_sum, cross_entropy, independence
from fedsim.grads.batch_size import OverLimit
from fedsim.grads.per_example import clipped_gradient_sums
from fedsim.validate import InputError


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Between(nn.Module):
    """Does something between two layers."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.inner, self.what, self.head = nn.Linear(5, 6), what, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.what(self.inner(x)))


def data(examples: int = 6, views: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(examples, views, 5, generator=generator), torch.arange(examples) % 4


def contrast(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ outputs.t(), torch.arange(len(outputs)), reduction="none")


def hardest(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = cross_entropy(outputs, targets)
    return losses * (losses >= losses.mean())


MIXING: dict[str, tuple[Any, Any]] = {
    "contrastive loss": (nn.Tanh(), contrast),
    "loss weighted by rank": (nn.Tanh(), hardest),
    "centred over the batch": (lambda x: x - x.mean(0), cross_entropy),
    "rolled along the batch": (lambda x: x + torch.roll(x, 1, 0), cross_entropy),
    "sorted along the batch": (lambda x: x.sort(0).values, cross_entropy),
    "attention over the batch": (lambda x: torch.softmax(x @ x.t(), -1) @ x, cross_entropy),
    "statistics of the batch": (nn.BatchNorm1d(6, track_running_stats=False), cross_entropy),
    "size of the batch": (lambda x: x * len(x), cross_entropy),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused(name: str, views: int, dtype: torch.dtype) -> None:
    what, loss = MIXING[name]
    inputs, targets = data(views=views)
    alone_does_not_run = name == "statistics of the batch" and views == 1
    words = "one example alone" if alone_does_not_run else "must keep examples apart"
    for engine in ("bookkeeping", "vmap", "opacus"):
        model = Between(what).to(dtype)
        with pytest.raises(InputError, match=words):
            clipped_gradient_sum(model, inputs, targets, FlatClip(1.0), loss=loss, engine=engine)


def test_by_owner_too() -> None:
    model = Between(lambda x: x - x.mean(0))
    totals = torch.zeros(2, sum(p.numel() for p in model.parameters()))
    with pytest.raises(InputError, match="must keep examples apart"):
        clipped_gradient_sums(model, *data(), FlatClip(1.0), torch.arange(6) % 2, totals)
    assert not totals.any()


def test_what_a_zero_head_hides_is_seen_at_a_later_call() -> None:
    model = Between(lambda x: x - x.mean(0))
    nn.init.zeros_(model.head.weight)
    ask = lambda: clipped_gradient_sum(model, *data(), FlatClip(1.0), engine="bookkeeping")  # noqa: E731
    ask()
    nn.init.normal_(model.head.weight)
    with pytest.raises(InputError, match="must keep examples apart"):
        ask()


def test_calls_one_two_four_eight_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    call = 0
    monkeypatch.setattr(independence, "problem", lambda *_: looked.append(call) or "")
    model, others = nn.Linear(5, 4), nn.Linear(5, 4)
    for call in range(1, 20):  # noqa: B007 - read by the function above
        independence.check(model, *data(), cross_entropy)
    assert looked == [1, 2, 4, 8, 16]
    call = 100
    independence.check(model, *data(), lambda o, t: cross_entropy(o, t))
    independence.check(others, *data(), cross_entropy)
    independence.check(model, *data(views=2), cross_entropy)
    independence.check(model, *data(examples=1), cross_entropy)
    assert looked[5:] == [100] * 4
    independence.check(model, *data(examples=50), cross_entropy)
    assert looked[9:] == [], "the number of examples does not start anew"


def test_randomness_has_words_of_its_own() -> None:
    for what in (nn.Dropout(0.5), lambda x: x + 0.1 * torch.randn_like(x), nn.RReLU()):
        for engine in ("bookkeeping", "vmap", "opacus"):
            with pytest.raises(InputError, match=r"must not be random.*Set the rates of dropout"):
                clipped_gradient_sum(Between(what), *data(), FlatClip(1.0), engine=engine)


class LayerDrop(nn.Module):
    """Draws a number that decides nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0 if torch.rand(()) < 0.0 else x


HONEST: dict[str, tuple[Any, Any, float]] = {
    "kinks": (nn.ReLU(), cross_entropy, 1.0),
    "features of 10,000": (nn.Tanh(), cross_entropy, 1e4),
    "cancellation": (lambda x: torch.tanh((x + 1e5) - 1e5 - x.mean(1, keepdim=True)), cross_entropy, 100.0),
    "large losses": (nn.Tanh(), lambda o, t: 1e12 * cross_entropy(o, t), 1.0),
    "tiny losses": (nn.Tanh(), lambda o, t: cross_entropy(200 * F.one_hot(t, 4) + o, t), 1.0),
    "small losses": (nn.Tanh(), lambda o, t: cross_entropy(9 * F.one_hot(t, 4) + o, t), 1.0),
    "losses that are not finite": (nn.Tanh(), lambda o, t: (o.sum(1) - o.sum(1).detach()) / 0.0, 1.0),
    "half precision inside": (lambda x: x.bfloat16().float(), cross_entropy, 1.0),
    "float32 inside": (lambda x: F.linear(x.float(), torch.ones(6, 6)).to(x.dtype), cross_entropy, 1.0),
    "a draw without effect": (LayerDrop(), cross_entropy, 1.0),
    "group norm": (nn.GroupNorm(2, 6), cross_entropy, 1.0),
    "frozen batch norm": (nn.BatchNorm1d(6).eval(), cross_entropy, 1.0),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_pass(name: str) -> None:
    what, loss, scale = HONEST[name]
    for seed in range(20):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, inputs = Between(what), scale * torch.randn(6, 2, 5)
        for dtype in (torch.float32, torch.float64):
            independence.check(model.to(dtype), inputs, torch.arange(6) % 4, loss)


def test_what_does_not_run_is_left_to_the_ways() -> None:
    model = nn.Linear(7, 4)
    independence.check(model, *data(), cross_entropy)

    def together_only_one(x: Tensor) -> Tensor:
        assert len(x) == 1
        return x

    independence.check(Between(together_only_one), *data(), cross_entropy)


def test_memory_that_runs_out_is_not_swallowed() -> None:
    def over(x: Tensor) -> Tensor:
        raise OverLimit

    with pytest.raises(OverLimit):
        independence.check(Between(over), *data(), cross_entropy)


def test_no_gradient_no_trace_no_other_data() -> None:
    """The check leaves no counts in the model, no graph, and the caller's data alone."""

    def what(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return x.mul_(2.0)

    model, (inputs, targets) = Between(what), data()
    before = inputs.clone()
    model.inner.register_forward_hook(lambda module, args, out: args[0].zero_())
    independence.check(model, inputs, targets, cross_entropy)
    assert torch.equal(inputs, before)
