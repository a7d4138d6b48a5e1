"""What the server accepts: exactly one valid reply from every node that was asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.types import HolderReply, NodeFailure, StepTask

BLOCK = 1 << 13  # entries; more would make BLAS wake other threads
ROUNDING = 1e-3  # relative slack on the norm bound for sums of many float32 terms


@dataclass(frozen=True)
class Expectation:
    """What a valid reply to any task of the run looks like."""

    code_hash: str
    holders_of_node: Callable[[int], NDArray[np.int64]]
    arrays: Callable[[HolderReply], dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]]
    norm_bound: Callable[[HolderReply], float]


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
    would poison it, so step, wave, node, holders, code, names, shapes, dtypes, finiteness and the norm
    bound are all checked.
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
    if reply.count < 0:
        return f"reply counts {reply.count} examples"
    bound = expect.norm_bound(reply)
    norm = norms.get("sum", 0.0)
    if norm > bound * (1 + ROUNDING):
        return f"sum has norm {norm:.6g}, above {bound:.6g} = count x sensitivity: it was not clipped"
    return ""


def _norm(array: NDArray[Any]) -> float:
    """L2 norm in float64; not finite exactly if an entry is not. In blocks that stay in cache."""
    flat = array.reshape(-1)
    squares = 0.0
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK].astype(np.float64, copy=False)
        squares += float(block.dot(block))
    return math.sqrt(squares)
