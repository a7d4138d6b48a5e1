"""How well does the engine's cost model rank the ways to per-example norms? Measure them and compare.

    python -m benchmarks.choices [--models NAME ...] [--views K] [--repeats N] [--channels-last]

Each way is forced on every layer of a benchmark model in turn, and the time of a layer's norms and weighted
sum is taken within the whole step: alone, with its tensors in the cache, a layer ranks differently. One
thread, CPU milliseconds, medians. A star marks the model's own choice; the last column is its time over the
best. The engine itself never measures: its choice must not differ between two runs of one recipe.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.models import CASES, Case
from benchmarks.peers import ours
from fedsim.grads.bookkeeping import Options, choose
from fedsim.grads.bookkeeping.conv import ConvUse
from fedsim.grads.bookkeeping.geometry import Geometry
from fedsim.grads.bookkeeping.linear import LinearUse
from fedsim.grads.bookkeeping.memory import retain_freed_memory

FORMING = ("loop", "grouped", "patches", "slices")
LARGEST_GRAM = 512  # places; beyond, the Gram matrix is out of the question
Layer = tuple[int, str]
AnyUse = ConvUse | LinearUse


def main() -> None:
    """Run the comparison and print one line a layer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=["cnn", "wrn-16-4", "vit-tiny"])
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--channels-last", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    retain_freed_memory()
    for name in arguments.models:
        seconds, own = _measure(CASES[name], arguments.views, arguments.repeats, arguments.channels_last)
        for layer, found in seconds.items():
            times = {way: 1e3 * statistics.median(values) for way, values in found.items()}
            shown = "  ".join(f"{w}{'*' if w == own[layer] else ''} {t:.2f}" for w, t in times.items())
            over = times[own[layer]] / min(times.values())
            print(f"{name} {layer[0]:2d} {layer[1]:24s} {shown}   {over:.2f}", flush=True)


def _measure(
    case: Case, views: int, repeats: int, channels_last: bool
) -> tuple[dict[Layer, dict[str, list[float]]], dict[Layer, str]]:
    """Seconds of each layer by way, and the way each would have taken by itself."""
    examples = case.examples if views == 1 else max(1, case.examples * 2 // views)
    step = ours(Options(channels_last=channels_last))(case.model(), *case.batch(examples, views))
    step()  # the engine's check of itself
    own: dict[Layer, str] = {}
    with _timed(own):
        step()
    seconds: dict[Layer, dict[str, list[float]]] = {layer: {} for layer in sorted(own)}
    for _ in range(repeats):
        for convolution, linear in zip((*FORMING, "gram"), ("keep", "gram", "drop", "", ""), strict=True):
            with _forced(convolution, linear):
                step()
                way: dict[Layer, str] = {}
                with _timed(way) as spent:
                    step()
            for layer, value in spent.items():
                seconds[layer].setdefault(way[layer], []).append(value)
    return seconds, own


@contextmanager
def _forced(convolution: str, linear: str) -> Iterator[None]:
    """Let every layer that can go these ways; the others choose."""
    choices = choose.convolution, choose.linear

    def of_convolution(
        tape: Any, kernel: Any, inputs: Tensor, geometry: Geometry, standardised: bool
    ) -> tuple[str, bool]:
        outputs = geometry.outputs((inputs.shape[3], inputs.shape[4]), (kernel[2], kernel[3]))
        places = inputs.shape[1] * outputs[0] * outputs[1]
        groups = geometry.groups
        if convolution == "gram" and groups == 1 and places <= LARGEST_GRAM:
            return convolution, False
        if convolution in FORMING[: 2 if groups > 1 else None]:
            return convolution, True
        return choices[0](tape, kernel, inputs, geometry, standardised)

    def of_linear(tape: Any, positions: int, *sizes: int) -> str:
        return linear if linear and positions > 1 else choices[1](tape, positions, *sizes)

    with patch.object(choose, "convolution", of_convolution), patch.object(choose, "linear", of_linear):
        yield


@contextmanager
def _timed(way: dict[Layer, str]) -> Iterator[dict[Layer, float]]:
    """Yield the seconds each layer takes meanwhile; put the way it went into `way`."""
    spent: dict[Layer, float] = {}
    layers: dict[int, Layer] = {}
    early: dict[int, float] = {}  # what the forward pass measured

    def see(look: Callable[[LinearUse, Tensor], None]) -> Callable[[LinearUse, Tensor], None]:
        def timed(use: LinearUse, rows: Tensor) -> None:
            began = time.process_time()
            look(use, rows)
            early[id(use)] = early.get(id(use), 0.0) + time.process_time() - began

        return timed

    def squares(measure: Callable[[AnyUse], Tensor]) -> Callable[[AnyUse], Tensor]:
        def timed(use: AnyUse) -> Tensor:
            place = next(index for index, other in enumerate(use.tape.uses) if other is use)
            layer = layers[id(use)] = place, " x ".join(map(str, use.weight.shape))
            way[layer] = use.plan
            began = time.process_time()
            result = measure(use)
            spent[layer] = time.process_time() - began + early.get(id(use), 0.0)
            return result

        return timed

    def weighted(contract: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(use: AnyUse, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
            began = time.process_time()
            result = contract(use, coefficients, out)
            spent[layers[id(use)]] += time.process_time() - began
            return result

        return timed

    with ExitStack() as stack:
        for kind in (ConvUse, LinearUse):
            stack.enter_context(patch.object(kind, "squares", squares(kind.squares)))
            stack.enter_context(patch.object(kind, "weighted", weighted(kind.weighted)))
        stack.enter_context(patch.object(LinearUse, "see", see(LinearUse.see)))
        yield spent


if __name__ == "__main__":
    main()
