"""What the rows of `benchmarks.rounds` share: small recipes, trivial clients, interleaved timing."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import loading, provenance
from fedsim.config import Config
from fedsim.engine import contributions
from fedsim.engine.experiment import Experiment
from fedsim.engine.server import Server
from fedsim.flower import wire
from fedsim.flower.client_app import app
from fedsim.types import ClippedSum, HolderReply

SEED = 0


def settings(holders: int, nodes: int, *more: str) -> Config:
    """A small DP-SGD recipe on the embedded data."""
    return loading.load(
        "base",
        [
            f"federation.holders={holders}",
            f"federation.nodes={nodes}",
            "federation.partition=iid",
            "privacy.noise_multiplier=1.0",
            "train.eval_every=100000",
            "train.checkpoint_every=100000",
            "monitor.tensorboard=false",
            "monitor.progress=false",
            f"seed={SEED}",
            *more,
        ],
    )


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, warm: int = 1
) -> dict[str, list[float]]:
    """Run every call `warm` + `repeats` times in turn; return CPU seconds a call after the warm rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warm + repeats):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if round_ >= warm:
                seconds[name].append(time.process_time() - began)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each row."""
    return {name: statistics.median(values) for name, values in seconds.items()}


class TrivialClient:
    """A ClientApp whose node does one vector operation for each holder it hosts."""

    def __init__(self, experiment: Experiment) -> None:
        self.nodes = experiment.config.federation.nodes
        self.partition = experiment.partition

    def __call__(self, message: Any, context: Any) -> Any:
        if message.metadata.message_type == "query":
            return app(message, context)
        task, parameters, _ = wire.unpack_task(message.content)
        node = int(context.node_config["partition-id"])
        holders = self.partition.holders_of_node(node, self.nodes)
        reply = HolderReply(
            task.step, task.wave, node, holders, provenance.code_hash(),
            {"sum": trivial(parameters, len(holders))}, len(holders), _statistics(len(holders)),
            {"compute": 0.0, "transfer": 0.0, "data": 0.0},
        )  # fmt: skip
        from flwr.app import Message

        return Message(wire.pack_reply(reply), reply_to=message)


@functools.cache
def _statistics(count: int) -> dict[str, float | list[float]]:
    """What a reply says of so many contributions; made once, for it is no part of the work to time."""
    nothing = torch.zeros(count, dtype=torch.float64)
    return contributions.statistics(ClippedSum(torch.zeros(0), count, 1.0, nothing, nothing))


@functools.cache
def _buffers(size: int, dtype: str) -> NDArray[Any]:
    """Two vectors for both methods to use: the speed of new ones depends on the pages they happen to get."""
    return np.zeros((2, size), dtype)


def trivial(parameters: NDArray[Any], holders: int) -> NDArray[Any]:
    """One vector operation for each holder: add a multiple of the model of norm below the clip norm.

    The result is good until the next call.
    """
    total, scratch = _buffers(parameters.size, parameters.dtype.name)
    total.fill(0.0)
    scale = np.float32(1e-3 / max(1e-9, float(np.abs(parameters).sum())))
    for _ in range(holders):
        np.multiply(parameters, scale, out=scratch)
        np.add(total, scratch, out=total)
    return total


def stepper(server: Server) -> Callable[[], None]:
    """Return a call that makes the server's next step."""

    def step() -> None:
        server.step()

    return step
