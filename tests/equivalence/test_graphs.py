"""Recorded calls give the bits of computed ones, and whatever changes what would be computed is not replayed.

Without a GPU: `benchmarks.emulated.Graph` asks the operations of a recording again, of the memory they had.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.emulated import Graph, Recorder
from fedsim.clipping.base import ClipRule
from fedsim.clipping.normalised import NormalisedClip
from fedsim.clipping.per_layer import PerLayerClip
from fedsim.config import EngineConfig
from fedsim.engine.device import options_of
from fedsim.grads import FlatClip, arithmetic, clipped_gradient_sum, constants, gpu
from fedsim.grads.bookkeeping import Options, clipped_sum, engine, graphs
from fedsim.grads.flat import get_flat, set_flat
from fedsim.grads.microbatch import Answer, Loss
from fedsim.grads.per_example import cross_entropy
from fedsim.validate import InputError
from tests.equivalence.test_bookkeeping import CASES, loss, make

EXAMPLES = 5
RECORDED = Options(fill=EXAMPLES, cuda_graphs=True)
HALF = FlatClip(0.5)
HOST = "repeated entries"  # its model takes rows by a list of the host's: no GPU records that
made: list[Graph] = []
streams: list[str] = []


@pytest.fixture(autouse=True)
def _with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    streams.clear()

    def new() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(gpu, "on", lambda _: True)
    monkeypatch.setattr(Options, "check_device", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", Recorder)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: "a stream")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "the stream")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)


def same(one: Answer, other: Answer) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


def both(model: nn.Module, inputs: Tensor, targets: Tensor, by: Loss = loss, clip: ClipRule = HALF) -> bool:
    """Whether a call that may be replayed gives what a computed one does; whether it was replayed."""
    before = sum(graph.replays for graph in made)
    recorded = clipped_sum(model, inputs, targets, by, clip, RECORDED)
    computed = clipped_sum(model, inputs, targets, by, clip, Options(fill=EXAMPLES))
    assert same(recorded, computed)
    return sum(graph.replays for graph in made) > before


def data(inputs: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Other inputs of the form of `inputs`, and targets."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inputs), generator=generator)
    other = inputs[order]
    if other.is_floating_point():
        other = other + torch.randn(other.shape, generator=generator, dtype=other.dtype)
    return other, torch.randn(len(inputs), generator=generator, dtype=torch.float32).to(get(inputs))


def get(inputs: Tensor) -> torch.dtype:
    return inputs.dtype if inputs.is_floating_point() else torch.float32


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def rows(seed: int, examples: int = EXAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 2, 4, generator=generator), torch.arange(examples) % 3


@pytest.fixture
def _all_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the authors of all models and losses here had said that they are the same in every call."""
    monkeypatch.setattr(nn.Module, graphs.DECLARED, True, raising=False)
    monkeypatch.setattr(loss, graphs.DECLARED, True, raising=False)


@pytest.mark.usefixtures("_all_declared")
@pytest.mark.parametrize("case", CASES)
def test_a_replay_gives_the_bits_of_a_call(case: str) -> None:
    model, inputs = make(case, EXAMPLES, 2)
    model = model.float()
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    for seed in range(5):
        replayed = both(model, *data(inputs, seed))
        assert replayed == (seed >= graphs.CALLS and case != HOST)
        set_flat(model, get_flat(model) * 0.9 + 0.01)
    few, targets = data(inputs, 9)
    for examples in (3, 1, EXAMPLES):
        assert both(model, few[:examples], targets[:examples]) == (case != HOST)
    assert len(made) == 1


@pytest.mark.parametrize("clip", [FlatClip(0.1), NormalisedClip(1.0), PerLayerClip(0.5)])
def test_every_rule_is_recorded(clip: ClipRule) -> None:
    model = network()
    assert [both(model, *rows(seed), cross_entropy, clip) for seed in range(4)] == [False, False, True, True]


class Scaled(nn.Module):
    """Reads plain attributes, in collections too."""

    same_in_every_call = True

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factor, self.shift, self.act = network(), 1.0, torch.zeros(3), torch.tanh
        self.factors, self.named, self.shifts = [1.0], {"factor": (1.0, 2.0)}, [torch.zeros(3)]
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.act(self.inner(inputs - self.mean)) * self.factor * self.factors[0]
        outputs = outputs * self.named["factor"][0] + self.shift + self.shifts[0]
        return -outputs if self.training else outputs


def doubled(outputs: Tensor, targets: Tensor) -> Tensor:
    return 2.0 * cross_entropy(outputs, targets)


