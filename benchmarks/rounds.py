"""Seconds per step of the federation: local engine, Flower's simulation, server work, peers.

    python -m benchmarks.rounds [--json FILE] [--steps N] [--skip flower pfl ...]

"Trivial clients" do one vector operation on the flat model for every holder, so what is left is overhead;
"plain loop" is the same operations without any federation. Rows of one comparison are measured in turn in
one process with one thread, and reported as medians and ratios of CPU time, with real gradients the median
of each step's ratio: wall time on a shared machine says more about the machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import flower_peer, pfl_peer
from benchmarks.shared import SEED, TrivialClient, interleaved, medians, settings, stepper, trivial
from fedsim import loading, provenance, seeds
from fedsim.engine.collect import Collector
from fedsim.engine.experiment import Experiment, prepare
from fedsim.engine.run_folder import RunFolder
from fedsim.engine.server import Server
from fedsim.engine.setup import setup_of
from fedsim.flower.client_app import app
from fedsim.flower.local_grid import LocalGrid
from fedsim.flower.transport import GridTransport
from fedsim.grads.bookkeeping.memory import retain_freed_memory
from fedsim.grads.flat import get_flat, spec
from fedsim.learners.optimizer import ServerOptimizer
from fedsim.noise.gaussian import step_noise
from fedsim.types import HolderReply

MODELS = {"cifar_cnn": "0.5 MB", "wide_resnet": "11 MB"}
HOLDERS = (1, 100, 1_000, 10_000)
WARM = 15  # rounds until freed memory of every size is at hand and no page is fetched any more


def hosted_holders(steps: int) -> dict[str, Any]:
    """Trivial clients: one local node that hosts all holders, against the plain loop.

    "node" is the node's part of a step: unpack the task, do the work, pack the reply. "fedsim local" is the
    whole step up to the sum: keys, messages both ways and the server's checks of the reply too.
    """
    out: dict[str, Any] = {}
    for name in MODELS:
        for holders in (100, 1_000, 10_000) if name == "cifar_cnn" else (100,):
            experiment = prepare(settings(holders, 1, f"model.name={name}"))
            client, of_node = TrivialClient(experiment), []

            def node(message: Any, context: Any, client: Any = client, of_node: Any = of_node) -> Any:
                began = time.process_time()
                answer = client(message, context)
                of_node.append(time.process_time() - began)
                return answer

            transport = GridTransport(LocalGrid(node, 1), "{}", 1)
            transport.connect()
            collector = Collector(experiment, transport, "")
            parameters = get_flat(experiment.model).numpy()

            def federated(
                collector: Collector = collector,
                parameters: NDArray[Any] = parameters,
                experiment: Experiment = experiment,
            ) -> None:
                mechanism = experiment.mechanism
                release = mechanism.release()
                keys = mechanism.method.keys(seeds.derive(SEED, "run"), 0)
                collector.begin(0, keys, parameters, release)
                mechanism.collect(release, {}, collector.ask)

            def plain(parameters: NDArray[Any] = parameters, holders: int = holders) -> None:
                trivial(parameters, holders).astype(np.float64)

            repeats = max(3, steps * min(10, 1_000 // holders) // 2)
            raw = interleaved({"plain loop": plain, "fedsim local": federated}, repeats, WARM)
            raw["node"] = of_node[-repeats:]
            row = medians(raw)
            out[f"{name}, {holders} holders"] = {
                "seconds": row,
                "ratio": row["fedsim local"] / row["plain loop"],
                "ratio_of_node": row["node"] / row["plain loop"],
                "raw": raw,
            }
    return out


def real_work(steps: int) -> dict[str, Any]:
    """Whole steps with real gradients: 100 to 10,000 holders against one, same examples."""
    out: dict[str, Any] = {}
    for name, batch in (("small_cnn", 200), ("wide_resnet", 16)):
        with tempfile.TemporaryDirectory() as folder:
            calls = {}
            for holders in HOLDERS:
                config = settings(
                    holders, 1, f"model.name={name}", f"train.expected_batch_size={batch}",
                    "data.train_examples=10000", f"train.steps={steps + 2}", "engine.physical_batch_size=64",
                )  # fmt: skip
                transport = GridTransport(LocalGrid(app, 1), setup_of(config), 1)
                transport.connect()
                server = Server(prepare(config), RunFolder(Path(folder) / str(holders)), transport, False)
                calls[f"{holders} holders"] = stepper(server)
            raw = interleaved(calls, steps)
        # By step: each draws another number of examples, and a machine's speed drifts.
        one = raw["1 holders"]
        ratios = {k: [v / w for v, w in zip(values, one, strict=True)] for k, values in raw.items()}
        out[name] = {"seconds": medians(raw), "ratio_to_one_holder": medians(ratios), "raw": raw}
    return out


def server_work(repeats: int) -> dict[str, Any]:
    """Sum of two node replies, secure noise and the optimizer, for 2.75 million parameters."""
    config = settings(
        2, 2, "model.name=wide_resnet", "optimizer.name=momentum", "optimizer.options.momentum=0.9"
    )
    experiment = prepare(config)
    size = experiment.facts.parameters
    replies = [
        HolderReply(0, 0, n, np.zeros(1, np.int64), "", {"sum": np.ones(size, np.float32)}, 1, {}, {})
        for n in (0, 1)
    ]
    mechanism, release = experiment.mechanism, experiment.mechanism.release()
    optimizer = ServerOptimizer(config.optimizer, config.train, spec(experiment.model))
    parameters = get_flat(experiment.model)
    optimizer.init(parameters)
    total = np.zeros(size)
    generator = torch.Generator().manual_seed(SEED)

    def add() -> None:
        nonlocal total
        total = mechanism.collect(release, {}, lambda *_: replies).sums["sum"]

    raw = interleaved(
        {
            "sum of node replies": add,
            "secure noise": lambda: step_noise(b"k" * 32, 0, size, 1.0, "noise"),
            "optimizer": lambda: optimizer.step(parameters, torch.from_numpy(total).float(), 0),
            "torch normal_ (float32), for comparison": lambda: torch.empty(size).normal_(generator=generator),
        },
        repeats,
    )
    row = medians(raw)
    work = sum(v for k, v in row.items() if "comparison" not in k)
    return {"seconds": row, "seconds_per_step": work, "raw": raw}


def flower(steps: int) -> dict[str, Any]:
    """What Flower's simulation with 2 nodes and 1,000 holders adds to a step, by the runs' own clocks."""
    return {f"{name} ({size})": _simulated(name, 2, steps) for name, size in MODELS.items()}


def crowd(steps: int) -> dict[str, Any]:
    """1,000 holders in Flower's simulation: hosted by 2 nodes, and each a Flower client of its own."""
    size = get_flat(prepare(settings(1_000, 2, "model.name=cifar_cnn")).model).numel()
    hosted = _simulated("cifar_cnn", 2, steps)["seconds_per_step"]
    alone = flower_peer.measure(1_000, 1_000, size, min(steps, 2))
    seconds = {"2 nodes host all": hosted, "one Flower client a holder": statistics.median(alone)}
    return {"seconds": seconds, "ratio": hosted / statistics.median(alone), "raw": alone}


