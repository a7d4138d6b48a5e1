"""The physical batch that is chosen: within the cap, worth its size, the same for the same costs."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from torch import Tensor, nn

from fedsim import loading
from fedsim.config import Config
from fedsim.engine import device as devices
from fedsim.engine import probe
from fedsim.engine.experiment import prepare
from fedsim.engine.holder import Node
from fedsim.engine.run_folder import RunFolder
from fedsim.flower import wire
from fedsim.flower.client_app import app
from fedsim.grads import FlatClip
from fedsim.grads.batch_size import Cost, LiveBytes, OverLimit, choose, measure
from fedsim.grads.per_example import clipped_gradient_sum
from fedsim.validate import InputError, RunError
from tests.conftest import final, small, train

CPU = torch.device("cpu")
AUTO = "engine.physical_batch_size=auto"


class Told:
    """A measure that computes its answers, and keeps what it was asked."""

    def __init__(self, memory: Callable[[int], int], seconds: Callable[[int], float]) -> None:
        self.memory, self.seconds = memory, seconds
        self.ran: list[int] = []

    def __call__(self, examples: int, limit: int) -> Cost | None:
        self.ran.append(examples)
        return Cost(self.memory(examples), self.seconds(examples))


def halving(examples: int) -> float:
    """An example costs less the more there are, without end."""
    return 1e-4 * examples**0.5


# --- the search ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [150, 199, 260, 1000, 1380, 1381, 10**5])
def test_no_size_above_the_limit_is_run_or_chosen(limit: int) -> None:
    told = Told(lambda n: 100 + 10 * n, halving)
    choice = choose(told, limit, most=2**20)
    assert max(told.memory(n) for n in told.ran) <= limit
    assert choice.stopped == "memory limit"
    assert choice.examples == max(told.ran)
    # Nothing that fits was left out, once the line is known from two sizes.
    if limit >= 220:
        assert told.memory(2 * choice.examples) > limit


def test_a_second_size_is_only_run_if_twice_the_first_fits() -> None:
    told = Told(lambda n: 100 * n, halving)
    assert choose(told, 199, most=64).examples == 1
    assert told.ran == [1]


def test_a_run_that_is_cut_off_ends_the_search() -> None:
    def jumps(examples: int, limit: int) -> Cost | None:
        return None if examples > 16 else Cost(examples, halving(examples))

    assert choose(jumps, 10**9, most=1024).examples == 16


def test_the_search_ends_where_more_examples_are_no_faster() -> None:
    told = Told(lambda n: n, lambda n: 1.0 + max(0.0, 0.2 * (n - 16)))
    choice = choose(told, 10**9, most=2**20)
    assert (choice.examples, choice.stopped, told.ran[-1]) == (16, "no faster", 32)


def test_below_eight_no_gain_is_asked_for() -> None:
    told = Told(lambda n: n, lambda n: n * (1.0 if n < 8 else 0.5))
    assert choose(told, 10**9, most=2**20).examples == 8
    assert told.ran == [1, 2, 4, 8, 16]


def test_no_more_than_a_whole_batch_and_nothing_slow_is_run() -> None:
    assert choose(Told(lambda n: n, halving), 10**9, most=60).examples == 64
    slow = Told(lambda n: n, lambda n: 8e4 * halving(n))
    assert choose(slow, 10**9, most=2**20).stopped == "slow"
    assert slow.ran == [1, 2]


def test_equal_costs_give_an_equal_choice() -> None:
    choices = [choose(Told(lambda n: 7 + 3 * n, halving), 5000, 4096) for _ in range(2)]
    assert choices[0] == choices[1]


def test_one_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"engine\.memory_limit must hold .* 99 bytes do not"):
        choose(Told(lambda n: 100 * n, halving), 99, most=8)


# --- counting --------------------------------------------------------------------------------------------


def test_bytes_alive_are_counted() -> None:
    outside = torch.zeros(1000)
    with LiveBytes(10**9) as counter:
        a = torch.zeros(256)
        a.view(16, 16).add_(outside[:16])  # neither a view nor an old tensor is new memory
        b = a + 1
        assert counter.now == 2048
        del a
        c = torch.zeros(128)
        assert (counter.now, counter.peak) == (1536, 2048)
        del b, c
    assert counter.now == 0


def test_what_backward_needs_is_counted() -> None:
    weight = torch.ones(100, requires_grad=True)
    with LiveBytes(10**9) as counter:
        kept = (weight.exp().exp()).sum()
        held = counter.now
        kept.backward()
    assert held >= 800, "both results are saved for the backward pass"
    assert counter.peak > held


def test_the_limit_cuts_a_call_off() -> None:
    with pytest.raises(OverLimit), LiveBytes(1000) as counter:
        torch.zeros(251)
    assert counter.over
    assert measure(lambda n: torch.zeros(251 * n), CPU)(1, 1000) is None


def test_other_errors_are_not_taken_for_too_little_memory() -> None:
    def broken(examples: int) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure(broken, CPU)(1, 10**9)


def call_of(model: nn.Module, engine: str, width: int) -> Callable[[int], Tensor]:
    def call(examples: int) -> Tensor:
        inputs = torch.linspace(-1, 1, examples * width).view(examples, 1, width)
        targets = torch.zeros(examples, dtype=torch.int64)
        return clipped_gradient_sum(
            model, inputs, targets, FlatClip(1.0), engine=engine, physical_batch_size=examples
        ).sum

    return call


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "opacus"])
def test_the_count_of_a_call_grows_as_its_gradients_do(engine: str) -> None:
    """A head of 1,000 classes: 0.5 MB of gradient an example, which only bookkeeping need not hold."""
    call = call_of(nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 1000)), engine, 16)
    small_, large = (measure(call, CPU)(n, 2**40) for n in (16, 64))
    assert small_ is not None
    assert large is not None
    an_example = (large.memory - small_.memory) / 48
    gradient = 4 * (17 * 128 + 129 * 1000)
    if engine == "bookkeeping":
        assert an_example < gradient / 10
    else:
        assert gradient <= an_example <= 4 * gradient
    assert measure(call, CPU)(64, 2**40).memory == large.memory  # type: ignore[union-attr]


@pytest.mark.parametrize("limit", [12e6, 40e6])
@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_the_cap_is_kept_with_a_head_of_a_thousand_classes(engine: str, limit: float) -> None:
    """Counted from outside, over everything the probe runs, and for the size it chooses."""
    call = call_of(nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 1000)), engine, 16)
    with LiveBytes(2**40) as counter:
        choice = choose(measure(call, CPU), int(limit), most=4096)
        assert counter.peak <= limit
    assert choice.cost.memory <= limit
    if engine == "vmap":
        assert choice.examples <= limit / (4 * 129_000)


class Drawing(nn.Module):
    """Draws numbers, as dropout does."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * torch.bernoulli(torch.full_like(inputs, 0.5))