doubled.same_in_every_call = True  # type: ignore[attr-defined]


def settled(model: nn.Module) -> None:
    """Call until calls are replayed."""
    assert [both(model, *rows(seed), cross_entropy) for seed in range(graphs.CALLS + 1)][-1]


CHANGES: dict[str, Any] = {
    "a number": lambda model: setattr(model, "factor", 3.0),
    "a number in a list": lambda model: model.factors.__setitem__(0, 3.0),
    "a tuple in a dictionary": lambda model: model.named.update(factor=(3.0, 2.0)),
    "a function": lambda model: setattr(model, "act", torch.sin),
    "the mode": lambda model: model.eval(),
    "a layer": lambda model: model.inner.__setitem__(1, nn.ReLU()),
    "a tensor": lambda model: setattr(model, "shift", torch.ones(3)),
    "a tensor in a list": lambda model: model.shifts.__setitem__(0, torch.ones(3)),
    "what is trained": lambda model: model.inner[0].weight.requires_grad_(False),
    "where a parameter is": lambda model: setattr(model.inner[2].weight, "data", torch.ones(3, 6)),
    "a parameter": lambda model: setattr(model.inner[2], "weight", nn.Parameter(torch.ones(3, 6))),
    "a method of its class": lambda model: setattr(
        type(model), "forward", lambda self, inputs: 2.0 * self.inner(inputs)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_not_replayed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaled, "forward", Scaled.forward)  # put back at the end
    model = Scaled()
    settled(model)
    CHANGES[change](model)
    assert not both(model, *rows(7), cross_entropy)
    settled(model)


def test_values_are_read_where_they_are_and_other_calls_are_others() -> None:
    model = Scaled()
    settled(model)
    with torch.no_grad():
        model.mean.fill_(2.0)
        model.shift.fill_(3.0)
    assert both(model, *rows(7), cross_entropy)
    assert not both(model, *rows(7), cross_entropy, FlatClip(0.2))
    settled(model)
    assert not both(model, *rows(7), doubled)
    settled(model)
    inputs, targets = rows(7)
    assert not both(model, inputs.repeat(1, 2, 1), targets, cross_entropy)
    settled(model)
    turned = inputs.transpose(1, 2).contiguous().transpose(1, 2)
    assert both(model, turned, targets, cross_entropy)


class OwnRule(FlatClip):
    """A rule of someone else's."""


class Undeclared(Scaled):
    same_in_every_call = False


def hooked() -> nn.Module:
    model = network()
    model[0].register_forward_hook(lambda module, given, outputs: 2.0 * outputs)
    return model


def patched() -> nn.Module:
    model = network()
    inner = model.forward
    model.forward = lambda inputs: 2.0 * inner(inputs)  # type: ignore[method-assign]
    return model


UNKNOWN: dict[str, tuple[Any, Any, ClipRule, str]] = {
    "a class of one's own": (Undeclared, cross_entropy, HALF, "what Undeclared reads is not known"),
    "a loss of one's own": (network, loss, HALF, "what the loss loss reads is not known"),
    "a partial loss": (
        network,
        functools.partial(F.cross_entropy, reduction="none", label_smoothing=0.1),
        HALF,
        "what the loss partial reads is not known",
    ),
    "a rule of one's own": (network, cross_entropy, OwnRule(0.5), "what OwnRule computes is not known"),
    "a hook": (hooked, cross_entropy, HALF, "a Linear has hooks"),
    "a forward of the instance": (patched, cross_entropy, HALF, "Sequential.forward is function"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_not_known_is_computed_and_said_once(what: str, caplog: pytest.LogCaptureFixture) -> None:
    build, by, clip, said = UNKNOWN[what]
    model = build()
    with caplog.at_level(logging.WARNING, graphs.__name__):
        for seed in range(5):
            inputs, targets = rows(seed)
            own = targets.float() if by is loss else targets
            assert not both(model, inputs[..., :4], own, by, clip)
    assert not made
    (record,) = (r for r in caplog.records if r.name == graphs.__name__)
    assert said in record.getMessage()


def test_hooks_for_all_modules_are_never_recorded() -> None:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, given, outputs: None)
    try:
        model = network()
        assert not any(both(model, *rows(seed), cross_entropy) for seed in range(4))
    finally:
        handle.remove()


def test_a_recording_ends_on_the_stream_it_began_on() -> None:
    settled(network())
    assert streams == ["the stream"]
    waiting = Waiting()
    for seed in range(4):
        both(waiting, *rows(seed), cross_entropy)
    assert streams == ["the stream"] * 2


class Waiting(nn.Module):
    """Asks the device for a value."""

    same_in_every_call = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs) * (2.0 if self.inner[0].weight.sum() > 0 else 3.0)


def test_no_memory_for_a_recording_is_told_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    for seed in range(graphs.CALLS):
        both(model, *rows(seed), cross_entropy)

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", full)
        with pytest.raises(torch.OutOfMemoryError):
            both(model, *rows(3), cross_entropy)
    settled(model)


class Queries(nn.Module):
    """Multiplies parameters with parameters: what autocast would keep of them."""

    same_in_every_call = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inp, self.proj = nn.Linear(4, 8), nn.Linear(6, 8, bias=False)
        self.queries = nn.Parameter(torch.randn(3, 6))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.inp(inputs)) @ self.proj(self.queries).t()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("left_on", [True, False])