def _simulated(name: str, nodes: int, steps: int) -> dict[str, Any]:
    """Steps of 1,000 holders with two examples in all; the first three, which start processes, left out."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        config = settings(
            1_000, nodes, f"model.name={name}", "train.expected_batch_size=2", "data.train_examples=2000",
            f"train.steps={steps + 3}", "engine.physical_batch_size=8", "engine.threads=1",
        )  # fmt: skip
        recipe.write_text(loading.to_yaml(config), encoding="utf-8")
        run = Path(folder) / "run"
        arguments = ["run", str(recipe), "--backend", "simulation", "--out", str(run), "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "fedsim.cli", *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    split = [
        {k[8:]: v for k, v in line["sensitive"].items() if k.startswith("seconds/")} for line in lines[3:]
    ]
    return {
        "seconds_added_per_step": statistics.median(s["wait"] + s["transfer"] for s in split),
        "seconds_per_step": statistics.median(s["wait"] + s["transfer"] + s["compute"] for s in split),
        "split": {key: statistics.median([s[key] for s in split]) for key in split[0]},
        "raw": split,
    }


def pfl(steps: int) -> dict[str, Any]:
    """pfl-research on the same users; see `benchmarks.pfl_peer`."""
    if not pfl_peer.installed():
        print("pfl-research is not installed: its rows are left out", flush=True)
        return {}
    return pfl_peer.measure(steps)


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "hosted": hosted_holders, "work": real_work, "server": server_work, "flower": flower, "crowd": crowd,
    "pfl": pfl,
}  # fmt: skip


def main() -> None:
    """Run all parts and print or write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    retain_freed_memory()  # as the fedsim command does
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.rounds", *sys.argv[1:]]),
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
        "seed": SEED,
        "steps": options.steps,
    }
    for name, part in PARTS.items():
        if name not in options.skip:
            result[name] = part(options.steps)
            print(json.dumps({name: strip(result[name])}, indent=2), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def strip(node: Any) -> Any:
    """Leave out raw times, for the console."""
    if isinstance(node, dict):
        return {k: strip(v) for k, v in node.items() if k != "raw"}
    return round(node, 5) if isinstance(node, float) else node


if __name__ == "__main__":
    main()