def test_random_state_is_as_before() -> None:
    before = torch.get_rng_state()
    module = Drawing()
    measure(lambda n: module(torch.ones(n, 3)), CPU)(4, 10**6)
    assert torch.equal(torch.get_rng_state(), before)


# --- in a run --------------------------------------------------------------------------------------------


def test_the_probe_leaves_model_gradients_and_random_state(tmp_path: Path) -> None:
    experiment = prepare(small(AUTO, "engine.memory_limit=50MB"))
    before = {name: value.clone() for name, value in experiment.model.state_dict().items()}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    settled = probe.settle(experiment, RunFolder(tmp_path), parallel=True)
    assert isinstance(settled.config.engine.physical_batch_size, int)
    assert all(torch.equal(before[name], value) for name, value in experiment.model.state_dict().items())
    assert all(p.grad is None for p in experiment.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not list(tmp_path.iterdir())


def test_the_probe_takes_the_costs_of_the_strategy() -> None:
    """One sum a holder is one parameter vector a holder, and a whole gradient an example."""
    limits: dict[str, int] = {}
    for name in ("central_dpsgd", "shares_dpsgd"):
        experiment = prepare(small(AUTO, f"preset={name}", "federation.holders=40"))
        choice = probe.probe(experiment, parallel=False)
        limits[name] = choice.costs[1].memory
        vector = 4 * experiment.facts.parameters
    assert limits["central_dpsgd"] < 5 * vector
    assert limits["shares_dpsgd"] > 20 * vector


def test_views_are_counted_with_their_example(tmp_path: Path) -> None:
    views = ["train.augment_multiplicity=3", "train.augmentations=[flip]"]
    settled = probe.settle(prepare(small(AUTO, *views)), RunFolder(tmp_path), parallel=False)
    size = settled.config.engine.physical_batch_size
    assert isinstance(size, int)
    assert size % 3 == 0


def test_a_limit_that_cannot_hold_an_example_fails_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"engine\.memory_limit"):
        train(small(AUTO, "engine.memory_limit=1000"), tmp_path)
    assert not list(tmp_path.iterdir())


def stopped_at(step: int) -> Callable[..., object]:
    def client(message: object, context: object) -> object:
        assert isinstance(message, Message)
        if message.metadata.message_type == "train" and wire.unpack_task(message.content)[0].step == step:
            raise OSError("stopped here")
        return app(message, context)  # type: ignore[arg-type]

    return client


def test_a_resumed_run_keeps_the_size_and_so_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([11, 7, 5])
    monkeypatch.setattr(probe, "_probed", lambda experiment, parallel: next(sizes))
    config = small(AUTO, "engine.memory_limit=0.25")
    with pytest.raises(RunError):
        train(config, tmp_path / "cut", client=stopped_at(3))
    assert loading.load(tmp_path / "cut" / "config.yaml").engine.physical_batch_size == 11
    result = train(config, tmp_path / "cut", resume=True)
    assert result["physical_batch_size"] == 11
    assert next(sizes) == 7, "the resumed run did not choose again"
    train(small("engine.physical_batch_size=11"), tmp_path / "whole")
    assert torch.equal(final(tmp_path / "cut"), final(tmp_path / "whole"))


