"""What is prepared ahead comes in order, with its failures, and nothing goes on after the end."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.data import batches
from fedsim.engine import evaluate, setup
from fedsim.engine.ahead import ahead
from fedsim.types import StepTask
from tests.conftest import small, train


def test_things_come_in_order_one_ahead_of_what_is_asked_for() -> None:
    begun: list[int] = []

    def prepare(item: int) -> tuple[int, str]:
        begun.append(item)
        return item, threading.current_thread().name

    found = ahead(prepare, range(5))
    assert next(found)[0] == 0
    for _ in range(200):  # the other thread has its time
        if begun == [0, 1]:
            break
        time.sleep(0.01)
    assert begun == [0, 1]
    rest = list(found)
    assert [item for item, _ in rest] == [1, 2, 3, 4]
    assert all(name.startswith("ahead") for _, name in rest)
    assert list(ahead(prepare, [])) == []


def test_a_failure_comes_with_its_item_and_no_thread_stays() -> None:
    def prepare(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    found = ahead(prepare, range(4))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(found)
    left = ahead(prepare, range(2))
    next(left)
    left.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


def test_views_prepared_for_a_gpu_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(
        "engine.physical_batch_size=6",
        "train.augment_multiplicity=2",
        "train.augmentations=[mirror_pad_crop]",
    )
    node = setup.node_for(setup.setup_of(config), 0)
    task = StepTask(0, 0, 1.0, {"augment": bytes(range(32))})
    ids = node.ids[:11]
    expected = list(node._pieces(ids, task))
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert threading.current_thread().name.startswith("ahead")
        pinned.append(tensor.clone())
        return pinned[-1]

    real = batches.placed
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(batches, "placed", lambda parts, *rest: real(parts, *rest[:2], torch.device("cpu")))
    monkeypatch.setattr(node, "device", SimpleNamespace(type="cuda"))
    found = list(node._pieces(ids, task))
    assert len(found) == len(expected) == 4
    assert len(pinned) == 8
    for (piece, arrays, whole), (own_piece, own_arrays, own_whole) in zip(found, expected, strict=True):
        assert piece == own_piece
        assert whole is own_whole is None
        for array, own in zip(arrays, own_arrays, strict=True):
            assert isinstance(array, torch.Tensor)
            assert torch.equal(array, own)  # type: ignore[arg-type]
    assert np.all(ids == node.ids[:11])


def test_the_server_evaluates_where_it_is_told_and_brings_the_model_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[str] = []

    class Moving(torch.nn.Linear):
        def to(self, device: Any) -> Any:
            moves.append(str(device))
            return self

    model = Moving(2, 2)
    with contextlib.suppress(ValueError), evaluate.on(model, torch.device("cuda", 0)):
        assert moves == ["cuda:0"]
        raise ValueError
    assert moves == ["cuda:0", "cpu"]
    entered: list[torch.device] = []
    real = evaluate.on

    def on(model: torch.nn.Module, device: torch.device) -> Any:
        entered.append(device)
        return real(model, torch.device("cpu"))

    monkeypatch.setattr(evaluate, "on", on)
    monkeypatch.setattr("fedsim.engine.server.evaluation_device", lambda engine: torch.device("cuda", 0))
    result = train(small("train.steps=2", "train.eval_every=1"), tmp_path)
    assert entered == [torch.device("cuda", 0)] * 3  # two evaluations, and the holders' accuracy at the end
    assert 0.0 <= result["accuracy"] <= 1.0
