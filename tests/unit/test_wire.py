"""Messages: what arrives is what was sent, or is refused with a reason; never another exception."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.engine.asked import Asked
from fedsim.flower import records, wire
from fedsim.flower.local_grid import LocalGrid
from fedsim.flower.records import MessageError
from fedsim.types import HolderReply, StepTask

KEYS = {"draw": b"a" * 32, "augment": b"c" * 32}
TASK = StepTask(3, 1, 0.25, KEYS, "unmask", {"s": np.arange(3, dtype=np.uint64)})
REPLY = HolderReply(
    step=2,
    wave=0,
    node=1,
    holders=np.arange(3, 9, dtype=np.int64),
    code_hash="abc",
    arrays={
        "sum": np.linspace(0, 1, 5, dtype=np.float32).reshape(1, 5),
        "ring": np.arange(3, dtype=np.uint64),
        "here": np.array([True, False]),
        "none": np.zeros((2, 0, 3), np.uint8),
    },
    count=11,
    statistics={"loss_sum": 2.5, "histogram": [1.0, 0.0, 3.0]},
    seconds={"compute": 0.5},
    stage="share",
)


def same(a: HolderReply, b: HolderReply) -> bool:
    names = ("step", "wave", "stage", "node", "code_hash", "count", "statistics", "seconds")
    held = [{n: (v.dtype, v.shape, v.tobytes()) for n, v in reply.arrays.items()} for reply in (a, b)]
    fields = all(getattr(a, name) == getattr(b, name) for name in names)
    return fields and np.array_equal(a.holders, b.holders) and held[0] == held[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_task_round_trip(dtype: type) -> None:
    parameters = np.linspace(0, 1, 17).astype(dtype)
    got, flat, text = wire.unpack_task(wire.pack_task(TASK, wire.pack_parameters(parameters), "{}"))
    for name in ("step", "wave", "sampling_rate", "keys", "stage"):
        assert getattr(got, name) == getattr(TASK, name)
    assert np.array_equal(got.arrays["s"], TASK.arrays["s"])
    assert text == "{}"
    assert flat.dtype == dtype
    assert np.array_equal(flat, parameters)


def test_reply_round_trip() -> None:
    assert same(wire.unpack_reply(wire.pack_reply(REPLY)), REPLY)
    LocalGrid(lambda m, c: m, 1)
    empty = HolderReply(0, 0, 0, np.zeros(0, np.int64), "", {"sum": np.zeros(0, np.float32)}, 0, {}, {})
    assert same(wire.unpack_reply(wire.pack_reply(empty)), empty)


def test_memory_of_a_node_round_trip() -> None:
    state = RecordDict()
    assert wire.unpack_asked(state) == Asked()
    asked = Asked(4, {"key draw": b"a" * 32, "parameters": b"b" * 32}, {"": b"c" * 32})
    state[wire.ASKED] = wire.pack_asked(asked)
    assert wire.unpack_asked(state) == asked


def test_objects_are_not_packed() -> None:
    for values in (np.array([{}]), np.array(["a"]), np.array([1j]), np.array([1.0], np.float16)):
        with pytest.raises(KeyError):
            wire.pack_parameters(values)


def forged(header: str | bytes | None = None, **changes: Any) -> RecordDict:
    """A reply that somebody else made: another header, or other arrays, under a digest that fits."""
    honest = wire.pack_reply(REPLY)
    body: Any = dict(honest[wire.REPLY])
    body.pop("digest")
    body["header"] = body["header"] if header is None else header
    other = {name: value for name, value in changes.items() if isinstance(value, Array)}
    body |= {name: value for name, value in changes.items() if name not in other}
    arrays: Any = wire.pack_reply(REPLY)[wire.ARRAYS]
    for name, value in other.items():
        arrays[name] = value
    return records.sealed(wire.REPLY, body, {wire.ARRAYS: arrays})


def array(kind: str, shape: Any, data: bytes, stype: str | None = None) -> Array:
    """An array that somebody else made, under a digest that fits."""
    out = Array(kind, (), records._stype(kind, shape, data) if stype is None else stype, data)
    out.shape = shape  # which Flower's own constructor looks at
    return out


def with_entry(**changes: Any) -> str:
    header = json.loads(wire.pack_reply(REPLY)[wire.REPLY]["header"])  # type: ignore[index]
    return json.dumps({**header, **changes})


DEEP, LONG = "[" * 100_000 + "]" * 100_000, "9" * 400
RAW_HEADERS: dict[str, tuple[str, str]] = {
    "nested 100,000 deep": (f'{{"step": {DEEP}}}', "at most 65536 characters"),
    "nested 30,000 deep": ('{"step":' + "[" * 30_000 + "]" * 30_000 + "}", "RecursionError"),
    "an integer of 400 digits": (with_entry(count=0).replace('"count": 0', f'"count": {LONG}'), "20 digits"),
    "a negative of 400 digits": (with_entry(count=0).replace('"count": 0', f'"count": -{LONG}'), "20 digits"),
    "a time of 400 digits": (with_entry(seconds={"c": 7}).replace("7", LONG), "20 digits"),
    "a statistic of 400 digits": (with_entry(statistics={"c": 7}).replace("7", LONG), "20 digits"),
    "an exponent of 400 digits": (with_entry(seconds={"c": 0.5}).replace("0.5", f"1e{LONG}"), "finite"),
    "NaN": (with_entry(seconds={"c": float("nan")}), "finite numbers, got 'NaN'"),
    "Infinity": (with_entry(statistics={"c": [float("inf")]}), "finite numbers, got 'Infinity'"),
    "-Infinity": (with_entry(count=float("-inf")), "finite numbers, got '-Infinity'"),
    "1e999": (with_entry(seconds={"c": 0.5}).replace("0.5", "1e999"), "finite numbers, got '1e999'"),
    "a name twice": (with_entry().replace('"count": 11', '"count": 1, "count": 11'), "every name once"),
    "a name twice inside": (with_entry(seconds={"c": 1, "d": 2}).replace('"d"', '"c"'), "every name once"),
    "a name missing": (json.dumps({"step": 1}), "expected a header of"),
    "a name too many": (with_entry(extra=1), "expected a header of"),
    "no object": ("[1]", "expected 'header' of type dict"),
    "cut off": (with_entry()[:-9], "cannot be read"),
    "trailing text": (with_entry() + "{}", "cannot be read"),
    "no text": ("", "cannot be read"),
    "half a character": (with_entry(code_hash="x").replace("x", "\ud800"), "expected text"),
    "bytes": (b"\xff\xfe{}", "expected 'header' of type str"),  # type: ignore[dict-item]
}
ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "count true": ({"count": True}, "'count' of type int, got True"),
    "count 11.0": ({"count": 11.0}, "'count' of type int, got 11.0"),
    "count '11'": ({"count": "11"}, "'count' of type int"),
    "count null": ({"count": None}, "'count' of type int"),
    "step 1.5": ({"step": 1.5}, "'step' of type int"),
    "wave false": ({"wave": False}, "'wave' of type int"),
    "node null": ({"node": None}, "'node' of type int"),
    "stage 3": ({"stage": 3}, "'stage' of type str"),
    "code_hash list": ({"code_hash": ["a"]}, "'code_hash' of type str"),
    "statistics 3": ({"statistics": 3}, "'statistics' of type dict"),
    "statistics list": ({"statistics": [["loss_sum", 1]]}, "'statistics' of type dict"),
    "statistic text": ({"statistics": {"loss_sum": "many"}}, "'loss_sum' to be a number"),
    "statistic true": ({"statistics": {"loss_sum": True}}, "'loss_sum' to be a number"),
    "statistic nested": ({"statistics": {"loss_sum": [[1.0]]}}, "'loss_sum' to be a number"),
    "seconds null": ({"seconds": {"compute": None}}, "'compute' to be a number"),
    "seconds list": ({"seconds": {"compute": [1.0]}}, "'compute' to be a number"),
}
ZERO = records.pack_arrays({"zero": np.zeros(1, np.float32)})["zero"].stype
ARRAYS: dict[str, tuple[Array, str]] = {
    "object": (array("object", (1,), bytes(8)), "plain numbers, got 'object'"),
    "text": (array("<U2", (1,), bytes(8)), "plain numbers"),
    "complex": (array("complex64", (1,), bytes(8)), "plain numbers"),
    "other byte order": (array(">f4", (2,), bytes(8)), "plain numbers, got '>f4'"),
    "structure": (array("f4,f4", (1,), bytes(8)), "plain numbers"),
    "no dtype": (array("", (1,), bytes(8)), "plain numbers"),
    "long name": (array("f" * 10_000, (1,), bytes(8)), r"plain numbers.*\(10002 characters\)"),
    "half": (array("float16", (4,), bytes(8)), "plain numbers"),
    "negative size": (array("float32", (-1,), bytes(8)), "sizes of axes"),
    "two negative sizes": (array("float32", (-1, -2), bytes(8)), "sizes of axes"),
    "product overflows": (array("float32", (2**32, 2**32), bytes(8)), "sizes of axes"),
    "product wraps to the length": (array("uint8", (2**63, 2), b""), "sizes of axes"),
    "empty but huge": (array("float32", (0, 2**62), b""), "sizes of axes"),
    "many axes": (array("float32", (1,) * 65, bytes(4)), "axes"),
    "size is no number": (array("float32", (1.0, 2), bytes(8)), "sizes of axes"),
    "size is a truth value": (array("float32", (True, 2), bytes(8)), "sizes of axes"),
    "trailing bytes": (array("float32", (2,), bytes(9)), "expected 8 bytes"),
    "cut off": (array("float32", (2,), bytes(7)), "expected 8 bytes"),
    "truth value of 2": (array("bool", (3,), b"\0\2\1"), "truth values"),
    "other format": (array("float32", (1,), bytes(4), "numpy.ndarray"), "does not fit"),
    "changed on its way": (array("float32", (1,), b"\0\0\0\1", ZERO), "changed on its way"),
}


@pytest.mark.parametrize("case", RAW_HEADERS)
def test_a_header_that_cannot_be_read_is_refused(case: str) -> None:
    text, reason = RAW_HEADERS[case]
    try:
        content = forged(text)
    except UnicodeEncodeError:  # not even a forger can digest half a character
        content = wire.pack_reply(REPLY)
        content[wire.REPLY]["header"] = text  # type: ignore[index, assignment]
    with pytest.raises(MessageError, match=reason) as caught:
        wire.unpack_reply(content)
    str(caught.value).encode("ascii")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("case", ENTRIES)
def test_a_header_of_wrong_types_is_refused(case: str) -> None:
    change, reason = ENTRIES[case]
    with pytest.raises(MessageError, match=reason):
        wire.unpack_reply(forged(with_entry(**change)))


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_that_is_not_plain_numbers_of_its_size_is_refused(case: str) -> None:
    bad, reason = ARRAYS[case]
    with pytest.raises(MessageError, match=reason):
        wire.unpack_reply(forged(sum=bad))
    content = wire.pack_task(TASK, wire.pack_parameters(np.zeros(2)), "{}")
    content[wire.ARRAYS]["s"] = bad  # type: ignore[index]
    with pytest.raises(MessageError, match=reason):
        wire.unpack_task(content)


def test_a_reply_of_other_records_is_refused() -> None:
    honest = wire.pack_reply(REPLY)
    for name, record in ((wire.REPLY, ArrayRecord()), (wire.ARRAYS, ConfigRecord())):
        less = RecordDict({n: r for n, r in honest.items() if n != name})
        with pytest.raises(MessageError, match="expected records"):
            wire.unpack_reply(less)
        with pytest.raises(MessageError, match=f"expected record '{name}' to be a"):
            wire.unpack_reply(RecordDict({**less, name: record}))
    with pytest.raises(MessageError, match="expected records"):
        wire.unpack_reply(RecordDict({**honest, "more": ConfigRecord()}))
    with pytest.raises(MessageError, match="expected entries"):
        wire.unpack_reply(forged(more="x"))
    with pytest.raises(MessageError, match="holders of 8 bytes each, got 3"):
        wire.unpack_reply(forged(holders=b"123"))
    with pytest.raises(MessageError, match="'holders' of type bytes"):
        wire.unpack_reply(forged(holders="123"))
    for seal in (b"", bytes(32), "text", 3, [b"x"]):
        content = wire.pack_reply(REPLY)
        content[wire.REPLY]["digest"] = seal  # type: ignore[index]
        with pytest.raises(MessageError, match="digest does not fit"):
            wire.unpack_reply(content)


def test_a_task_of_wrong_parts_is_refused() -> None:
    def task(**changes: Any) -> RecordDict:
        parameters = changes.pop("parameters", {"flat": np.zeros(2)})
        header = {"step": 1, "wave": 0, "sampling_rate": 0.5, "keys": {}, "stage": ""} | changes
        held = {wire.PARAMETERS: records.pack_arrays(parameters), wire.ARRAYS: records.pack_arrays({})}
        return records.sealed(wire.TASK, {"config": "{}", "header": json.dumps(header)}, held)

    wire.unpack_task(task())
    for changes, reason in (
        ({"keys": {"draw": "00"}}, "32 bytes, got 1"),
        ({"keys": {"draw": "xy"}}, "hexadecimal"),
        ({"keys": {"draw": 3}}, "'draw' of type str"),
        ({"keys": []}, "'keys' of type dict"),
        ({"step": True}, "'step' of type int"),
        ({"sampling_rate": "1"}, "to be a number"),
        ({"parameters": {"flat": np.zeros(1), "more": np.zeros(1)}}, "one array 'flat'"),
        ({"parameters": {}}, "one array 'flat'"),
    ):
        with pytest.raises(MessageError, match=reason):
            wire.unpack_task(task(**changes))


def test_an_identity_of_wrong_parts_is_refused() -> None:
    def identity(**body: Any) -> RecordDict:
        return RecordDict({wire.IDENTITY: ConfigRecord(body)})

    assert wire.unpack_identity(identity(node=3, code_hash="abc")) == (3, "abc")
    for content in (
        *(RecordDict(), RecordDict({wire.IDENTITY: ArrayRecord()}), identity(node=3)),
        *(
            identity(node="3", code_hash="a"),
            identity(node=True, code_hash="a"),
            identity(node=1, code_hash=b"a"),
        ),
    ):
        with pytest.raises(MessageError):
            wire.unpack_identity(content)


def flip(data: bytes, place: int) -> bytes:
    out = bytearray(data)
    out[place // 8 % len(out)] ^= 1 << place % 8
    return bytes(out)


Put = Callable[[RecordDict, bytes], None]


def spoilable(content: RecordDict) -> list[tuple[str, bytes, Put]]:
    """Every part of a message as bytes, with how to put other bytes in its place."""
    out: list[tuple[str, bytes, Put]] = []
    for name, record in content.items():
        for key in record:
            value: Any = record[key]
            if isinstance(record, ConfigRecord):
                out.append((key, _bytes(value), functools.partial(_put, name, key, "")))
                continue
            for field in ("dtype", "stype", "data"):
                part = _bytes(getattr(value, field))
                out.append((f"{key} {field}", part, functools.partial(_put, name, key, field)))
    return [entry for entry in out if entry[1]]


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _put(name: str, key: str, field: str, content: RecordDict, data: bytes) -> None:
    record: Any = content[name]
    old = record[key]
    was = getattr(old, field) if field else old
    new = data.decode("utf-8", "surrogateescape") if isinstance(was, str) else data
    if field:
        parts = {f: getattr(old, f) for f in ("dtype", "shape", "stype", "data")} | {field: new}
        record[key] = Array(*parts.values())
    else:
        record[key] = new


def test_every_flipped_bit_of_a_reply_is_noticed() -> None:
    """All bits of all parts, one at a time: never another reply, never another exception."""
    parts = spoilable(wire.pack_reply(REPLY))
    assert len(parts) > 8
    unnoticed = []
    for place, (name, data, _) in enumerate(parts):
        for bit in range(8 * len(data)):
            content = wire.pack_reply(REPLY)
            parts[place][2](content, flip(data, bit))
            with contextlib.suppress(MessageError):
                wire.unpack_reply(content)
                unnoticed.append((name, bit))
    assert not unnoticed


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_messages_are_refused_or_unharmed(data: st.DataObject) -> None:
    """Parts cut off, lengthened, exchanged, filled with noise: the exact message or a MessageError."""
    task_too = data.draw(st.booleans())
    pack = (
        (lambda: wire.pack_task(TASK, wire.pack_parameters(np.arange(4.0)), "{}"))
        if task_too
        else (lambda: wire.pack_reply(REPLY))
    )
    content = pack()
    parts = spoilable(content)
    for _ in range(data.draw(st.integers(1, 3))):
        _, old, put = data.draw(st.sampled_from(parts))
        other = data.draw(st.sampled_from(parts))[1]
        new = data.draw(
            st.one_of(
                st.binary(max_size=80),
                st.integers(0, len(old)).map(lambda n, old=old: old[:n]),
                st.binary(min_size=1, max_size=9).map(lambda more, old=old: old + more),
                st.integers(0, 8 * len(old) - 1).map(lambda place, old=old: flip(old, place)),
                st.just(other),
            )
        )
        put(content, new)
    with contextlib.suppress(MessageError):
        if task_too:
            got, flat, text = wire.unpack_task(content)
            assert (got.step, got.keys, text) == (TASK.step, TASK.keys, "{}")
            assert np.array_equal(flat, np.arange(4.0))
            assert np.array_equal(got.arrays["s"], TASK.arrays["s"])
        else:
            assert same(wire.unpack_reply(content), REPLY)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
NAMES = ("step", "wave", "stage", "node", "count", "code_hash", "statistics", "seconds")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3) | JSON)
def test_headers_of_any_content_give_right_types_or_are_refused(change: Any) -> None:
    """Made by somebody who knows the format, digest included."""
    entries = isinstance(change, dict) and set(change) <= set(NAMES)
    text = with_entry(**change) if entries else json.dumps(change)
    with contextlib.suppress(MessageError):
        got = wire.unpack_reply(forged(text))
        assert entries
        for name in ("step", "wave", "node", "count"):
            assert type(getattr(got, name)) is int
            assert abs(getattr(got, name)) < 10**19
        assert type(got.stage) is type(got.code_hash) is str
        for held in (got.statistics, got.seconds):
            for value in held.values():
                assert all(
                    type(v) is float and np.isfinite(v)
                    for v in (value if isinstance(value, list) else [value])
                )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from([*records.NUMBERS, "object", ">f8", "V8", "O", "datetime64[s]", "float16", "é"]),
    st.lists(st.integers(-3, 5) | st.integers(2**31, 2**65), max_size=9),
    st.binary(max_size=64),
)
def test_arrays_of_any_content_are_numbers_of_their_size_or_refused(
    kind: str, shape: list[int], data: bytes
) -> None:
    with contextlib.suppress(MessageError):
        got = wire.unpack_reply(forged(sum=array(kind, tuple(shape), data))).arrays["sum"]
        assert got.dtype == records.NUMBERS[kind]
        assert got.shape == tuple(shape)
        assert got.tobytes() == data