def test_no_cast_of_a_weight_outlives_its_values(recorded: bool, left_on: bool) -> None:
    model = Queries()
    options = Options(precision="bfloat16", fill=EXAMPLES, cuda_graphs=recorded)
    plain = Options(precision="bfloat16", fill=EXAMPLES)
    with torch.autocast("cpu", torch.bfloat16) if left_on else nullcontext():
        for seed in range(5):
            inputs, targets = rows(seed)
            if seed == 1:
                inputs[2] = torch.inf  # the others go again, and are recorded then
            arguments = inputs, targets, cross_entropy, HALF
            with arithmetic.float32():
                found = clipped_sum(model, *arguments, options)
            with arithmetic.float32():
                expected = clipped_sum(copy.deepcopy(model), *arguments, plain)
            assert same(found, expected)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)


def test_odd_examples_go_again_and_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    for seed in range(3):
        both(model, *rows(seed), cross_entropy)
    inputs, targets = rows(4)
    inputs[2, 0, 0] = torch.inf
    assert both(model, inputs, targets, cross_entropy)
    inputs[0] = torch.nan
    assert both(model, inputs, targets, cross_entropy)
    assert both(model, *rows(5), cross_entropy)
    assert len(made) == 1
    assert not caplog.records


@pytest.mark.usefixtures("_all_declared")
def test_examples_with_doubtful_norms_are_taken_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make("embedding", EXAMPLES, 2)
    monkeypatch.setattr(engine, "_too_short", lambda tape, *_: tape.total[0] > tape.total[0].median())
    for seed in range(4):
        assert both(model.float(), *data(inputs, seed)) == (seed >= graphs.CALLS)


@pytest.mark.usefixtures("_all_declared")
def test_a_model_that_asks_is_computed_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Waiting()
    with caplog.at_level(logging.WARNING):
        assert not any(both(model, *rows(seed), cross_entropy) for seed in range(6))
    assert [record.getMessage() for record in caplog.records] == [
        "gradients of Waiting are not recorded as a CUDA graph: "
        "operation not permitted when stream is capturing."
    ]


@pytest.mark.usefixtures("_all_declared")
def test_a_recording_goes_with_its_model_and_holds_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[Tensor] = []
    cached = constants.spread
    monkeypatch.setattr(constants, "spread", lambda *key: numbers.append(cached(*key)) or numbers[-1])
    model, inputs = make("ws conv", EXAMPLES, 1)
    model = model.float()
    for seed in range(3):
        both(model, *data(inputs.float(), seed))
    recording = graphs._known[model].recording
    assert recording is not None
    kept = {storage.data_ptr() for storage in recording._kept.values()}
    assert numbers
    assert {tensor.data_ptr() for tensor in (*model.parameters(), *numbers)} <= kept
    gone = weakref.ref(recording)
    del recording, model
    gc.collect()
    assert gone() is None


def test_the_public_function_records_pieces() -> None:
    model, options = network(), Options(cuda_graphs=True)
    inputs, targets = rows(1, 17)
    found, expected = (
        clipped_gradient_sum(
            model,
            inputs,
            targets,
            FlatClip(0.3),
            loss=cross_entropy,
            engine="bookkeeping",
            physical_batch_size=2 * EXAMPLES,
            options=own,
        )
        for own in (options, Options())
    )
    assert [graph.replays for graph in made] == [2]  # of four pieces; the last has two examples
    assert torch.equal(found.sum, expected.sum)
    assert torch.equal(found.norms, expected.norms)


def test_the_setting_is_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert options_of(EngineConfig(cuda_graphs=True)).cuda_graphs
    with pytest.raises(InputError, match=r"engine\.cuda_graphs must be false on cpu"):
        clipped_sum(network(), *rows(1), cross_entropy, FlatClip(1.0), RECORDED)
