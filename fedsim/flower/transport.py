"""The engine's Transport over any Flower Grid: simulation, deployment or in-process."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedsim import provenance
from fedsim.flower import wire
from fedsim.flower.records import MessageError, shown
from fedsim.types import HolderReply, NodeFailure, StepTask
from fedsim.validate import RunError

CONNECT_SECONDS = 180.0
PROCESS_DIED = {0, 8}  # Flower error codes UNKNOWN (a dead Ray actor) and CRASHED: asking again hits it again


class GridTransport:
    """Sends tasks as train messages, one a node and wave, and turns answers into replies or failures.

    Args:
        grid: any Flower Grid.
        config_json: the configuration nodes build themselves from.
        nodes: how many nodes to wait for.
        timeout: seconds to wait for the answers of one wave.
    """

    def __init__(self, grid: Grid, config_json: str, nodes: int, timeout: float = 3600.0) -> None:
        self._grid = grid
        self._config_json = config_json
        self._nodes = nodes
        self._timeout = timeout
        self._id_of: dict[int, int] = {}
        self.packing_seconds = 0.0
        self.parallel = bool(getattr(grid, "parallel", True))
        if hasattr(grid, "pull_interval"):
            grid.pull_interval = 0.005  # Flower's own 0.1 s is a floor under every step

    def connect(self) -> list[int]:
        """Wait until all nodes are there, learn which is which, and check that they run this code.

        Raises:
            RunError: nodes missing, failing, answering twice for one index, or running other code.
        """
        deadline = time.monotonic() + CONNECT_SECONDS
        while len(ids := sorted(self._grid.get_node_ids())) < self._nodes:
            if time.monotonic() > deadline:
                raise RunError(
                    f"expected {self._nodes} nodes, {len(ids)} came within {CONNECT_SECONDS:.0f} s. Start as "
                    f"many as federation.nodes: num-supernodes={self._nodes} of `flwr run`."
                )
            time.sleep(0.1)
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in ids]
        for answer in self._grid.send_and_receive(questions, timeout=CONNECT_SECONDS):
            if answer.has_error():
                raise RunError(f"a node failed to start: {answer.error.reason}")
            index, code = wire.unpack_identity(answer.content)
            if code != provenance.code_hash():
                raise RunError(
                    f"node {index} runs fedsim code {shown(code)}, the server "
                    f"{provenance.code_hash()}. Start the SuperLink outside any checkout, from one version."
                )
            if index in self._id_of:
                raise RunError(f"two nodes say they are node {index}: give each a partition-id of its own.")
            self._id_of[index] = answer.metadata.src_node_id
        if sorted(self._id_of) != list(range(self._nodes)):
            raise RunError(
                f"expected nodes 0 to {self._nodes - 1}, got {sorted(self._id_of)}: give every node its own "
                f"partition-id and set num-supernodes to federation.nodes = {self._nodes}."
            )
        return sorted(self._id_of)

    def online(self) -> list[int]:
        """Return the indices of connected nodes that Flower lists as available now."""
        listed = set(self._grid.get_node_ids())
        return [index for index, node in self._id_of.items() if node in listed]

    def ask(
        self, tasks: Mapping[int, StepTask], parameters: NDArray[np.generic]
    ) -> list[HolderReply | NodeFailure]:
        """Send each node its task and return what came back within the timeout."""
        began = time.perf_counter()
        index_of = {node: index for index, node in self._id_of.items()}
        record = wire.pack_parameters(parameters)
        messages = [
            Message(wire.pack_task(task, record, self._config_json), self._id_of[index], MessageType.TRAIN)
            for index, task in tasks.items()
        ]
        packed = time.perf_counter() - began
        answers = self._grid.send_and_receive(messages, timeout=self._timeout)
        began = time.perf_counter()
        out: list[HolderReply | NodeFailure] = []
        for answer in answers:
            index = index_of.get(answer.metadata.src_node_id, -1)
            if answer.has_error():
                code, reason = answer.error.code, answer.error.reason or "no reason given"
                out.append(
                    NodeFailure(
                        index,
                        f"{reason.strip()} (Flower error {code})",
                        code in PROCESS_DIED,
                        f"Flower error {code}",
                    )
                )
                continue
            try:
                reply = wire.unpack_reply(answer.content)
            except MessageError as error:
                out.append(NodeFailure(index, f"reply cannot be read: {error}", False))
                continue
            if reply.node != index:
                out.append(NodeFailure(index, f"reply claims to be of node {reply.node}", False))
            else:
                out.append(reply)
        self.packing_seconds = packed + time.perf_counter() - began
        return out
