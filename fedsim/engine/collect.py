"""Asking all nodes for one stage of a step: in waves, with one retry, every reply checked."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import provenance
from fedsim.engine.experiment import Experiment
from fedsim.engine.replies import Expectation, judge
from fedsim.strategies.base import Release
from fedsim.types import HolderReply, StepTask, Transport
from fedsim.validate import RunError

_log = logging.getLogger(__name__)

_ON_PURPOSE = re.compile(r"^fedsim\.validate\.\w+: ", re.M)  # an error of ours says all that helps
NODE_WAIT_SECONDS = 120.0  # how long to wait when none of the nodes still owing a reply is online


class Collector:
    """Turns a stage into one accepted reply from every node, or a RunError that says why not.

    Args:
        experiment: whose strategy says what a valid reply is.
        transport: how nodes are reached.
        out: the run's folder, for the message that says how to resume.
    """

    def __init__(self, experiment: Experiment, transport: Transport, out: str) -> None:
        self._experiment = experiment
        self._transport = transport
        self._out = out
        self._step = 0
        self._parameters: NDArray[Any] = np.zeros(0)
        self._keys: dict[str, bytes] = {}
        self._release = experiment.mechanism.release()
        self.timing: dict[str, float] = {}

    def begin(self, step: int, keys: dict[str, bytes], parameters: NDArray[Any], release: Release) -> None:
        """Start a step: its keys, the parameters nodes work at (P,), its release, and the clock at zero."""
        self._step, self._keys, self._parameters, self._release = step, keys, parameters, release
        self.timing = {"ask": 0.0, "wait": 0.0, "transfer": 0.0, "compute": 0.0, "data": 0.0}

    def ask(self, stage: str, arrays: Mapping[str, NDArray[Any]]) -> list[HolderReply]:
        """Ask every node once, in as many waves as it takes; return the replies sorted by node.

        Raises:
            RunError: a node failed twice, its process died, or none was online for NODE_WAIT_SECONDS.
        """
        owing = set(range(self._experiment.config.federation.nodes))
        retried: set[int] = set()
        accepted: dict[int, HolderReply] = {}
        expect = self._expectation()
        wave = 0
        while owing:
            asked = self._able(owing)
            task = StepTask(
                self._step, wave, self._experiment.mechanism.sampling_rate, self._keys, stage, arrays
            )
            began = time.perf_counter()
            answers = self._transport.ask(dict.fromkeys(asked, task), self._parameters)
            spent = time.perf_counter() - began
            verdict = judge(task, asked, answers, expect)
            for node, failure in sorted(verdict.rejected.items()):
                if failure.fatal or node in retried:
                    again = "" if failure.fatal else " (asked twice)"
                    public_only = self._experiment.config.monitor.public_only
                    what = failure.kind if public_only else _cause(failure.reason)
                    if not public_only and what != failure.reason and not _ON_PURPOSE.search(failure.reason):
                        _log.error("node %d: %s", node, failure.reason)
                    raise RunError(
                        f"step {self._step}: node {node} failed{again}: {what} The run stopped before this "
                        f"step was released. Resume it with --resume --out {self._out}; where model, data or "
                        "settings must change, start a new run."
                    )
                retried.add(node)
            accepted |= verdict.accepted
            owing -= verdict.accepted.keys()
            self._note_time(spent, list(verdict.accepted.values()))
            wave += 1
        return [accepted[node] for node in sorted(accepted)]

    def _expectation(self) -> Expectation:
        experiment, mechanism, release = self._experiment, self._experiment.mechanism, self._release
        nodes, method = experiment.config.federation.nodes, mechanism.method
        return Expectation(
            code_hash=provenance.code_hash(*experiment.config.references()),
            holders_of_node=lambda node: experiment.partition.holders_of_node(node, nodes),
            arrays=lambda reply: mechanism.reply_arrays(release, reply),
            counted_at_most=lambda task, node: mechanism.counted_at_most(
                task,
                experiment.partition.holders_of_node(node, nodes),
                experiment.partition.blocks_of_node(node, nodes),
            ),
            norm_bounds=lambda reply: mechanism.norm_bounds(release, reply),
            problem_with=lambda reply: method.trust.problem_with(method.at, reply),
        )

    def _note_time(self, spent: float, replies: list[HolderReply]) -> None:
        """Split the time of one wave; nodes that compute at the same time count as the longest of them."""
        along = max if self._transport.parallel else sum
        compute = along([0.0, *(r.seconds.get("compute", 0.0) for r in replies)])
        transfer = along([0.0, *(r.seconds.get("transfer", 0.0) for r in replies)])
        self.timing["data"] += along([0.0, *(r.seconds.get("data", 0.0) for r in replies)])
        transfer += self._transport.packing_seconds
        self.timing["ask"] += spent
        self.timing["compute"] += compute
        self.timing["transfer"] += transfer
        self.timing["wait"] += max(0.0, spent - compute - transfer)

    def _able(self, owing: set[int]) -> list[int]:
        """Return the nodes to ask in this wave: online, still owing a reply, at most nodes_per_wave."""
        deadline = time.monotonic() + NODE_WAIT_SECONDS
        while not (able := sorted(owing.intersection(self._transport.online()))):
            if time.monotonic() > deadline:
                raise RunError(
                    f"nodes {sorted(owing)} were offline for {NODE_WAIT_SECONDS:.0f} s. Start them and "
                    f"resume with --resume --out {self._out}."
                )
            time.sleep(0.2)
        return able[: self._experiment.config.federation.nodes_per_wave]


def _cause(reason: str) -> str:
    """What a node's failure comes down to: of a traceback what was raised, without the way there."""
    lines = reason.strip().splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith('  File "')]
    raised = [i for i in range(places[-1] if places else len(lines), len(lines)) if lines[i][:1].strip()]
    if raised:  # whatever stands below the last place that is named, without its code
        lines = lines[raised[0] :]
        lines[0] = re.sub(r"^(\w+\.)+(?=\w+: )", "", lines[0])
    text = "\n".join(lines)
    return text if text.endswith(".") else f"{text}."
