"""What fedsim decides for GPUs, on machines without one: `torch.cuda` is faked where it is asked."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.config import Config, EngineConfig
from fedsim.engine import device as devices
from fedsim.engine import holder
from fedsim.engine.experiment import prepare
from fedsim.flower import launch
from fedsim.grads.bookkeeping import Options
from fedsim.validate import InputError
from tests.conftest import final, small, train

CARD = 80 * 2**30
CUDA = torch.device("cuda", 0)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let this process see so many GPUs of 80 GiB, with 70 free."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=CARD))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * 2**30, CARD))

    return see


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_device_of_cuda_has_its_index(name: str, cards: Any) -> None:
    cards(1)
    assert devices.pick_device(name).index == 0
    with torch.random.fork_rng([devices.pick_device(name)], enabled=False):
        pass


def test_nodes_of_one_process_spread_over_the_cards(cards: Any) -> None:
    cards(2)
    assert [devices.pick_device("auto", node).index for node in range(4)] == [0, 1, 0, 1]
    assert devices.pick_device("cuda:1", 0).index == 1
    with pytest.raises(InputError, match="sees 2 CUDA devices"):
        devices.pick_device("cuda:2")


@pytest.mark.parametrize(
    ("count", "device", "where"),
    [
        (2, "auto", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
        (1, "cuda:1", "cuda:0"),
        (2, "cpu", "cpu"),
        (0, "auto", "cpu"),
    ],
)
def test_the_server_evaluates_on_a_gpu_that_it_sees(count: int, device: str, where: str, cards: Any) -> None:
    cards(count)
    assert str(devices.evaluation_device(EngineConfig(device=device))) == where


def simulated(*overrides: str) -> Config:
    return small(*[f"engine.{setting}" for setting in overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("device=cuda",), "reserve no GPU and see none"),
        (("device=cuda:1", "gpus_per_node=0.5"), "numbered from 0"),
        (("device=cuda:1", "gpus_per_node=1"), "numbered from 0"),
        (("gpus_per_node=3",), "has 2 CUDA devices: nodes would wait for ever"),
    ],
)
def test_what_simulated_nodes_cannot_have_is_refused_before_anything_starts(
    overrides: tuple[str, ...], message: str, cards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(2)

    def started(*_: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(launch, "_simulate", started)
    with pytest.raises(InputError, match=message):
        launch.simulate(simulated(*overrides), SimpleNamespace(root=tmp_path), False, None)  # type: ignore[arg-type]


def test_a_card_that_stands_idle_is_told(cards: Any, caplog: pytest.LogCaptureFixture) -> None:
    for count, overrides, told in (
        (1, (), True),
        (1, ("gpus_per_node=0.5",), False),
        (1, ("device=cpu",), False),
        (0, (), False),
    ):
        cards(count)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            devices.check_simulation(simulated(*overrides))
        assert ("stand idle" in caplog.text) is told


@pytest.mark.parametrize(
    ("share", "nodes"), [(0.0, 1), (1.0, 1), (0.6, 1), (0.5, 2), (0.15, 6), (0.1, 10), (2.0, 1)]
)
def test_nodes_on_one_card_have_its_memory_together(share: float, nodes: int, cards: Any) -> None:
    cards(1)
    options = devices.options_of(EngineConfig(gpus_per_node=share))
    assert options.sharers == nodes
    assert nodes * options.budget_on(CUDA) <= CARD // 8
    assert options.budget_on(CUDA) >= CARD // 8 // nodes - 1
    assert Options(memory_budget=5, sharers=nodes).budget_on(CUDA) == 5


def test_contexts_that_are_still_to_come_are_not_free_memory(cards: Any) -> None:
    cards(1)
    assert devices.free_memory(CUDA) - devices.free_memory(CUDA, processes=4) == 4 * devices.CUDA_CONTEXT
    assert devices.free_memory(CUDA, processes=1000) == 0


@pytest.fixture
def _determinism_comes_back() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = before


@pytest.mark.usefixtures("_determinism_comes_back")
@pytest.mark.parametrize("wanted", [True, False])
def test_cuda_repeats_its_bits_unless_told_otherwise(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    devices.make_deterministic(torch.device("cpu"), True)
    assert not torch.are_deterministic_algorithms_enabled()
    devices.make_deterministic(CUDA, wanted)
    assert torch.are_deterministic_algorithms_enabled() is wanted
    assert torch.backends.cudnn.deterministic is wanted
    assert torch.backends.cudnn.benchmark is not wanted
    assert "CUBLAS_WORKSPACE_CONFIG" in os.environ  # since fedsim was imported: CUDA's BLAS reads it once


def test_a_node_asks_for_what_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(holder, "make_deterministic", lambda device, wanted: asked.append(wanted))
    assert EngineConfig().deterministic
    for wanted in (True, False):
        holder.Node(small(f"engine.deterministic={wanted}"), 0, 0)
    assert asked == [True, False]


def test_a_secure_sum_must_repeat_its_bits() -> None:
    with pytest.raises(InputError, match="must mask the very integers"):
        prepare(small("preset=shares_dpsgd", "engine.deterministic=false"))


@pytest.mark.parametrize("strategy", ["central_dpsgd", "local_dpsgd"])
def test_out_of_memory_halves_the_physical_batch_once_and_says_so(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small(f"preset={strategy}", "federation.nodes=1", "engine.physical_batch_size=32")
    train(config, tmp_path / "whole")
    sizes = {name: getattr(holder, name) for name in ("clipped_gradient_sum", "clipped_gradient_sums")}

    def limited(real: Any) -> Any:
        def compute(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            if len(inputs) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(model, inputs, *rest, **named)

        return compute

    for name, real in sizes.items():
        monkeypatch.setattr(holder, name, limited(real))
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path / "halved")
    assert caplog.text.count("from here on node 0 takes 16") == 1
    np.testing.assert_allclose(final(tmp_path / "halved"), final(tmp_path / "whole"), atol=1e-6)


def test_memory_that_half_a_batch_does_not_fit_either_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def never(model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        asked.append(len(inputs))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(holder, "clipped_gradient_sum", never)
    with pytest.raises(Exception, match="out of memory"):
        train(small("seed=5", "federation.nodes=1", "engine.physical_batch_size=32"), tmp_path)
    assert asked[:2] == [32, 16]
