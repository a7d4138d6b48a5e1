"""What one piece of a step asks of a GPU, beside ordinary training of the same views: see `benchmarks.spies`.

    python -m benchmarks.launches [--before CHECKOUT] [--json FILE]

Counted on the CPU without a GPU: operations that compute or copy, waits of the host, and tensors sent between
host and device. `least_ms` is the roofline time of all operations on one card, one after the other: a model,
and no measurement. `ratio` is that of fedsim to that of ordinary training under autocast, of the same views.

With --before, the operations of another checkout on the same piece, on the CPU as it would be on a GPU
without ways of its own: counted on 8 and on 16 examples, and extended linearly.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import CASES, Case
from benchmarks.spies import FREE, H100, WAITS, Count, Spy, as_on_a_gpu, counted
from benchmarks.versions import commit_of
from fedsim import provenance
from fedsim.grads import FlatClip, independence
from fedsim.grads.bookkeeping import Options, clipped_sum, engine
from fedsim.grads.per_example import clipped_gradient_sum, cross_entropy

PIECE = 2048  # views
STEP = 4096  # examples of a virtual batch
MODELS = ("wrn-16-4", "cnn", "vit-tiny")
SIZES = (8, 16)  # examples on which another checkout is counted
GIB = 2**30


# What a card of 80 GiB gives one process.
BFLOAT16 = Options(10 * GIB, GIB, channels_last=True, precision="bfloat16")


def clipped(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """The clipped sum of a piece, by the public function."""
    views = inputs.shape[0] * inputs.shape[1]
    clipped_gradient_sum(
        model,
        inputs,
        targets,
        FlatClip(1.0),
        engine="bookkeeping",
        physical_batch_size=views,
        options=BFLOAT16,
    )


def ordinary(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Forward and backward pass of the mean loss, with what a GPU's autocast leaves in float32."""
    images = inputs.flatten(0, 1)
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)

    def wide(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda rows, *rest, **named: norm(rows.float(), *rest, **named)

    with (
        torch.autocast("cpu", torch.bfloat16),
        mock.patch.object(F, "group_norm", wide(F.group_norm)),
        mock.patch.object(F, "layer_norm", wide(F.layer_norm)),
    ):
        outputs = model(images)
    loss = F.cross_entropy(outputs.float(), targets.repeat_interleave(inputs.shape[1]))
    loss.backward()


def copies(case: Case, views: int) -> int:
    """Tensors between host and device within a piece, on torch's meta device, second call."""
    model = case.model().to("meta")
    inputs = torch.empty((PIECE // views, views, *case.shape), device="meta")
    targets = torch.zeros(len(inputs), dtype=torch.int64, device="meta")
    spy = Spy(answer=lambda asked: True if asked.dtype == torch.bool else 1.0)
    with (
        as_on_a_gpu(spy),
        mock.patch.object(engine, "sizes", return_value=inputs.shape[:2]),
        # The meta device has no autocast.
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(torch, "autocast", return_value=nullcontext()),
    ):
        for _ in range(2):
            spy.count = Count()
            with spy:
                clipped_sum(model, inputs, targets, cross_entropy, FlatClip(1.0), Options(10 * GIB, GIB))
    return spy.count.copies


def row_of(case: Case, views: int) -> dict[str, Any]:
    """One row of the table."""
    shape = (PIECE // views, views, *case.shape)
    with mock.patch.object(independence, "check"):  # in calls number 1, 2, 4, 8, ... only
        ours = counted(case.model(), shape, clipped, warm=1)
    plain = counted(case.model(), shape, ordinary)
    pieces = -(-STEP * views // PIECE)
    return {
        "model": case.name,
        "views": views,
        "precision": "bfloat16",
        "piece": PIECE,
        "launched": sum(ours.launched.values()),
        "waits": sum(ours.waits.values()),
        "copies": copies(case, views),
        "launched_a_step": pieces * sum(ours.launched.values()),
        "waits_a_step": pieces * sum(ours.waits.values()),
        "least_ms": 1e3 * ours.seconds,
        "ordinary_launched": sum(plain.launched.values()),
        "ordinary_least_ms": 1e3 * plain.seconds,
        "ratio": ours.seconds / plain.seconds,
        "most": [[name, round(1e3 * seconds, 3)] for name, seconds in ours.by.most_common(8)],
    }


_BEFORE = """
import json, sys, torch
from collections import Counter
from torch.utils._python_dispatch import TorchDispatchMode
from fedsim import models
from fedsim.config import ModelConfig
from fedsim.grads import FlatClip
from fedsim.grads.bookkeeping import clipped_sum
from fedsim.grads.per_example import cross_entropy
case = json.loads(sys.argv[1])

class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))

model = models.build(ModelConfig(case["family"], case["options"]), tuple(case["shape"]), case["classes"], 0)
found = {}
for examples in (SIZES[1], *SIZES):  # the first call finds the model unknown
    inputs = torch.randn(examples, case["views"], *case["shape"])
    with Counting() as counting:
        clipped_sum(model, inputs, torch.zeros(examples, dtype=torch.int64), cross_entropy, FlatClip(1.0))
    found[examples] = counting.seen
print(json.dumps(found))
"""


def before(case: Case, views: int, checkout: Path) -> dict[str, Any]:
    """What another checkout launches and waits for on the same piece."""
    given = {
        "family": case.family,
        "options": case.options,
        "shape": case.shape,
        "classes": case.classes,
        "views": views,
    }
    answer = subprocess.run(
        [sys.executable, "-c", _BEFORE.replace("SIZES", repr(SIZES)), json.dumps(given)],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {int(size): seen for size, seen in json.loads(answer.stdout.splitlines()[-1]).items()}
    examples = PIECE // views

    def extended(names: Sequence[str]) -> int:
        few, more = (sum(found[size].get(name, 0) for name in names) for size in SIZES)
        return more + (more - few) * (examples - SIZES[1]) // (SIZES[1] - SIZES[0])

    names = sorted(set(found[SIZES[0]]) | set(found[SIZES[1]]))
    launched = extended([name for name in names if name not in FREE | WAITS])
    pieces = -(-STEP * views // PIECE)
    return {
        "launched": launched,
        "convolution_backward": extended(["convolution_backward"]),
        "waits": extended([name for name in names if name in WAITS]),
        "launched_a_step": pieces * launched,
    }


def main() -> None:
    """Count, print a table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="folder of a checkout to count beside")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for name in MODELS:
        for views in (1, 16):
            row = row_of(CASES[name], views)
            if given.before is not None:
                row["before"] = before(CASES[name], views, given.before.resolve())
            rows.append(row)
            print(
                f"{name:9} K={views:2} {row['launched']:5} launched, {row['waits']} waits, "
                f"{row['copies']} copies; at least {row['least_ms']:.1f} ms, {row['ratio']:.2f} of "
                f"ordinary; before: {row.get('before', {}).get('launched', '')}",
                flush=True,
            )
    if given.json is not None:
        result = {
            "command": "python -m benchmarks.launches "
            + " ".join("CHECKOUT" if word == str(given.before) else word for word in sys.argv[1:]),
            "commit": provenance.commit(),
            "hardware": provenance.hardware(),
            "card": H100.name,
            "rows": rows,
        }
        if given.before is not None:
            result["before_commit"] = commit_of(given.before)
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