def test_auto_trains_as_a_number_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fedsim.engine.probe"):
        result = train(small(AUTO), tmp_path / "auto")
    assert f"{result['physical_batch_size']} views" in caplog.text
    train(small(), tmp_path / "number")
    assert torch.max(torch.abs(final(tmp_path / "auto") - final(tmp_path / "number"))) <= 1e-5


def test_local_training_is_not_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda *_: pytest.fail("probed"))
    experiment = prepare(small(AUTO, "preset=dp_fedavg", "privacy.noise_multiplier=1.0"))
    assert probe.settle(experiment, RunFolder(tmp_path), False).config.engine.physical_batch_size == 256


def test_a_node_refuses_to_start_without_a_number() -> None:
    with pytest.raises(InputError, match="must be a number by the time nodes start"):
        Node(small(AUTO), 0, 0)


# --- the limit -------------------------------------------------------------------------------------------


def limit_of(config: Config, free: int = 1000, sharers: int = 1) -> int:
    return devices.memory_limit(config.engine, free, sharers)


def test_the_limit_is_bytes_for_a_node_or_a_share_of_what_is_free() -> None:
    assert limit_of(small(AUTO)) == 500
    assert limit_of(small(AUTO), sharers=4) == 125
    assert limit_of(small(AUTO, "engine.memory_limit=0.8"), sharers=2) == 400
    assert limit_of(small(AUTO, "engine.memory_limit=1.0")) == 1000
    assert limit_of(small(AUTO, "engine.memory_limit=8GB"), sharers=4) == 8 * 10**9
    assert limit_of(small(AUTO, "engine.memory_limit=1e9")) == 10**9


@pytest.mark.parametrize(
    ("parallel", "gpus", "per_wave", "kind", "expected"),
    [
        (False, 0.0, None, "cpu", 1),
        (True, 0.0, None, "cpu", 8),
        (True, 0.0, 3, "cpu", 3),
        (True, 0.25, None, "cuda", 4),
        (True, 0.25, 2, "cuda", 2),
        (True, 2.0, None, "cuda", 1),
        (True, 0.0, None, "cuda", 8),
    ],
)
def test_nodes_that_compute_at_once_share(
    parallel: bool, gpus: float, per_wave: int | None, kind: str, expected: int
) -> None:
    config = small(
        "federation.nodes=8",
        f"engine.gpus_per_node={gpus}",
        f"federation.nodes_per_wave={'null' if per_wave is None else per_wave}",
    )
    assert devices.nodes_at_once(config, torch.device(kind), parallel) == expected


def test_free_memory_is_no_more_than_the_container_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = devices.free_memory(CPU)
    assert machine > 0
    limit, used = tmp_path / "max", tmp_path / "current"
    used.write_text("300\n")
    monkeypatch.setattr(devices, "_CONTAINER", ((str(limit), str(used)),))
    for text, expected in (("1000\n", 700), ("200\n", 0)):
        limit.write_text(text)
        assert devices.free_memory(CPU) == expected
    limit.write_text("max\n")
    assert devices.free_memory(CPU) > 10**6


class FakeCuda:
    """An allocator that gives `room` bytes and no more than its process may take."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fraction, self.peak, self.in_use, self.room = 0.9, 0, 1000, room
        self.asked: list[float] = []
        nothing = lambda *_: None  # noqa: E731
        fakes = {
            "get_device_properties": lambda _: type("Facts", (), {"total_memory": 10_000}),
            "get_per_process_memory_fraction": lambda _: self.fraction,
            "set_per_process_memory_fraction": self.set,
            "synchronize": nothing,
            "empty_cache": nothing,
            "memory_allocated": lambda _: self.in_use,
            "memory_reserved": lambda _: self.in_use,
            "reset_peak_memory_stats": nothing,
            "max_memory_allocated": lambda _: self.in_use + self.peak,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: torch.no_grad())

    def set(self, fraction: float, device: torch.device) -> None:
        self.fraction = fraction
        self.asked.append(fraction)

    def take(self, examples: int) -> None:
        if examples * 100 > min(self.room, round(self.fraction * 10_000) - self.in_use):
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.peak = examples * 100


def test_on_cuda_the_allocator_itself_holds_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(10_000, monkeypatch)
    cost = measure(cuda.take, torch.device("cuda", 0))
    found = cost(4, 500)
    assert found is not None
    assert found.memory == 400
    assert cost(6, 500) is None, "600 bytes are free, but not within the limit"
    assert min(cuda.asked) == pytest.approx(0.15)
    assert cuda.fraction == 0.9, "the process may take again what it might before"


def test_on_cuda_running_out_of_memory_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(1600, monkeypatch)
    choice = choose(measure(cuda.take, torch.device("cuda", 0)), 10**6, most=64)
    assert choice.examples <= 16
    assert choice.stopped == "memory limit"
    assert cuda.fraction == 0.9


def test_nothing_is_held_after_a_measure() -> None:
    model = nn.Linear(16, 1000)
    call = call_of(model, "bookkeeping", 16)
    measure(call, CPU)(8, 2**40)
    gc.collect()
    with LiveBytes(2**40) as counter:
        call(8)
    gc.collect()
    assert counter.now == 0
