"""`features`: compute the features that a configuration uses ahead of its runs, and how that looks."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedsim.cli.arguments import command, config_arguments, importing, load
from fedsim.validate import InputError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from fedsim.data.features import Progress


def add(commands: Any) -> None:
    """Register the command."""
    features = command(
        commands,
        "features",
        _features,
        "compute the features that a configuration uses, ahead of its runs",
        "Goes on where it was stopped. A run computes what it still lacks in the same way.",
    )
    config_arguments(features)
    features.add_argument(
        "--node", type=int, metavar="I", help="only of the training examples that node I hosts (from 0)"
    )
    features.set_defaults(goes_on="the same command")


@contextlib.contextmanager
def shown(seconds: list[float] | None = None) -> Iterator[None]:
    """Within the block, show a bar while features are computed, with examples a second and seconds left.

    Where `seconds` is given, (examples computed, seconds that took) is added to it. No number of examples
    is shown: how many a node hosts is nobody's business.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from fedsim.data import features

    bar = Bar(
        TextColumn("features"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        speed_estimate_period=600.0,
    )
    task: TaskID | None = None
    started = 0.0

    def watch(now: Progress) -> None:
        nonlocal task, started
        if task is None:
            if now.found == now.wanted:
                return
            started = time.monotonic()
            task = bar.add_task("", total=now.wanted, completed=now.found, rate="")
            bar.start()
            return
        passed = time.monotonic() - started
        rate = f"{now.computed / passed:.1f} examples/s" if now.computed else ""
        bar.update(task, completed=now.found + now.computed, rate=rate)
        if now.found + now.computed == now.wanted:
            bar.stop()
            bar.remove_task(task)
            task = None
            if seconds is not None:
                seconds[0] += now.computed
                seconds[1] += passed

    try:
        with features.watched(watch):
            yield
    finally:
        bar.stop()


def _features(options: argparse.Namespace) -> dict[str, Any]:
    with importing():
        from fedsim.data import datasets
        from fedsim.engine import experiment
        from fedsim.grads.bookkeeping.memory import retain_freed_memory

    retain_freed_memory()
    config = load(options)
    chosen = config.data.features
    if chosen is None:
        raise InputError("data.features must name a map for there to be features, got null. Just run.")
    public_only = bool(config.monitor.public_only)
    ids = None
    if options.node is not None:
        raw = datasets.load(dataclasses.replace(config.data, features=None), public_only)
        held = experiment.partition_of(config, raw.train, experiment.task_of(config, raw), config.seed)
        ids = held.ids_of_node(options.node, config.federation.nodes)
    spent = [0.0, 0.0]
    with shown(spent) if not options.json else contextlib.nullcontext():
        files = datasets.extract(config.data, ids, public_only)
    for file in files:
        file.check()
    found = {str(file.path): file.path.stat().st_size for file in files}
    rate = spent[0] / spent[1] if spent[1] else None
    if not options.json:
        for path, size in found.items():
            print(f"{path}: {size:,} bytes")
        print("Nothing was missing." if rate is None else f"Computed {rate:.1f} examples a second.")
    return {"features": chosen.name, "node": options.node, "files": found}
