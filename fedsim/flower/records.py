"""Records of a message, written with digests and read strictly.

What arrives is either what was sent or a MessageError with the reason. Every array carries a digest of its
own and every message one of all its parts, so that a bit that flipped on the way is noticed; and every part
is read strictly, so that whoever makes a message of its own gets no further than values of the right type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedsim import digest
from fedsim.validate import RunError

# Bytes as they lie in memory, little end first: a quarter of the time of numpy's file format.
RAW = "fedsim.raw"
NUMBERS = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float32", "float64"),
    )
}
MAX_HEADER = 1 << 16  # characters; an honest one has a few thousand
MAX_AXES = 8
Record = TypeVar("Record", ArrayRecord, ConfigRecord)


class MessageError(RunError):
    """A message is not one that was sent: what was expected and what came, in printable characters."""


def shown(value: object) -> str:
    """Return foreign content for a message to a person: printable, short."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def sealed(name: str, body: Mapping[str, str | bytes], arrays: Mapping[str, ArrayRecord]) -> RecordDict:
    """Return a message of one record of texts and bytes, and records of arrays, with the digest of all."""
    seal = digest.of(_parts(body, arrays))
    return RecordDict({name: ConfigRecord({**body, "digest": seal}), **arrays})


def opened(
    content: RecordDict, name: str, kinds: Mapping[str, type], records: Collection[str]
) -> tuple[dict[str, Any], dict[str, dict[str, NDArray[Any]]]]:
    """Return the texts and bytes of a message and its arrays by record, once the digest fits."""
    if set(content) != {name, *records}:
        raise MessageError(f"expected records {sorted({name, *records})}, got {shown(sorted(content))}")
    body = dict(record(content, name, ConfigRecord))
    if set(body) != {*kinds, "digest"}:
        raise MessageError(f"expected entries {sorted({*kinds, 'digest'})}, got {shown(sorted(body))}")
    for key, kind in kinds.items():
        typed(body[key], kind, key)
    seal, held = body.pop("digest"), {key: record(content, key, ArrayRecord) for key in records}
    arrays = {key: {part: _read(part, array) for part, array in held[key].items()} for key in records}
    try:
        fits = digest.of(_parts(body, held)) == seal
    except UnicodeEncodeError as error:
        raise MessageError(f"expected text, got {shown(error.object[:40])}") from error
    if not fits:
        raise MessageError("a part of the message was changed on its way: its digest does not fit")
    return body, arrays


def _parts(body: Mapping[str, Any], arrays: Mapping[str, ArrayRecord]) -> list[bytes]:
    parts: list[bytes] = []
    for key in sorted(body):
        parts += [key.encode(), body[key].encode() if isinstance(body[key], str) else body[key]]
    for key in sorted(arrays):
        parts += [f"{key} {name!a} {array.stype}".encode() for name, array in sorted(arrays[key].items())]
    return parts


def record(content: RecordDict, name: str, kind: type[Record]) -> Record:
    """Return one record; Flower's own views by kind build a new dictionary each time."""
    found = content[name]
    if not isinstance(found, kind):
        raise MessageError(f"expected record {name!r} to be a {kind.__name__}, got a {type(found).__name__}")
    return found


def parsed(text: str, names: Collection[str]) -> dict[str, Any]:
    """Return a header: a JSON object of exactly these names, no name twice, every number finite and of fewer
    than 20 digits."""
    if len(text) > MAX_HEADER:
        raise MessageError(f"expected a header of at most {MAX_HEADER} characters, got {len(text)}")
    try:
        header = json.loads(
            text, object_pairs_hook=_object, parse_int=_int, parse_float=_float, parse_constant=_float
        )
    except (json.JSONDecodeError, RecursionError) as error:
        raise MessageError(f"header cannot be read: {type(error).__name__} in {shown(text)}") from error
    if set(typed(header, dict, "header")) != set(names):
        raise MessageError(f"expected a header of {sorted(names)}, got {shown(sorted(header))}")
    return dict(header)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise MessageError(f"expected every name once, got {shown([name for name, _ in pairs])}")
    return out


def _int(text: str) -> int:
    if len(text) >= 20:
        raise MessageError(f"expected whole numbers of fewer than 20 digits, got {shown(text)}")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise MessageError(f"expected finite numbers, got {shown(text)}")
    return value


def typed(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:  # True is an int to isinstance
        raise MessageError(f"expected {shown(name)} of type {kind.__name__}, got {shown(value)}")
    return value


def number(value: Any, name: str) -> float:
    if type(value) not in (int, float):
        raise MessageError(f"expected {shown(name)} to be a number, got {shown(value)}")
    return float(value)


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: _array(values) for name, values in arrays.items()})


def _array(values: NDArray[Any]) -> Array:
    kind, data = values.dtype.name, np.ascontiguousarray(values, NUMBERS[values.dtype.name]).tobytes()
    return Array(kind, values.shape, _stype(kind, values.shape, data), data)


def _stype(kind: str, shape: tuple[int, ...], data: bytes) -> str:
    """Return how an array is stored: its format, and the digest of what it must be."""
    return f"{RAW} {digest.of([kind.encode(), str(shape).encode(), data]).hex()}"


def _read(name: str, array: Array) -> NDArray[Any]:
    """Return the array, read-only, not copied; refuse what is not plain numbers of the stated size."""
    kind, shape, data = array.dtype, array.shape, array.data
    if type(kind) is not str or kind not in NUMBERS:
        raise MessageError(f"array {shown(name)}: expected plain numbers, got {shown(kind)}")
    if type(shape) not in (tuple, list) or len(shape) > MAX_AXES:
        raise MessageError(f"array {shown(name)}: expected up to {MAX_AXES} axes, got {shown(shape)}")
    dtype, shape = NUMBERS[kind], tuple(shape)
    # A zero among the sizes must not let the others be anything: numpy multiplies them in 64 bits.
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(max(1, n) for n in shape) >= 2**56:
        raise MessageError(f"array {shown(name)}: expected sizes of axes, got {shown(shape)}")
    if type(data) is not bytes or len(data) != math.prod(shape) * dtype.itemsize:
        got = f"{len(data)} bytes" if type(data) is bytes else type(data).__name__
        raise MessageError(
            f"array {shown(name)}: expected {math.prod(shape) * dtype.itemsize} bytes for "
            f"{kind}{list(shape)}, got {got}"
        )
    if array.stype != _stype(kind, shape, data):
        raise MessageError(f"array {shown(name)} was changed on its way: {shown(array.stype)} does not fit")
    if dtype.kind == "b" and data.strip(b"\0\1"):
        raise MessageError(f"array {shown(name)}: expected bytes 0 and 1 as truth values")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
