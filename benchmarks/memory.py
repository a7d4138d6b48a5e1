"""Peak memory of one clipped gradient sum, beside the non-private step and other implementations.

    python -m benchmarks.memory [--device cpu|cuda] [--json FILE] [--models NAME ...] [--views K ...]

Each method runs in a process of its own; the figure is the peak above the loaded model and batch, per view.
On the CPU it is resident memory, with every freed block of 128 KiB and more given back at once: what the C
library would keep of them by its own rules differs by a fifth from run to run. On CUDA it is torch's count
of allocated bytes. JAX is not measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import CASES, SEED
from benchmarks.peers import applies, methods
from fedsim import provenance
from fedsim.grads.bookkeeping.memory import give_back_freed_memory

BASE = "non-private"
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": str(2**17)
}  # of glibc; given, it is no longer raised as blocks are freed


def main() -> None:
    """Measure, print a line a row and write the JSON."""
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if arguments.peak is not None:
        name, method, examples, views = arguments.peak
        print(_peak(name, method, int(examples), int(views), arguments.device))
        return
    rows = [_row(name, views, arguments.device) for name in arguments.models for views in arguments.views]
    if arguments.json is not None:
        result = {
            "command": shlex.join(["python", "-m", "benchmarks.memory", *sys.argv[1:]]),
            "commit": provenance.commit(),
            "hardware": provenance.hardware(),
            "seed": SEED,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--views", nargs="+", type=int, default=[1, 16])
    parser.add_argument(
        "--peak",
        nargs=4,
        metavar=("MODEL", "METHOD", "EXAMPLES", "VIEWS"),
        help="one figure, in this process",
    )
    return parser.parse_args()


def _row(name: str, views: int, device: str) -> dict[str, Any]:
    case = CASES[name]
    examples = case.memory_examples if views == 1 else max(1, case.memory_examples * 2 // views)
    parameters = sum(p.numel() for p in case.model().parameters())
    found = {}
    for method in methods(device, len(case.shape) == 3):
        if not applies(method, parameters, examples, views):
            continue
        command = [sys.executable, "-m", "benchmarks.memory", "--device", device]
        command += ["--peak", name, method, str(examples), str(views)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, **GIVE_BACK}
        )
        found[method] = float(done.stdout.split()[-1])
    shown = "  ".join(f"{method} {value:.2f}" for method, value in found.items())
    print(f"{name} K={views} B={examples}: MB a view: {shown}", flush=True)
    return {"model": name, "views": views, "examples": examples, "megabytes_per_view": found}


def _peak(name: str, method: str, examples: int, views: int, device: str) -> float:
    """Peak megabytes per view of this process, above what it held with model, batch and libraries loaded."""
    case = CASES[name]
    model = case.model().to(device)
    make = methods(device, len(case.shape) == 3)[method]
    few = [tensor.to(device) for tensor in case.batch(1, views)]
    make(copy.deepcopy(model), *few)()  # load libraries, allocate what is allocated once
    inputs, targets = (tensor.to(device) for tensor in case.batch(examples, views))
    step = make(model, inputs, targets)
    rows = examples * views
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / rows / 1e6
    give_back_freed_memory()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading (Linux)
    for _ in range(2):
        step()
    return (_resident("VmHWM") - before) / rows / 1e6


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS (resident now) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


if __name__ == "__main__":
    main()
