"""Engine values <-> Flower records. Flat arrays and one JSON text, no pickle; checked on arrival."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedsim.types import HolderReply, StepTask

PARAMETERS, TASK, REPLY, ARRAYS = "parameters", "task", "reply", "arrays"
# Bytes as they lie in memory: a quarter of the time of numpy's file format.
RAW = "fedsim.raw"
HOLDERS = np.dtype("<i8")
Record = TypeVar("Record", ArrayRecord, ConfigRecord)


def pack_task(task: StepTask, parameters: ArrayRecord, config_json: str) -> RecordDict:
    """Return the content of a train message. `parameters` is shared by all nodes of a wave."""
    # Numbers in one text: Flower checks every entry of a record, which for a dozen costs more than JSON.
    header = {
        "step": task.step,
        "wave": task.wave,
        "sampling_rate": task.sampling_rate,
        "keys": {name: key.hex() for name, key in task.keys.items()},
        "stage": task.stage,
    }
    body = ConfigRecord({"config": config_json, "header": json.dumps(header)})
    return RecordDict({PARAMETERS: parameters, TASK: body, ARRAYS: _pack_arrays(task.arrays)})


def pack_parameters(parameters: NDArray[Any]) -> ArrayRecord:
    """Return the flat parameters as a record."""
    return _pack_arrays({"flat": parameters})


def unpack_task(content: RecordDict) -> tuple[StepTask, NDArray[Any], str]:
    """Return (task, flat parameters, configuration JSON) of a train message."""
    body: Any = _record(content, TASK, ConfigRecord)
    header = json.loads(body["header"])
    task = StepTask(
        step=header["step"],
        wave=header["wave"],
        sampling_rate=header["sampling_rate"],
        keys={name: bytes.fromhex(key) for name, key in header["keys"].items()},
        stage=header["stage"],
        arrays=_unpack_arrays(content),
    )
    return task, _read(_record(content, PARAMETERS, ArrayRecord)["flat"]), body["config"]


def pack_reply(reply: HolderReply) -> RecordDict:
    """Return the content of a node's answer."""
    header = {
        "step": reply.step,
        "wave": reply.wave,
        "stage": reply.stage,
        "node": reply.node,
        "count": reply.count,
        "code_hash": reply.code_hash,
        "statistics": dict(reply.statistics),
        "seconds": dict(reply.seconds),
    }
    holders = reply.holders.astype(HOLDERS, copy=False).tobytes()
    body = ConfigRecord({"header": json.dumps(header), "holders": holders})
    return RecordDict({REPLY: body, ARRAYS: _pack_arrays(reply.arrays)})


def unpack_reply(content: RecordDict) -> HolderReply:
    """Return the answer; raises KeyError, ValueError or TypeError for malformed content."""
    body: Any = _record(content, REPLY, ConfigRecord)
    header: Any = json.loads(body["header"])
    return HolderReply(
        step=_whole(header["step"]),
        wave=_whole(header["wave"]),
        node=_whole(header["node"]),
        holders=np.frombuffer(body["holders"], HOLDERS),
        code_hash=str(header["code_hash"]),
        arrays=_unpack_arrays(content),
        count=_whole(header["count"]),
        statistics={
            str(name): [float(v) for v in value] if isinstance(value, list) else float(value)
            for name, value in dict(header["statistics"]).items()
        },
        seconds={str(name): float(value) for name, value in dict(header["seconds"]).items()},
        stage=str(header["stage"]),
    )


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"expected a whole number, got {value!r}")
    return value


def _record(content: RecordDict, name: str, kind: type[Record]) -> Record:
    """Return one record; Flower's own views by kind build a new dictionary each time."""
    found = content[name]
    if not isinstance(found, kind):
        raise TypeError(f"expected record {name!r} to be a {kind.__name__}, got a {type(found).__name__}")
    return found


def _pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: _array(values) for name, values in arrays.items()})


def _array(values: NDArray[Any]) -> Array:
    return Array(values.dtype.name, values.shape, RAW, np.ascontiguousarray(values).tobytes())


def _unpack_arrays(content: RecordDict) -> dict[str, NDArray[Any]]:
    return {name: _read(array) for name, array in _record(content, ARRAYS, ArrayRecord).items()}


def _read(array: Array) -> NDArray[Any]:
    """Return the array, read-only, not copied; refuse what is not plain numbers of the stated size."""
    dtype = np.dtype(array.dtype)
    if array.stype != RAW or dtype.kind not in "fiub":
        raise ValueError(f"expected plain numbers, got {array.dtype} as {array.stype}")
    return np.frombuffer(array.data, dtype=dtype).reshape(array.shape)
