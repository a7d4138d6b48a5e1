"""Recorded calls give the bits of computed ones, and whatever changes what would be computed is not replayed.

Without a GPU: `benchmarks.emulated.Graph` asks the operations of a recording again, of the memory they had.
"""

from __future__ import annotations

import gc
import logging
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.emulated import Graph, Recorder
from fedsim.config import EngineConfig
from fedsim.engine.device import options_of
from fedsim.grads import FlatClip, clipped_gradient_sum, constants, gpu
from fedsim.grads.bookkeeping import Options, clipped_sum, engine, graphs
from fedsim.grads.clip import ClipRule, NormalisedClip, PerLayerClip
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


@pytest.fixture(autouse=True)
def _with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()

    def new() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(gpu, "on", lambda _: True)
    monkeypatch.setattr(Options, "check_device", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", Recorder)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())


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


def test_what_changes_is_not_replayed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.factor, self.shift = network(), 1.0, torch.zeros(3)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, inputs: Tensor) -> Tensor:
            outputs = self.inner(inputs - self.mean) * self.factor + self.shift
            return -outputs if self.training else outputs

    model = Scaled()

    def settled(*rest: Any) -> None:
        for seed in range(graphs.CALLS + 1):
            replayed = both(model, *rows(seed), *rest or (cross_entropy,))
        assert replayed

    settled()
    model.factor = 3.0
    assert not both(model, *rows(7), cross_entropy)
    settled()
    model.eval()
    assert not both(model, *rows(7), cross_entropy)
    settled()
    model.inner[2].register_forward_hook(lambda module, given, outputs: 2.0 * outputs)
    assert not both(model, *rows(7), cross_entropy)
    settled()
    model.inner[1] = nn.ReLU()
    assert not both(model, *rows(7), cross_entropy)
    settled()
    model.shift = torch.ones(3)
    assert not both(model, *rows(7), cross_entropy)
    settled()
    model.inner[0].weight.requires_grad_(False)
    assert not both(model, *rows(7), cross_entropy)
    settled()
    model.inner[2].weight.data = torch.ones(3, 6)
    assert not both(model, *rows(7), cross_entropy)
    settled()
    assert not both(model, *rows(7), cross_entropy, FlatClip(0.2))
    settled()
    assert not both(model, *rows(7), lambda outputs, targets: 2.0 * cross_entropy(outputs, targets))
    settled()
    inputs, targets = rows(7)
    assert not both(model, inputs.repeat(1, 2, 1), targets, cross_entropy)
    settled()
    with torch.no_grad():  # values are read where they are
        model.mean.fill_(2.0)
        model.shift.fill_(3.0)
    assert both(model, *rows(7), cross_entropy)


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


def test_examples_with_doubtful_norms_are_taken_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make("embedding", EXAMPLES, 2)
    monkeypatch.setattr(engine, "_too_short", lambda tape, *_: tape.total[0] > tape.total[0].median())
    for seed in range(4):
        assert both(model.float(), *data(inputs, seed)) == (seed >= graphs.CALLS)


def test_a_model_that_asks_is_computed_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(inputs) * (2.0 if self.inner[0].weight.sum() > 0 else 3.0)

    model = Asking()
    with caplog.at_level(logging.WARNING):
        assert not any(both(model, *rows(seed), cross_entropy) for seed in range(6))
    assert [record.getMessage() for record in caplog.records] == [
        "gradients of Asking are not recorded as a CUDA graph: "
        "operation not permitted when stream is capturing."
    ]


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
