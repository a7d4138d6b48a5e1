"""Engine values <-> Flower records: flat arrays and one JSON text, no pickle.

What comes out has the right types (fedsim.flower.records); whether it is what a node should answer is for
fedsim.engine.replies to judge.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedsim.engine.asked import Asked
from fedsim.flower.records import (
    MessageError,
    number,
    opened,
    pack_arrays,
    parsed,
    record,
    sealed,
    shown,
    typed,
)
from fedsim.types import HolderReply, StepTask

PARAMETERS, TASK, REPLY, ARRAYS, ASKED = "parameters", "task", "reply", "arrays", "asked"
IDENTITY = "identity"
HOLDERS = np.dtype("<i8")


def pack_task(task: StepTask, parameters: ArrayRecord, config_json: str) -> RecordDict:
    """Return the content of a train message. `parameters` is shared by all nodes of a wave."""
    header = {
        "step": task.step,
        "wave": task.wave,
        "sampling_rate": task.sampling_rate,
        "keys": {name: key.hex() for name, key in task.keys.items()},
        "stage": task.stage,
    }
    body = {"config": config_json, "header": json.dumps(header)}
    return sealed(TASK, body, {PARAMETERS: parameters, ARRAYS: pack_arrays(task.arrays)})


def pack_parameters(parameters: NDArray[Any]) -> ArrayRecord:
    """Return the flat parameters as a record."""
    return pack_arrays({"flat": parameters})


def unpack_task(content: RecordDict) -> tuple[StepTask, NDArray[Any], str]:
    """Return (task, flat parameters, configuration JSON) of a train message; raises MessageError."""
    body, arrays = opened(content, TASK, {"config": str, "header": str}, (PARAMETERS, ARRAYS))
    header = parsed(body["header"], ("step", "wave", "sampling_rate", "keys", "stage"))
    keys = {name: _key(name, key) for name, key in typed(header["keys"], dict, "keys").items()}
    task = StepTask(
        step=typed(header["step"], int, "step"),
        wave=typed(header["wave"], int, "wave"),
        sampling_rate=number(header["sampling_rate"], "sampling_rate"),
        keys=keys,
        stage=typed(header["stage"], str, "stage"),
        arrays=arrays[ARRAYS],
    )
    if set(arrays[PARAMETERS]) != {"flat"}:
        raise MessageError(
            f"expected the parameters as one array 'flat', got {shown(list(arrays[PARAMETERS]))}"
        )
    return task, arrays[PARAMETERS]["flat"], body["config"]


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
    body: dict[str, str | bytes] = {"header": json.dumps(header), "holders": holders}
    return sealed(REPLY, body, {ARRAYS: pack_arrays(reply.arrays)})


def unpack_reply(content: RecordDict) -> HolderReply:
    """Return a node's answer, its values of the right types; raises MessageError."""
    body, arrays = opened(content, REPLY, {"header": str, "holders": bytes}, (ARRAYS,))
    names = ("step", "wave", "stage", "node", "count", "code_hash", "statistics", "seconds")
    header = parsed(body["header"], names)
    if len(body["holders"]) % HOLDERS.itemsize:
        raise MessageError(
            f"expected holders of {HOLDERS.itemsize} bytes each, got {len(body['holders'])} bytes"
        )
    statistics: dict[str, float | list[float]] = {
        name: [number(v, name) for v in value] if isinstance(value, list) else number(value, name)
        for name, value in typed(header["statistics"], dict, "statistics").items()
    }
    seconds = typed(header["seconds"], dict, "seconds")
    return HolderReply(
        step=typed(header["step"], int, "step"),
        wave=typed(header["wave"], int, "wave"),
        node=typed(header["node"], int, "node"),
        holders=np.frombuffer(body["holders"], HOLDERS),
        code_hash=typed(header["code_hash"], str, "code_hash"),
        arrays=arrays[ARRAYS],
        count=typed(header["count"], int, "count"),
        statistics=statistics,
        seconds={name: number(value, name) for name, value in seconds.items()},
        stage=typed(header["stage"], str, "stage"),
    )


def unpack_identity(content: RecordDict) -> tuple[int, str]:
    """Return (index, code hash) of a node; raises MessageError."""
    if set(content) != {IDENTITY}:
        raise MessageError(f"expected a node's identity, got records {shown(sorted(content))}")
    body = dict(record(content, IDENTITY, ConfigRecord))
    if set(body) != {"node", "code_hash"}:
        raise MessageError(f"expected node and code_hash, got {shown(sorted(body))}")
    return typed(body["node"], int, "node"), typed(body["code_hash"], str, "code_hash")


def pack_asked(asked: Asked) -> ConfigRecord:
    """Return a node's memory as a record of its Context."""
    named = {"told": asked.told, "answered": asked.answered}
    out: dict[str, Any] = {"step": asked.step}
    for name, digests in named.items():
        out |= {f"{name} names": list(digests), name: list(digests.values())}
    return ConfigRecord(out)


def unpack_asked(state: RecordDict) -> Asked:
    """Return the memory that a node's Context holds, an empty one before the first task."""
    if ASKED not in state:
        return Asked()
    held: Any = record(state, ASKED, ConfigRecord)
    told, answered = (dict(zip(held[f"{n} names"], held[n], strict=True)) for n in ("told", "answered"))
    return Asked(held["step"], told, answered)


def _key(name: str, text: Any) -> bytes:
    try:
        key = bytes.fromhex(typed(text, str, name))
    except ValueError as error:
        raise MessageError(f"expected key {shown(name)} in hexadecimal digits, got {shown(text)}") from error
    if len(key) != 32:
        raise MessageError(f"expected key {shown(name)} of 32 bytes, got {len(key)}")
    return key
