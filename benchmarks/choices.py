"""How well does the engine's cost model rank the ways to per-example norms? Measure them and compare.

    python -m benchmarks.choices [--examples 16] [--repeats 7] [--channels-last]

For convolution and linear layers of the benchmark models, each way is timed (per-example norms and weighted
sum, one thread, CPU time), beside torch's own weight gradient. A star marks the model's choice; the last
column is its time over the best. The engine itself never measures: its choice must not differ between two
runs of one recipe.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fedsim.grads.bookkeeping import choose
from fedsim.grads.bookkeeping.conv import ConvUse, Geometry
from fedsim.grads.bookkeeping.linear import LinearUse
from fedsim.grads.bookkeeping.memory import retain_freed_memory
from fedsim.grads.bookkeeping.standardise import Standardisation
from fedsim.grads.bookkeeping.tape import Tape

CONVOLUTIONS = [  # in, out, image, kernel, stride
    (3, 16, 32, 3, 1),
    (3, 32, 32, 3, 1),
    (16, 64, 32, 3, 1),
    (16, 64, 32, 1, 1),
    (32, 64, 16, 3, 1),
    (64, 64, 32, 3, 1),
    (64, 64, 8, 3, 1),
    (64, 128, 4, 3, 1),
    (64, 128, 32, 3, 2),
    (64, 128, 32, 1, 2),
    (128, 128, 16, 3, 1),
    (128, 256, 16, 3, 2),
    (128, 256, 16, 1, 2),
    (256, 256, 8, 3, 1),
]
LINEAR = [(64, 48, 192), (64, 192, 192), (64, 192, 576), (64, 192, 768), (64, 768, 192), (1024, 192, 768)]


def main() -> None:
    """Run the comparison and print one line a layer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--standardised", action="store_true", help="kernels of weight-standardised layers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    retain_freed_memory()
    torch.manual_seed(0)
    for name, native, ways, chosen in itertools.chain(_convolutions(arguments), _linear(arguments)):
        times = _times({"native": native, **ways}, arguments.repeats)
        best = min(times[way] for way in ways)
        shown = "  ".join(f"{way}{'*' if way == chosen else ''} {1e3 * t:.2f}" for way, t in times.items())
        print(f"{name:34s} {shown}   {times[chosen] / best:.2f}", flush=True)


Case = tuple[str, Callable[[], object], dict[str, Callable[[], object]], str]


def _convolutions(arguments: argparse.Namespace) -> Iterator[Case]:
    for channels, out, size, kernel, stride in CONVOLUTIONS:
        yield _convolution(arguments, channels, out, size, kernel, stride)


def _convolution(
    arguments: argparse.Namespace, channels: int, out: int, size: int, kernel: int, stride: int
) -> Case:
    views, examples = arguments.views, arguments.examples
    module = nn.Conv2d(channels, out, kernel, stride, kernel // 2)
    inputs = torch.randn(examples * views, channels, size, size)
    if arguments.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        output = module(inputs)
    gradient = torch.randn_like(output)
    geometry = Geometry((stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
    standard = _standardisation(module.weight) if arguments.standardised else None

    def use_on(tape: Tape) -> ConvUse:
        edges = (output.shape[2], output.shape[3])
        return ConvUse(tape, module.weight, geometry, inputs, edges, standard)

    def run(plan: str, keep: bool) -> Callable[[], object]:
        def once() -> object:
            with Tape(module, examples, views, 2**40, 2**24) as tape:
                use = use_on(tape)
                use.plan, use.keep = plan, keep
                use.remember(output, None)
                use.fill(inputs, gradient)
                return use.weighted(torch.ones(examples))

        return once

    def native() -> object:
        return geometry.backward(gradient, inputs, module.weight, (False, True, False))

    pairs = itertools.product(("loop", "grouped", "patches", "slices"), (True, False))
    ways = {_name(plan, keep): run(plan, keep) for plan, keep in pairs}
    if views * output[0, 0].numel() <= 512:
        ways["gram drop"] = run("gram", False)
    with Tape(module, examples, views, 2**40, 2**24) as tape:
        chosen = use_on(tape)
    name = f"conv {channels}->{out} {kernel}x{kernel}/{stride} at {size}"
    return name, native, ways, _name(chosen.plan, chosen.keep)


def _name(plan: str, keep: bool) -> str:
    return f"{plan} {'keep' if keep else 'drop'}"


def _standardisation(weight: Tensor) -> Standardisation:
    """One with all passes a real one needs; its numbers do not matter here."""
    one = torch.ones(weight.shape[0], dtype=torch.float64)
    return Standardisation(weight.detach().flatten(1), one, one, one, 1.0, True)


def _linear(arguments: argparse.Namespace) -> Iterator[Case]:
    for places, width_in, width_out in LINEAR:
        yield _linear_layer(arguments, places, width_in, width_out)


def _linear_layer(arguments: argparse.Namespace, places: int, width_in: int, width_out: int) -> Case:
    views, examples = arguments.views, arguments.examples
    module = nn.Linear(width_in, width_out)
    inputs = torch.randn(examples * views, places, width_in)
    gradient = torch.randn(examples * views, places, width_out)

    def run(plan: str) -> Callable[[], object]:
        def once() -> object:
            with Tape(module, examples, views, 2**40, 2**24) as tape:
                use = LinearUse(tape, module.weight, places * views, False)
                use.plan = plan
                use.fill(inputs, gradient)
                return use.weighted(torch.ones(examples))

        return once

    def native() -> object:
        return gradient.flatten(0, 1).t() @ inputs.flatten(0, 1)

    with Tape(module, examples, views, 2**40, 2**24) as tape:
        chosen = choose.linear(tape, places * views, width_in, width_out, 4)
    name = f"linear {width_in}->{width_out} x {places}"
    return name, native, {plan: run(plan) for plan in ("keep", "gram", "drop")}, chosen


def _times(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each way, interleaved, each after one untimed call."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for _ in range(repeats):
            for way, run in ways.items():
                run()
                start = time.process_time()
                run()
                times[way].append(time.process_time() - start)
    return {way: statistics.median(found) for way, found in times.items()}


if __name__ == "__main__":
    main()
