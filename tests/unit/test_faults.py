"""Replies that must never reach the sum: each is refused, the run stops with the cause and can be resumed."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message

from fedsim import loading, seeds
from fedsim.engine.collect import Collector
from fedsim.engine.experiment import prepare
from fedsim.engine.replies import Expectation, judge
from fedsim.engine.run_folder import RunFolder
from fedsim.engine.setup import setup_of
from fedsim.flower import wire
from fedsim.flower.client_app import app
from fedsim.flower.local_grid import LocalGrid
from fedsim.flower.server_app import train as train_on
from fedsim.flower.transport import GridTransport
from fedsim.grads.flat import get_flat
from fedsim.method import Method
from fedsim.privacy import ledger
from fedsim.types import HolderReply, StepTask
from fedsim.validate import RunError
from tests.conftest import final, small, train
from tests.strategies import methods

FAULTY_STEP = 3


def spoiled(change: Callable[[HolderReply], HolderReply]) -> Callable[..., Message]:
    """A ClientApp whose node 0 sends changed replies from step FAULTY_STEP on."""

    def client(message: Message, context: Any) -> Message:
        answer = app(message, context)
        if message.metadata.message_type != "train":
            return answer
        reply = wire.unpack_reply(answer.content)
        if reply.node != 0 or reply.step < FAULTY_STEP:
            return answer
        return Message(wire.pack_reply(change(reply)), reply_to=message)

    return client


def with_sum(reply: HolderReply, array: np.ndarray[Any, Any]) -> HolderReply:
    return dataclasses.replace(reply, arrays={"sum": array})


def nan(reply: HolderReply) -> HolderReply:
    array = reply.arrays["sum"].copy()
    array[7] = np.nan
    return with_sum(reply, array)


FAULTS: dict[str, tuple[Callable[[HolderReply], HolderReply], str]] = {
    "NaN": (nan, "NaN or infinite"),
    "wrong shape": (lambda r: with_sum(r, r.arrays["sum"][:-1]), "expected float32"),
    "wrong dtype": (lambda r: with_sum(r, r.arrays["sum"].astype(np.float64)), "expected float32"),
    "integers": (lambda r: with_sum(r, r.arrays["sum"].astype(np.int64)), "expected float32"),
    "not clipped": (lambda r: with_sum(r, r.arrays["sum"] * 1000), "not clipped"),
    "wrong step": (lambda r: dataclasses.replace(r, step=r.step - 1), "reply is for step 2"),
    "wrong wave": (lambda r: dataclasses.replace(r, wave=r.wave + 1), "wave"),
    "other holders": (lambda r: dataclasses.replace(r, holders=r.holders[:-1]), "holders"),
    "other node": (lambda r: dataclasses.replace(r, node=1), "claims to be of node 1"),
    "other code": (lambda r: dataclasses.replace(r, code_hash="0" * 16), "runs code"),
    "other array": (lambda r: dataclasses.replace(r, arrays={"mean": r.arrays["sum"]}), "arrays"),
    "negative count": (lambda r: dataclasses.replace(r, count=-1), "counts -1"),
    "count that sets its own bound": (
        lambda r: dataclasses.replace(with_sum(r, r.arrays["sum"] * 1e6), count=10**18),
        "counts 1000000000000000000 examples or holders, expected 0 to",
    ),
}


def of_statistics(**changes: Any) -> Callable[[HolderReply], HolderReply]:
    return lambda r: dataclasses.replace(r, statistics={**r.statistics, **changes})


def of_seconds(**changes: float) -> Callable[[HolderReply], HolderReply]:
    return lambda r: dataclasses.replace(r, seconds={**r.seconds, **changes})


def without(name: str) -> Callable[[HolderReply], HolderReply]:
    def change(reply: HolderReply) -> HolderReply:
        return dataclasses.replace(
            reply,
            statistics={n: v for n, v in reply.statistics.items() if n != name},
            seconds={n: v for n, v in reply.seconds.items() if n != name},
        )

    return change


def of_histogram(change: Callable[[list[float]], list[float]]) -> Callable[[HolderReply], HolderReply]:
    def changed(reply: HolderReply) -> HolderReply:
        held = reply.statistics["norm_histogram"]
        assert isinstance(held, list)
        return of_statistics(norm_histogram=change(held))(reply)

    return changed


@functools.cache
def honest() -> tuple[StepTask, HolderReply, Expectation]:
    """A task, its honest reply from one of two nodes, and what the server expects."""
    prepared = prepare(small())
    transport = GridTransport(LocalGrid(app, 2), setup_of(prepared.config), 2)
    transport.connect()
    collector = Collector(prepared, transport, "")
    mechanism = prepared.mechanism
    keys = mechanism.method.keys(seeds.derive(0, "run"), 0)
    collector.begin(0, keys, get_flat(prepared.model).numpy(), mechanism.release())
    reply = collector.ask("", {})[0]
    task = StepTask(0, 0, mechanism.sampling_rate, keys)
    return task, reply, collector._expectation()


# What only a node that makes its own replies can send: judged before anything of the reply is used.
FIELDS: dict[str, tuple[Callable[[HolderReply], HolderReply], str]] = {
    "count of 10^30": (lambda r: dataclasses.replace(r, count=10**30), r"counts 1000\d+ examples"),
    "one more than drawn": (
        lambda r: dataclasses.replace(r, count=r.count + 1),
        r"expected 0 to \d+, those drawn",
    ),
    "count is a truth value": (lambda r: dataclasses.replace(r, count=True), "counts True"),
    "count is a float": (lambda r: dataclasses.replace(r, count=3.0), r"counts 3\.0"),  # type: ignore[arg-type]
    "count is infinite": (lambda r: dataclasses.replace(r, count=math.inf), "counts inf"),  # type: ignore[arg-type]
    "fewer than its statistics": (lambda r: dataclasses.replace(r, count=r.count - 1), "not those of"),
    "unknown statistic": (of_statistics(more=1.0), "statistics are .*'more'"),
    "missing statistic": (without("clipped"), "statistics are"),
    "list for a number": (of_statistics(loss_sum=[1.0]), "expected one numbers"),
    "number for a list": (of_statistics(norm_histogram=1.0), "expected 56 numbers"),
    "short list": (of_histogram(lambda h: h[1:]), "expected 56 numbers"),
    "long list": (of_histogram(lambda h: [*h, 0.0]), "expected 56 numbers"),
    "text": (of_statistics(norm_sum="1"), "something else than finite numbers"),
    "truth value": (of_statistics(norm_sum=True), "something else than finite numbers"),
    "NaN loss": (of_statistics(loss_sum=math.nan), "something else than finite numbers"),
    "infinite in a list": (of_histogram(lambda h: [math.inf, *h[1:]]), "something else than finite"),
    "negative norms": (of_statistics(norm_sum=-1.0), "'norm_sum' is negative"),
    "negative in a list": (of_histogram(lambda h: [-1.0, h[0] + h[1] + 1, *h[2:]]), "is negative"),
    "half an example": (of_histogram(lambda h: [0.5, *h[1:-1], h[-1] - 0.5 + 1]), "whole numbers"),
    "more clipped than there": (of_statistics(clipped=1e9), "not those of"),
    "more examples than counted": (of_histogram(lambda h: [h[0] + 1, *h[1:]]), "not those of"),
    "all without a norm": (of_statistics(non_finite=1e12), "not those of"),
    "unknown time": (of_seconds(more=1.0), "seconds are"),
    "missing time": (without("transfer"), "seconds are"),
    "NaN time": (of_seconds(compute=math.nan), "something else than finite numbers"),
    "negative time": (of_seconds(transfer=-1.0), "'transfer' is negative"),
}


def test_an_honest_reply_is_accepted() -> None:
    task, reply, expect = honest()
    assert judge(task, [reply.node], [reply], expect).accepted == {reply.node: reply}
    assert reply.count > 10


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_reply_is_judged(field: str) -> None:
    """Another transport than Flower may hand over values of any type."""
    task, reply, expect = honest()
    change, message = FIELDS[field]
    verdict = judge(task, [reply.node], [change(reply)], expect)
    assert not verdict.accepted
    assert re.search(message, verdict.rejected[reply.node].reason), verdict.rejected[reply.node].reason


def test_a_count_is_at_most_what_the_step_draws_for_every_strategy() -> None:
    """The bound is met: what a node may count is what it counts when all of its holders are there."""
    counted: dict[str, int] = {}
    for name in methods.ALL:
        private = Method.of(loading.load(f"smoke/{name}")).private
        plain = [] if private else ["privacy.noise_multiplier=null", "privacy.clip_norm=1.0"]
        for options in ([], ["strategy.options={local_steps: 3}"] if name == "local_dpsgd" else []):
            prepared = prepare(small(f"preset={name}", *plain, *options, "train.steps=3"))
            mechanism = prepared.mechanism
            transport = GridTransport(LocalGrid(app, 2), setup_of(prepared.config), 2)
            transport.connect()
            collector = Collector(prepared, transport, "")
            release, state = mechanism.release(), mechanism.method.at.query.state(prepared.config)
            for step in range(3):
                keys = mechanism.method.keys(seeds.derive(0, "run"), step)
                collector.begin(step, keys, get_flat(prepared.model).numpy(), release)
                replies = mechanism.collect(release, state, collector.ask).replies
                expect = collector._expectation()
                task = StepTask(step, 0, mechanism.sampling_rate, keys)
                counts = [expect.counted_at_most(task, reply.node) for reply in replies]
                assert counts == [reply.count for reply in replies], name
                counted[name] = counted.get(name, 0) + sum(counts)
    assert all(counted.values()), "somebody was drawn under every method"


@pytest.mark.parametrize("below", [-1.0, 0.5, 1e30, math.nan])
def test_a_count_of_updates_below_the_clip_norm_is_judged(below: float, tmp_path: Path) -> None:
    def change(reply: HolderReply) -> HolderReply:
        return dataclasses.replace(reply, arrays={**reply.arrays, "below": np.array([below])})

    config = small("preset=dp_fedavg", "query.options={target_quantile: 0.5, count_noise: 2}")
    with pytest.raises(RunError, match=r"below the clip norm|NaN or infinite"):
        train(config, tmp_path, client=spoiled(change))
    assert ledger.read(tmp_path / "ledger.jsonl").steps == FAULTY_STEP


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_reply_stops_the_run_which_then_resumes_exactly(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(RunError, match=message) as caught:
        train(small(), tmp_path / "a", client=spoiled(change))
    assert caught.value.exit_code == 3
    assert f"step {FAULTY_STEP}" in str(caught.value)
    assert "--resume" in str(caught.value)
    train(small(), tmp_path / "a", resume=True)
    train(small(), tmp_path / "b")
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))


class BadGrid(LocalGrid):
    """A grid that changes the list of answers to train messages."""

    def __init__(self, nodes: int, change: Callable[[list[Message]], list[Message]]) -> None:
        super().__init__(app, nodes)
        self.change = change

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent = list(messages)
        answers = list(super().send_and_receive(sent, timeout=timeout))
        return self.change(answers) if sent[0].metadata.message_type == "train" else answers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answers: [a for a in answers if a.metadata.src_node_id != LocalGrid.FIRST_ID], "no reply"),
        (lambda answers: [*answers, answers[0]], "more than one reply"),
        (lambda answers: [], "no reply"),
    ],
)
def test_missing_and_duplicate_replies(
    change: Callable[[list[Message]], list[Message]], message: str, tmp_path: Path
) -> None:
    config = small()
    with pytest.raises(RunError, match=message):
        train_on(BadGrid(2, change), prepare(config), RunFolder(tmp_path), False)


def test_a_dead_process_is_not_asked_again(tmp_path: Path) -> None:
    config, asked = small(), []

    def change(answers: list[Message]) -> list[Message]:
        asked.append(len(answers))
        reply = Message(Error(code=0, reason="ActorDiedError: the worker died"), reply_to=answers[1])
        reply.metadata.__dict__["_src_node_id"] = answers[1].metadata.src_node_id
        return [answers[0], reply]

    with pytest.raises(RunError, match="ActorDiedError"):
        train_on(BadGrid(2, change), prepare(config), RunFolder(tmp_path), False)
    assert asked == [2]


def test_replies_are_added_in_node_order_whatever_order_they_come_in(tmp_path: Path) -> None:
    config = small("federation.nodes=5")
    train_on(BadGrid(5, lambda a: a[::-1]), prepare(config), RunFolder(tmp_path / "a"), False)
    train(config, tmp_path / "b")
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))


def test_one_message_a_node_for_ten_thousand_holders(tmp_path: Path) -> None:
    sent: list[int] = []

    def count(answers: list[Message]) -> list[Message]:
        sent.append(len(answers))
        return answers

    config = small(
        "data.train_examples=10000", "federation.holders=10000", "train.steps=2", "model.name=linear"
    )
    train_on(BadGrid(2, count), prepare(config), RunFolder(tmp_path), False)
    assert sent == [2, 2]
