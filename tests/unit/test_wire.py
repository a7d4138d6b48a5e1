"""Messages: what arrives is what was sent."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord

from fedsim.flower import wire
from fedsim.flower.local_grid import LocalGrid
from fedsim.types import HolderReply, StepTask


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_task_round_trip(dtype: type) -> None:
    keys = {"draw": b"a" * 32, "augment": b"c" * 32}
    task = StepTask(3, 1, 0.25, keys, "unmask", {"shares": np.arange(3, dtype=np.uint64)})
    parameters = np.linspace(0, 1, 17).astype(dtype)
    got, flat, text = wire.unpack_task(wire.pack_task(task, wire.pack_parameters(parameters), "{}"))
    assert (got.step, got.wave, got.sampling_rate, got.keys, got.stage) == (3, 1, 0.25, keys, "unmask")
    assert np.array_equal(got.arrays["shares"], task.arrays["shares"])
    assert text == "{}"
    assert flat.dtype == dtype
    assert np.array_equal(flat, parameters)


def test_reply_round_trip() -> None:
    reply = HolderReply(
        step=2,
        wave=0,
        node=1,
        holders=np.arange(3, 9, dtype=np.int64),
        code_hash="abc",
        arrays={"sum": np.ones(4, np.float32), "ring": np.arange(3, dtype=np.uint64)},
        count=11,
        statistics={"loss_sum": 2.5, "histogram": [1.0, 0.0, 3.0]},
        seconds={"compute": 0.5},
    )
    got = wire.unpack_reply(wire.pack_reply(reply))
    assert (got.step, got.node, got.count, got.code_hash) == (2, 1, 11, "abc")
    assert got.statistics == reply.statistics
    assert got.seconds == reply.seconds
    assert np.array_equal(got.holders, reply.holders)
    for name, array in reply.arrays.items():
        assert np.array_equal(got.arrays[name], array)
        assert got.arrays[name].dtype == array.dtype


def test_empty_statistics_travel() -> None:
    LocalGrid(lambda m, c: m, 1)
    reply = HolderReply(0, 0, 0, np.zeros(0, np.int64), "", {"sum": np.zeros(0, np.float32)}, 0, {}, {})
    got = wire.unpack_reply(wire.pack_reply(reply))
    assert got.count == 0
    assert got.arrays["sum"].shape == (0,)


@pytest.mark.parametrize(
    "change",
    [
        {"count": float("inf")},
        {"step": 1.5},
        {"node": None},
        {"statistics": 3},
        {"statistics": {"loss_sum": "many"}},
        {"seconds": {"compute": None}},
    ],
    ids=str,
)
def test_a_header_of_wrong_kind_is_refused(change: dict[str, Any]) -> None:
    content = wire.pack_reply(_REPLY)
    body: Any = content[wire.REPLY]
    body["header"] = json.dumps({**json.loads(body["header"]), **change})
    with pytest.raises((KeyError, ValueError, TypeError)):
        wire.unpack_reply(content)


def test_a_reply_of_wrong_records_is_refused() -> None:
    for name, record in ((wire.REPLY, ArrayRecord()), (wire.ARRAYS, ConfigRecord())):
        content = wire.pack_reply(_REPLY)
        del content[name]
        with pytest.raises(KeyError):
            wire.unpack_reply(content)
        content[name] = record
        with pytest.raises(TypeError):
            wire.unpack_reply(content)
    for key, value in (("header", "{"), ("holders", b"123")):
        content = wire.pack_reply(_REPLY)
        body: Any = content[wire.REPLY]
        body[key] = value
        with pytest.raises(ValueError):
            wire.unpack_reply(content)


_REPLY = HolderReply(
    2, 0, 1, np.arange(3), "abc", {"sum": np.ones(4, np.float32)}, 11, {"loss_sum": 2.5}, {"compute": 0.5}
)
