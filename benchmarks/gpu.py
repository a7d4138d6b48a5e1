"""Everything that is owed on a GPU, in one command of at most 25 minutes: `make gpu`.

    python -m benchmarks.gpu [--device cuda] [--json results/gpu.json] [--only STAGE ...]

Stages, each with its own limit of time; one that fails or runs out of it is told, and the next one goes on:

    correct    all tests that need a GPU (`pytest -m cuda`)
    differs    a short run on the CPU and on the GPU in every precision: how far apart they end
    gradients  the rows of `benchmarks.gradients`, into results/gradients_gpu.json
    memory     the rows of `benchmarks.memory`, into results/memory_gpu.json
    recipes    de2022/fashion_gpu and kurakin2022/fashion_gpu, a few steps of each: seconds a step

--device cpu goes through the same stages without a GPU, with little work in each: a test of this program.
`python -m benchmarks.report` then writes the tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fedsim import provenance

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ("float32", "tf32", "bfloat16")
SHORT = ("train.steps=3", "train.eval_every=3", "monitor.tensorboard=false", "monitor.progress=false")
FULL = ROOT / "data" / "fashion_mnist"


@dataclass(frozen=True)
class Stage:
    """One part of the work.

    Attributes:
        limit: seconds it may take.
        work: (device, seconds) -> facts for the JSON; raises where it fails.
    """

    limit: float
    work: Callable[[str, float], dict[str, Any]]


def _ran(seconds: float, *command: str) -> str:
    """Standard output of a module of this checkout.

    Raises:
        RuntimeError: it failed or took longer; with the end of what it wrote.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as late:
        written = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else ""
        raise RuntimeError(f"took longer than {seconds:.0f} s; it wrote: {written[-800:]}") from late
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}; {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout


def _correct(device: str, seconds: float) -> dict[str, Any]:
    which = ["-m", "cuda"] if device == "cuda" else ["tests/unit/test_launches.py", "-k", "spies"]
    return {"tests": _ran(seconds, "pytest", "-n", "1", *which).splitlines()[-30:]}


def _differs(device: str, seconds: float) -> dict[str, Any]:
    ended = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:

        def final(place: str, precision: str) -> torch.Tensor:
            out = Path(folder) / str(len(list(Path(folder).iterdir())))
            settings = [f"engine.device={place}", f"engine.precision={precision}", "engine.gpus_per_node=0"]
            command = ("fedsim.cli", "run", "de2022/smoke", "--backend", "local", "--out", str(out))
            _ran(ended - time.monotonic(), *command, *SHORT, *settings)
            held = load_file(out / "final.safetensors")
            return torch.cat([held[name].flatten() for name in sorted(held)]).double()

        expected = final("cpu", "float32")
        found = {}
        for precision in PRECISIONS if device == "cuda" else PRECISIONS[:1]:
            difference = final(device, precision) - expected
            found[precision] = {
                "largest": float(difference.abs().max()),
                "relative": float(difference.norm() / expected.norm()),
            }
    return {"from_the_cpu_in_float32": found}


def _rows(name: str, *more: str) -> Callable[[str, float], dict[str, Any]]:
    def work(device: str, seconds: float) -> dict[str, Any]:
        if device == "cuda":
            chosen = ["--models", "cnn", "wrn-16-4", "vit-tiny", "linear-100", *more]
            chosen += ["--device", device, "--json", f"results/{name}_gpu.json"]
        else:
            chosen = ["--models", "linear-10", "--views", "1"]
        return {"rows": _ran(seconds, f"benchmarks.{name}", *chosen).splitlines()}

    return work


def _recipes(device: str, seconds: float) -> dict[str, Any]:
    ended = time.monotonic() + seconds
    found = {}
    for recipe, steps in (("de2022/fashion_gpu", 12), ("kurakin2022/fashion_gpu", 3)):
        settings = [f"train.steps={steps}", f"train.eval_every={steps}", "optimizer.warmup_epochs=null"]
        settings += ["monitor.tensorboard=false", "monitor.progress=false", f"engine.device={device}"]
        if not FULL.exists():
            settings += ["data.name=fashion_mnist_subset", "train.expected_batch_size=2048"]
        if device != "cuda":
            settings += ["engine.precision=float32", "engine.gpus_per_node=0", "train.steps=1"]
            settings += ["train.expected_batch_size=8", "model.options.depth=10", "model.options.width=1"]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = ("fedsim.cli", "run", recipe, "--backend", "local", "--out", str(out))
            _ran(ended - time.monotonic(), *command, *settings)
            result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        found[recipe] = {
            "full_data": FULL.exists(),
            "steps": result["steps"],
            "accuracy": result["accuracy"],
            "seconds_by_part": result["seconds_by_part"],
        }
    return {"recipes": found}


STAGES = {
    "correct": Stage(360, _correct),
    "differs": Stage(120, _differs),
    "gradients": Stage(420, _rows("gradients", "--repeats", "7")),
    "memory": Stage(240, _rows("memory")),
    "recipes": Stage(300, _recipes),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Go through the stages, write the JSON after each, and say what failed; exit code 1 if any did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "gpu.json")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("this machine has no CUDA device that torch sees; nothing was measured.", file=sys.stderr)
        return 2
    words = sys.argv[1:] if arguments is None else arguments
    card = torch.cuda.get_device_name() if given.device == "cuda" else "none"
    result: dict[str, Any] = {
        "command": " ".join(("python -m benchmarks.gpu", *words)),
        "commit": provenance.commit(),
        "hardware": provenance.hardware() | {"gpu": card},
        "stages": {},
    }
    for name in given.only:
        began = time.monotonic()
        try:
            facts = STAGES[name].work(given.device, STAGES[name].limit)
            problem = ""
        except Exception as failure:
            facts, problem = {}, f"{type(failure).__name__}: {failure}"
        result["stages"][name] = {"seconds": time.monotonic() - began, "problem": problem, **facts}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {problem or json.dumps(facts, indent=1)}", flush=True)
    return 1 if any(stage["problem"] for stage in result["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
