"""A node tells and hears one story a step, whoever asks and in whatever order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedsim import seeds
from fedsim.engine import holder
from fedsim.engine.asked import Asked
from fedsim.engine.holder import Node
from fedsim.grads.flat import get_flat
from fedsim.secure_sum.conversation import STAGES
from fedsim.types import HolderReply, StepTask
from fedsim.validate import RunError
from tests.conftest import small

SHARES = ("preset=shares_dpsgd", "federation.nodes=1", "model.name=linear", "data.train_examples=100")


@pytest.fixture(scope="module")
def node() -> Node:
    return Node(small(*SHARES), 0, 0)


class Asker:
    """A server that keeps to the protocol, through one node that hosts all holders, until told otherwise."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.asked = Asked()
        self.parameters = get_flat(node.model).numpy()
        self.tasks: dict[tuple[int, str], StepTask] = {}
        self.replies: dict[tuple[int, str], HolderReply] = {}

    def answer(self, task: StepTask, parameters: np.ndarray[Any, Any] | None = None) -> HolderReply:
        at = self.parameters if parameters is None else parameters
        return holder.answer(self.node, task, at, self.asked)

    def step(self, step: int, stop_before: str = "") -> None:
        """Collect a step as the mechanism does; each stage's task and reply are kept."""
        from fedsim.engine.experiment import prepare

        mechanism = prepare(self.node.config).mechanism
        keys = mechanism.method.keys(seeds.derive(0, "run"), step)

        def ask(stage: str, arrays: dict[str, Any]) -> list[HolderReply]:
            if stage == stop_before and stage:
                raise StopIteration
            task = StepTask(step, 0, mechanism.sampling_rate, keys, stage, dict(arrays))
            self.tasks[step, stage] = task
            self.replies[step, stage] = self.answer(task)
            return [self.replies[step, stage]]

        try:
            mechanism.collect(mechanism.release(), {}, ask)  # type: ignore[arg-type]
        except StopIteration:
            return


def arrays_equal(a: HolderReply, b: HolderReply) -> bool:
    return a.arrays.keys() == b.arrays.keys() and all(
        np.array_equal(a.arrays[n], b.arrays[n]) and a.arrays[n].dtype == b.arrays[n].dtype for n in a.arrays
    )


def test_the_same_question_has_the_same_answer_in_any_wave_and_order(node: Node) -> None:
    server = Asker(node)
    server.step(0)
    assert [stage for _, stage in server.tasks] == list(STAGES)
    for stage in ("unmask", "advertise", "confirm", "", "share"):
        again = dataclasses.replace(server.tasks[0, stage], wave=3)
        assert arrays_equal(server.answer(again), server.replies[0, stage])
    server.step(1)
    server.step(5)
    assert not np.array_equal(server.replies[0, ""].arrays["masked"], server.replies[1, ""].arrays["masked"])


LIES: dict[str, tuple[str, Callable[[StepTask], StepTask], str]] = {
    "another holder has gone": (
        "unmask",
        lambda t: with_array(t, "arrived", gone(2)),
        "another array arrived",
    ),
    "another holder has gone, confirmed": (
        "confirm",
        lambda t: with_array(t, "arrived", gone(2)),
        "another array arrived",
    ),
    "fewer have shared": ("unmask", lambda t: with_array(t, "shared", gone(3)), "another array shared"),
    "other adverts": ("share", lambda t: with_array(t, "public", lambda a: a[::-1]), "another array public"),
    "a lower bound": ("", lambda t: with_array(t, "whole", lambda a: a + 1), "another array whole"),
    "less noise": ("", lambda t: with_array(t, "real", lambda a: a / 2), "another array real"),
    "another draw": ("", lambda t: with_key(t, "draw"), "another key draw"),
    "other views": ("", lambda t: with_key(t, "augment"), "another key augment"),
    "other masks": ("", lambda t: with_key(t, "holders"), "another key holders"),
    "more are drawn": ("", lambda t: dataclasses.replace(t, sampling_rate=1.0), "another sampling rate"),
}


def with_array(task: StepTask, name: str, change: Callable[[Any], Any]) -> StepTask:
    return dataclasses.replace(task, arrays={**task.arrays, name: change(task.arrays[name].copy())})


def with_key(task: StepTask, name: str) -> StepTask:
    return dataclasses.replace(task, keys={**task.keys, name: b"\7" * 32})


def gone(holder: int) -> Callable[[Any], Any]:
    def change(present: Any) -> Any:
        present[holder] = False
        return present

    return change


@pytest.mark.parametrize("lie", LIES)
def test_a_second_story_is_refused(lie: str, node: Node) -> None:
    stage, change, reason = LIES[lie]
    server = Asker(node)
    server.step(0)
    with pytest.raises(RunError, match=f"in step 0 it was told {reason} before"):
        server.answer(change(server.tasks[0, stage]))
    assert arrays_equal(server.answer(server.tasks[0, stage]), server.replies[0, stage])


