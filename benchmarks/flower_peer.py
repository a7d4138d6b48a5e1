"""One Flower client for each holder: a plain Flower app, without this project, in its simulation.

    python -m benchmarks.flower_peer NODES HOLDERS PARAMETERS ROUNDS

Each of NODES Flower clients hosts HOLDERS / NODES holders and does one vector operation of PARAMETERS float32
numbers for each; the server sends the vector, waits for every client and adds the replies. Prints one JSON
line: seconds of each round. The first round starts Ray's processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


def measure(nodes: int, holders: int, parameters: int, rounds: int) -> list[float]:
    """Seconds of each round, in a process of its own; the first, which starts processes, left out."""
    command = [sys.executable, "-m", "benchmarks.flower_peer"]
    done = subprocess.run(
        [*command, *map(str, (nodes, holders, parameters, rounds + 1))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **SWITCHES},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds[1:]


def main() -> None:
    """Run the simulation."""
    from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    nodes, holders, parameters, rounds = map(int, sys.argv[1:])
    seconds: list[float] = []
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        vector = message.content.array_records["model"]["flat"].numpy()
        total, scratch = np.zeros_like(vector), np.empty_like(vector)
        for _ in range(holders // nodes):
            np.multiply(vector, np.float32(1e-3), out=scratch)
            np.add(total, scratch, out=total)
        return Message(RecordDict({"model": ArrayRecord({"flat": Array(total)})}), reply_to=message)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        while len(ids := list(grid.get_node_ids())) < nodes:
            time.sleep(0.1)
        vector = np.full(parameters, 1.0, np.float32)
        for _ in range(rounds):
            began = time.perf_counter()
            content = RecordDict({"model": ArrayRecord({"flat": Array(vector)})})
            replies = list(grid.send_and_receive([Message(content, node, "train") for node in ids]))
            total = np.zeros(parameters)
            for reply in replies:
                total += reply.content.array_records["model"]["flat"].numpy()
            seconds.append(time.perf_counter() - began)
            if len(replies) != nodes or not np.allclose(total, holders * 1e-3, rtol=1e-3):
                raise RuntimeError(f"{len(replies)} of {nodes} replies, sum {total[0]}")

    run_simulation(
        server,
        client,
        nodes,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": os.cpu_count() or 1},
        },
    )
    if len(seconds) < rounds:
        raise SystemExit("the simulation stopped early")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
