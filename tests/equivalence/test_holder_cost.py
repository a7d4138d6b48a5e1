"""Holders are cheap: what a step costs follows from its examples, not from how many owners they have."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from fedsim.engine.experiment import prepare
from fedsim.engine.run_folder import RunFolder
from fedsim.engine.server import Server
from fedsim.engine.setup import setup_of
from fedsim.flower.client_app import app
from fedsim.flower.local_grid import LocalGrid
from fedsim.flower.transport import GridTransport
from tests.conftest import small

WARM, STEPS = 2, 66  # so many that a few seconds of foreign load do not move the median


def server(holders: int, out: Path) -> Server:
    config = small(
        "data.train_examples=10000",
        "train.expected_batch_size=400",
        f"federation.holders={holders}",
        "federation.nodes=1",
        "engine.threads=1",  # idle threads that wait for work count as CPU time
        f"train.steps={WARM + STEPS + 1}",
        "train.eval_every=1000",
    )
    transport = GridTransport(LocalGrid(app, 1), setup_of(config), 1)
    transport.connect()
    return Server(prepare(config), RunFolder(out), transport, resume=False)


def test_a_thousand_holders_cost_at_most_a_tenth_more_than_one(tmp_path: Path) -> None:
    servers = {holders: server(holders, tmp_path / str(holders)) for holders in (1, 1000)}
    ratios: list[float] = []
    for step in range(WARM + STEPS):
        seconds = []
        for one in servers.values():  # in turn, so that both meet the same load
            began = time.process_time()
            one.step()
            seconds.append(time.process_time() - began)
        if step >= WARM:
            ratios.append(seconds[1] / seconds[0])  # both had the same examples in it
    assert statistics.median(ratios) <= 1.10, ratios