@pytest.mark.parametrize("lie", ["fewer have shared", "less noise", "another draw", "other masks"])
def test_a_stage_that_contradicts_an_earlier_one_is_refused(lie: str, node: Node) -> None:
    """The reveal tells another story than the sum did, although it is the first reveal."""
    honest, server = Asker(node), Asker(node)
    honest.step(0)
    server.step(0, stop_before="unmask")
    with pytest.raises(RunError, match=f"in step 0 it was told {LIES[lie][2]} before"):
        server.answer(LIES[lie][1](honest.tasks[0, "unmask"]))
    assert arrays_equal(server.answer(honest.tasks[0, "unmask"]), honest.replies[0, "unmask"])


def test_other_parameters_under_the_same_masks_are_refused(node: Node) -> None:
    """The difference of two masked sums of one step would be that of the exact sums."""
    server = Asker(node)
    server.step(0)
    with pytest.raises(RunError, match="told another parameters before"):
        server.answer(server.tasks[0, ""], server.parameters + 1)


def test_stages_out_of_order_are_refused(node: Node) -> None:
    honest = Asker(node)
    honest.step(0)
    for stage in STAGES[1:]:
        server = Asker(node)
        with pytest.raises(RunError, match=f"stage {stage!r} of step 0 was asked for before"):
            server.answer(honest.tasks[0, stage])
    server = Asker(node)
    server.step(0, stop_before="confirm")
    with pytest.raises(RunError, match=r"'unmask' of step 0 was asked for before \['confirm'\]"):
        server.answer(honest.tasks[0, "unmask"])
    with pytest.raises(RunError, match="stage 'reveal' is not one of"):
        server.answer(dataclasses.replace(honest.tasks[0, ""], stage="reveal"))


def test_steps_go_up_and_never_share_a_key_of_the_holders(node: Node) -> None:
    server = Asker(node)
    server.step(3)
    server.step(4)
    with pytest.raises(RunError, match="it is at step 4 and was asked for step 3"):
        server.answer(server.tasks[3, "unmask"])
    with pytest.raises(RunError, match="key holders of step 4 came again in step 5"):
        server.answer(dataclasses.replace(server.tasks[4, "advertise"], step=5))
    with pytest.raises(RunError, match="'unmask' of step 5 was asked for before"):
        server.answer(with_key(dataclasses.replace(server.tasks[4, "unmask"], step=5), "holders"))


def test_another_configuration_is_refused(node: Node) -> None:
    server = Asker(node)
    server.step(0)
    other = Node(small(*SHARES, "strategy.options={on_shortfall: top_up}"), 0, 0)
    for task in (
        server.tasks[0, "unmask"],
        with_key(dataclasses.replace(server.tasks[0, ""], step=1), "holders"),
    ):
        with pytest.raises(RunError, match="configuration"):
            holder.answer(other, task, server.parameters, server.asked)


def test_an_answer_that_cannot_be_repeated_is_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums whose last bits change from call to call, under one mask, would show how they changed."""
    server = Asker(node)
    server.step(0)
    sums = Node.clipped_sums

    def other_bits(self: Node, *arguments: Any) -> Any:
        totals, together = sums(self, *arguments)
        return totals + 0.01, together

    monkeypatch.setattr(Node, "clipped_sums", other_bits)
    with pytest.raises(RunError, match="second answer to stage '' of step 0 differs from the first"):
        server.answer(server.tasks[0, ""])


def test_noise_of_a_holder_never_meets_two_sums() -> None:
    """local_dpsgd, where nobody is trusted: the same noise on sums at other parameters would cancel out."""
    node = Node(small("preset=local_dpsgd", "federation.nodes=1", "model.name=linear"), 0, 0)
    keys = node.method.keys(0, 0)
    task = StepTask(0, 0, 0.2, keys, "", {"noise_std of sum": np.array([0.5])})
    at, asked = get_flat(node.model).numpy(), Asked()
    first = holder.answer(node, task, at, asked)
    assert arrays_equal(holder.answer(node, task, at, asked), first)
    for changed, parameters in (
        (task, at + 1),
        (with_array(task, "noise_std of sum", lambda a: a * 0), at),
        (with_key(task, "draw"), at),
        (dataclasses.replace(task, step=1), at),
    ):
        with pytest.raises(RunError, match="node refused"):
            holder.answer(node, changed, parameters, asked)


def test_where_the_server_is_trusted_nothing_is_remembered() -> None:
    node = Node(small("federation.nodes=1", "model.name=linear"), 0, 0)
    at, asked = get_flat(node.model).numpy(), Asked()
    for step in (3, 1, 1):
        holder.answer(node, StepTask(step, 0, 0.2, node.method.keys(0, 0)), at + step, asked)
    assert asked == Asked()
