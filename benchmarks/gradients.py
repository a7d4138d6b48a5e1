"""Time of one clipped gradient sum, beside the non-private step and other implementations.

    python -m benchmarks.gradients [--device cpu|cuda] [--json FILE] [--models NAME ...] [--views K ...]
                                   [--repeats N] [--as-installed] [--update]

Methods are measured in turn in one process, each call after an untimed one: on the CPU the process's own
CPU time with one thread, on CUDA wall time up to the end of all kernels. On the CPU jax_privacy and JAX's
own non-private step take their turns from a second process where they are installed (`benchmarks.jax_peer`).
1.0 is the eager float32 forward and backward pass of the same batch; figures are medians of the ratios within
each turn. On the CPU freed memory stays in the process, as the fedsim command has it, for the good of all
methods. With --as-installed it does so only for the non-private step and ours; the other methods, and these
once more, run as for whoever installs a library and does nothing about memory, each in a process of its own,
because by the C library's rules the pages one call has to fetch depend on what ran before it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import jax_peer
from benchmarks.models import CASES, SEED, Case
from benchmarks.peers import Step, applies, methods
from benchmarks.process import Process, serve
from fedsim import provenance
from fedsim.grads.bookkeeping.memory import retain_freed_memory

BASE = "non-private"
FEDSIM = (BASE, "ours")  # beginnings of the names of what fedsim's programs run
AS_A_LIBRARY = ", as a library"


def main() -> None:
    """Measure, print a table and write the JSON."""
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if arguments.serve is not None:
        name, method, examples, views = arguments.serve
        serve(_steps(CASES[name], [method], int(examples), int(views), arguments.device), {})
        return
    retained = arguments.device == "cpu" and retain_freed_memory()
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.gradients", *sys.argv[1:]]),
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
        "seed": SEED,
        "threads": 1,
        "retained_freed_memory": retained,
        "as_installed": arguments.as_installed,
        "rows": rows,
    }
    held = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.update else None
    for name, views in itertools.product(arguments.models, arguments.views):
        row = _row(CASES[name], views, arguments)
        rows.append(row)
        shown = "  ".join(f"{method} {ratio:.2f}" for method, ratio in row["ratios"].items())
        print(
            f"{name} K={views} B={row['examples']}: {row['milliseconds'][BASE]:.1f} ms  {shown}", flush=True
        )
        if "ratio_to_own_step" in row.get("jax", {}):
            print(f"    jax_privacy / JAX non-private: {row['jax']['ratio_to_own_step']:.2f}", flush=True)
        if arguments.json is not None:  # after every row: a run takes an hour
            whole = result if held is None else _updated(held, result)
            arguments.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _updated(held: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Put the rows of `new` in place of theirs in `held`, each with what made it and what it replaces."""
    same = ("hardware", "seed", "threads", "retained_freed_memory", "as_installed")
    if any(held[key] != new[key] for key in same):
        raise SystemExit(f"--update needs a FILE with the same {', '.join(same)}: measure all rows anew.")
    own = {key: new[key] for key in ("command", "commit")}
    rows = {(row["model"], row["views"]): row for row in held["rows"]}
    for row in new["rows"]:
        place = row["model"], row["views"]
        rows[place] = {**row, "measured": own, "replaced": rows.get(place)}
    return {**held, "rows": list(rows.values())}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--views", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--as-installed", action="store_true", help="other libraries without our setting of the allocator"
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="replace only these rows of the FILE; the old readings stay in it",
    )
    parser.add_argument(
        "--serve",
        nargs=4,
        metavar=("MODEL", "METHOD", "EXAMPLES", "VIEWS"),
        help="one method, in this process, timed as standard input asks",
    )
    arguments = parser.parse_args()
    if arguments.update and arguments.json is None:
        parser.error("--update replaces rows of a file: give it with --json FILE.")
    if arguments.as_installed and arguments.device != "cpu":
        parser.error("--as-installed is about the C library's allocator: it needs --device cpu.")
    return arguments


def _row(case: Case, views: int, arguments: argparse.Namespace) -> dict[str, Any]:
    full = case.gpu_examples if arguments.device == "cuda" else case.examples
    examples = full if views == 1 else max(1, full * 2 // views)
    parameters = sum(p.numel() for p in case.model().parameters())
    possible = [*methods(arguments.device, len(case.shape) == 3), jax_peer.BASE, jax_peer.METHOD]
    names = [name for name in possible if applies(name, parameters, examples, views)]
    theirs = tuple(name for name in names if name in (jax_peer.BASE, jax_peer.METHOD))
    here = [name for name in names if name not in theirs]
    beside: dict[str, tuple[str, Process]] = {}
    facts: dict[str, Any] = {}
    with ExitStack() as stack:
        if arguments.as_installed:
            for name in here:
                own = (case.name, name, str(examples), str(views))
                process = stack.enter_context(Process("benchmarks.gradients", "--serve", *own))
                beside[name + AS_A_LIBRARY if name.startswith(FEDSIM) else name] = name, process
            here = [name for name in here if name.startswith(FEDSIM)]
        if theirs and arguments.device == "cpu" and jax_peer.installed():
            process = stack.enter_context(jax_peer.peer(case, examples, views, theirs))
            beside |= {name: (name, process) for name in theirs}
            facts = {"jax": process.facts}
        steps = _steps(case, here, examples, views, arguments.device)
        seconds: dict[str, list[float]] = {name: [] for name in (*steps, *beside)}
        for _ in range(arguments.repeats):
            for name, step in steps.items():
                step()
                seconds[name].append(_timed(step, arguments.device))
            for label, (name, process) in beside.items():
                seconds[label].append(process.seconds(name))
    if jax_peer.METHOD in seconds:
        own_steps = zip(seconds[jax_peer.METHOD], seconds[jax_peer.BASE], strict=True)
        facts["jax"]["ratio_to_own_step"] = statistics.median(a / b for a, b in own_steps)
    row: dict[str, Any] = {
        "model": case.name,
        "views": views,
        "examples": examples,
        "ratios": {
            name: statistics.median(a / b for a, b in zip(found, seconds[BASE], strict=True))
            for name, found in seconds.items()
        },
        "milliseconds": {name: 1e3 * statistics.median(found) for name, found in seconds.items()},
        "seconds": seconds,
        **facts,
    }
    return row


def _steps(case: Case, names: Sequence[str], examples: int, views: int, device: str) -> dict[str, Step]:
    """The methods of these names, each with a model of its own; on a GPU those its memory is enough for."""
    inputs, targets = (tensor.to(device) for tensor in case.batch(examples, views))
    model = case.model().to(device)
    makers = methods(device, len(case.shape) == 3)
    steps = {name: makers[name](copy.deepcopy(model), inputs, targets) for name in names}
    if device != "cuda":
        return steps
    fitting = {}
    for name, step in steps.items():
        try:
            step()
            fitting[name] = step
        except torch.OutOfMemoryError:
            print(f"{case.name} K={views} B={examples}: no memory for {name}", flush=True)
    return fitting


def _timed(step: Any, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    step()
    return time.process_time() - start


if __name__ == "__main__":
    main()
