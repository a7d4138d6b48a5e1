"""Time of one clipped gradient sum, beside the non-private step and other implementations.

    python -m benchmarks.gradients [--device cpu|cuda] [--json FILE] [--models NAME ...] [--views K ...]
                                   [--repeats N] [--plain-allocator] [--update]

Methods are measured in turn in one process, each call after an untimed one: on the CPU the process's own
CPU time with one thread, on CUDA wall time up to the end of all kernels. On the CPU jax_privacy and JAX's
own non-private step take their turns from a second process where they are installed (`benchmarks.jax_peer`).
1.0 is the eager float32 forward and backward pass of the same batch; figures are medians of the ratios within
each turn. On the CPU freed memory stays in the process, as the fedsim command has it, for the good of all
methods; with --plain-allocator the C library's defaults hold, as for whoever installs one of the libraries
and does nothing about it.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import jax_peer
from benchmarks.models import CASES, SEED, Case
from benchmarks.peers import applies, methods
from fedsim import provenance
from fedsim.grads.bookkeeping.memory import retain_freed_memory

BASE = "non-private"


def main() -> None:
    """Measure, print a table and write the JSON."""
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    retained = arguments.device == "cpu" and not arguments.plain_allocator and retain_freed_memory()
    rows = []
    for name in arguments.models:
        for views in arguments.views:
            row = _row(CASES[name], views, arguments)
            rows.append(row)
            shown = "  ".join(f"{method} {ratio:.2f}" for method, ratio in row["ratios"].items())
            print(
                f"{name} K={views} B={row['examples']}: {row['milliseconds'][BASE]:.1f} ms  {shown}",
                flush=True,
            )
            if "ratio_to_own_step" in row.get("jax", {}):
                print(f"    jax_privacy / JAX non-private: {row['jax']['ratio_to_own_step']:.2f}", flush=True)
    if arguments.json is not None:
        result = {
            "command": "python -m benchmarks.gradients " + " ".join(sys.argv[1:]),
            "commit": provenance.commit(),
            "hardware": provenance.hardware(),
            "seed": SEED,
            "threads": 1,
            "retained_freed_memory": retained,
            "rows": rows,
        }
        if arguments.update:
            result = _updated(json.loads(arguments.json.read_text(encoding="utf-8")), result)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _updated(held: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Put the rows of `new` in place of theirs in `held`, each with what made it and what it replaces."""
    same = ("hardware", "seed", "threads", "retained_freed_memory")
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
        "--plain-allocator", action="store_true", help="do not keep freed memory in the process"
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="replace only these rows of the FILE; the old readings stay in it",
    )
    return parser.parse_args()


def _row(case: Case, views: int, arguments: argparse.Namespace) -> dict[str, Any]:
    examples = case.examples if views == 1 else max(1, case.examples * 2 // views)
    inputs, targets = (tensor.to(arguments.device) for tensor in case.batch(examples, views))
    model = case.model().to(arguments.device)
    parameters = sum(p.numel() for p in model.parameters())
    steps = {
        name: make(copy.deepcopy(model), inputs, targets)
        for name, make in methods(arguments.device, len(case.shape) == 3).items()
        if applies(name, parameters, examples, views)
    }
    beside: tuple[str, ...] = ()
    if arguments.device == "cpu" and jax_peer.installed():
        names = (jax_peer.BASE, jax_peer.METHOD)
        beside = tuple(name for name in names if applies(name, parameters, examples, views))
    seconds: dict[str, list[float]] = {name: [] for name in (*steps, *beside)}
    facts: dict[str, Any] = {}
    with ExitStack() as stack:
        peer = stack.enter_context(jax_peer.Peer(case, examples, views, beside)) if beside else None
        for _ in range(arguments.repeats):
            for name, step in steps.items():
                step()
                seconds[name].append(_timed(step, arguments.device))
            if peer is not None:
                for name in beside:
                    seconds[name].append(peer.seconds(name))
        if peer is not None:
            facts = {"jax": peer.facts}
    if jax_peer.METHOD in seconds:
        own = zip(seconds[jax_peer.METHOD], seconds[jax_peer.BASE], strict=True)
        facts["jax"]["ratio_to_own_step"] = statistics.median(a / b for a, b in own)
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
