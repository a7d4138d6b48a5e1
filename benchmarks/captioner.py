"""Time of the captioner's clipped gradient sum beside ordinary training on the same batch.

    python -m benchmarks.captioner [--repeats 9] [--threads 1] [--json results/captioner_cpu.json]

Both are measured in turn in one process, each call after an untimed one, by the process's own CPU time: 1.0
is the eager float32 forward and backward pass of the mean loss. Figures are medians of the ratios within each
turn, with the middle half of them. Captions are two thirds as long as there are places. On a machine that
does other work as well, `load` says how much: the caches are then shared with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedsim import models, provenance, seeds
from fedsim.clipping.flat import FlatClip
from fedsim.config import ModelConfig
from fedsim.data.targets import END, IGNORED
from fedsim.grads import batch, bookkeeping
from fedsim.grads.bookkeeping.memory import retain_freed_memory
from fedsim.tasks.captioning import Captioning

SEED = 0


@dataclass(frozen=True)
class Case:
    """One row: a captioner and its batch.

    Attributes:
        size, patch, decoder_depth: of the model.
        edge: of the pictures, in pixels.
        places, tokens: of the captions.
        examples, views: of the physical batch.
    """

    size: str
    patch: int
    edge: int
    places: int
    tokens: int
    examples: int
    views: int = 1
    decoder_depth: int = 6


CASES = (
    Case("nano", 8, 64, 40, 4096, 32),
    Case("nano", 8, 64, 40, 4096, 16, views=2),
    Case("tiny", 8, 64, 40, 4096, 8),
    Case("pico", 4, 32, 16, 1024, 64, decoder_depth=2),
)


def calls(case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return ordinary training's pass, and the clipped sum, of one batch."""
    task, shape = Captioning(), (3, case.edge, case.edge)
    options = {"size": case.size, "patch": case.patch, "places": case.places}
    options |= {"decoder_depth": case.decoder_depth}
    model = models.build(ModelConfig("captioner", options), shape, case.tokens, SEED)
    generator = seeds.torch_stream(SEED, "benchmark")
    images = torch.randn((case.examples, case.views, *shape), generator=generator)
    targets = torch.randint(END + 1, case.tokens, (case.examples, case.places), generator=generator)
    targets[:, 2 * case.places // 3 :] = IGNORED
    shown = batch.shown(task.shown, images, targets)
    views, wanted = batch.each(lambda a: a.flatten(0, 1), shown), batch.repeated(targets, case.views)

    def ordinary() -> None:
        model.zero_grad()
        task.loss(batch.call(model, views), wanted).mean().backward()

    def clipped() -> object:
        return bookkeeping.clipped_sum(model, shown, targets, task.loss, FlatClip(1.0))

    return ordinary, clipped


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of CPU that a call takes after an untimed one."""
    call()
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Return a row of the result."""
    ordinary, clipped = calls(case)
    turns = [(timed(ordinary), timed(clipped)) for _ in range(repeats)]
    ratios = [own / plain for plain, own in turns]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        **asdict(case),
        "ratio": middle,
        "middle_half": [low, high],
        "milliseconds_ordinary": 1e3 * statistics.median(plain for plain, _ in turns),
        "turns": turns,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    retain_freed_memory()
    held: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.captioner", *sys.argv[1:]]),
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
        "threads": options.threads,
        "rows": [],
    }
    for case in CASES:
        row = measure(case, options.repeats)
        held["rows"].append(row)
        low, high = row["middle_half"]
        print(f"{case}: {row['ratio']:.2f} ({low:.2f} to {high:.2f}), load {row['load']:.1f}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
