"""What the server accepts: exactly one valid reply from every node that was asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.engine.contributions import STATISTICS
from fedsim.engine.holder import SECONDS
from fedsim.types import HolderReply, NodeFailure, StepTask

BLOCK = 1 << 13  # entries; more would make BLAS wake other threads
ROUNDING = 1e-3  # relative slack on the norm bound for sums of many float32 terms


@dataclass(frozen=True)
class Expectation:
    """What a valid reply to any task of the run looks like."""

    code_hash: str
    holders_of_node: Callable[[int], NDArray[np.int64]]
    arrays: Callable[[HolderReply], dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]]
    counted_at_most: Callable[[StepTask, int], int]
    norm_bounds: Callable[[HolderReply], Mapping[str, float]]
    problem_with: Callable[[HolderReply], str]


@dataclass(frozen=True)
class Judgement:
    """Accepted replies by node, and for each other node why it has none."""

    accepted: dict[int, HolderReply]
    rejected: dict[int, NodeFailure]


def judge(
    task: StepTask,
    asked: Collection[int],
    answers: Sequence[HolderReply | NodeFailure],
    expect: Expectation,
) -> Judgement:
    """Sort answers into accepted and rejected; every asked node is in exactly one of the two.

    A sum that misses a node or counts one twice is not the mechanism that is accounted, and one bad number
    would poison it, so every field is checked: step, wave, node, holders and code; names, shapes, dtypes and
    finiteness of arrays; the count against what the step's draw includes, and the norm against the count;
    names, lengths, finiteness and signs of statistics and times.
    """
    accepted: dict[int, HolderReply] = {}
    rejected: dict[int, NodeFailure] = {}
    for answer in answers:
        if answer.node not in asked:
            continue  # late or foreign: nobody waits for it
        if isinstance(answer, NodeFailure):
            rejected[answer.node] = answer
        elif answer.node in accepted or answer.node in rejected:
            accepted.pop(answer.node, None)
            rejected[answer.node] = NodeFailure(answer.node, "more than one reply for the same task", False)
        elif problem := _problem(task, answer, expect):
            rejected[answer.node] = NodeFailure(answer.node, problem, False)
        else:
            accepted[answer.node] = answer
    for node in asked:
        if node not in accepted and node not in rejected:
            rejected[node] = NodeFailure(node, "no reply", False, "no reply")
    return Judgement(accepted, rejected)


def _problem(task: StepTask, reply: HolderReply, expect: Expectation) -> str:
    if (reply.step, reply.stage, reply.wave) != (task.step, task.stage, task.wave):
        return (
            f"reply is for step {reply.step} stage '{reply.stage}' wave {reply.wave}, "
            f"expected {task.step} '{task.stage}' {task.wave}"
        )
    if reply.code_hash != expect.code_hash:
        return (
            f"node runs code {reply.code_hash}, server runs {expect.code_hash}: start both from one checkout"
        )
    if not np.array_equal(reply.holders, expect.holders_of_node(reply.node)):
        return f"reply stands for {len(reply.holders)} holders that are not those of node {reply.node}"
    wanted = expect.arrays(reply)
    if set(reply.arrays) != set(wanted):
        return f"reply holds arrays {sorted(reply.arrays)}, expected {sorted(wanted)}"
    norms: dict[str, float] = {}
    for name, (shape, dtype) in wanted.items():
        array = reply.arrays[name]
        if array.shape != shape or array.dtype != dtype:
            return f"array '{name}' is {array.dtype}{list(array.shape)}, expected {dtype}{list(shape)}"
        if np.issubdtype(dtype, np.floating):
            norms[name] = _norm(array)
            if not math.isfinite(norms[name]):
                return f"array '{name}' holds NaN or infinite values"
    if problem := _problem_with_numbers(reply, expect.counted_at_most(task, reply.node)):
        return problem
    if problem := expect.problem_with(reply):
        return problem
    for name, bound in expect.norm_bounds(reply).items():
        if norms[name] > bound * (1 + ROUNDING):
            said = f"{name} has norm {norms[name]:.6g}, above {bound:.6g} = count x sensitivity"
            return f"{said}: it was not clipped"
    return ""


def _problem_with_numbers(reply: HolderReply, most: int) -> str:
    """Say what is wrong with the count, which sets the bound of the norm, the statistics or the times."""
    if type(reply.count) is not int or not 0 <= reply.count <= most:
        return (
            f"reply counts {reply.count!r} examples or holders, expected 0 to {most}, those drawn on the node"
        )
    for kind, held, wanted in (
        ("statistics", reply.statistics, STATISTICS),
        ("seconds", reply.seconds, dict.fromkeys(SECONDS, 0)),
    ):
        if set(held) != set(wanted):
            return f"{kind} are {sorted(held)}, expected {sorted(wanted)}"
        for name, length in wanted.items():
            value = held[name]
            values = value if isinstance(value, list) else [value]
            if isinstance(value, list) != (length > 0) or len(values) != max(1, length):
                return f"{kind} '{name}' is {value!r}, expected {length or 'one'} numbers"
            if not all(type(v) in (int, float) and math.isfinite(v) for v in values):
                return f"{kind} '{name}' holds something else than finite numbers"
            if name != "loss_sum" and min(values) < 0:
                return f"{kind} '{name}' is negative"
    counted = {
        name: np.asarray(reply.statistics[name])
        for name in ("clipped", "non_finite", "norm_histogram", "undecodable")
    }
    finite = reply.count - counted["non_finite"]
    if not all(np.all(values == np.floor(values)) for values in counted.values()):
        return f"statistics {sorted(counted)} are counts, expected whole numbers"
    if counted["norm_histogram"].sum() != finite or counted["clipped"] > finite:
        return f"statistics are not those of {reply.count} examples"
    return ""


def _norm(array: NDArray[Any]) -> float:
    """L2 norm in float64; not finite exactly if an entry is not. In blocks that stay in cache."""
    flat = array.reshape(-1)
    squares = 0.0
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK].astype(np.float64, copy=False)
        squares += float(block.dot(block))
    return math.sqrt(squares)
