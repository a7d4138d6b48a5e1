"""`run` and `verify`: train one configuration, or train it twice and compare."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim import validate
from fedsim.cli import extraction, hints, show
from fedsim.cli.arguments import command, config_arguments, importing, load
from fedsim.headline import Metric
from fedsim.report.claim import number

if TYPE_CHECKING:  # torch, flwr and dp-accounting take seconds to import: only where a command needs them
    from fedsim.config import Config
    from fedsim.engine.run_folder import RunFolder


def add(commands: Any) -> None:
    """Register the commands."""
    run = command(commands, "run", _run, "train by a configuration and write the results to a folder")
    verify = command(
        commands, "verify", _verify, "train federated, then the same recipe centralized, and compare the two"
    )
    for parser in (run, verify):
        config_arguments(parser)
        backend_argument(parser)
        parser.add_argument("--out", type=Path, help="folder of the run (default: runs/TITLE-OVERRIDES-HASH)")
        parser.add_argument("--resume", action="store_true", help="continue the run that --out holds")


def backend_argument(parser: argparse.ArgumentParser) -> None:
    """Add the choice between this process and Flower's simulation."""
    parser.add_argument(
        "--backend",
        choices=("local", "simulation"),
        default="local",
        help="in this process, or Flower's simulation",
    )


def _run(options: argparse.Namespace) -> dict[str, Any]:
    config = load(options)
    folder = _folder(options.out, config, options.overrides)
    before = _before(folder)
    result = _train(config, folder, options.backend, options)
    if not options.json:
        _print_result(result, config.data.judged_by, folder, before)
        if compared := hints.comparison(options.config):
            print(f"Trust models side by side, as a page: {compared}")
    return result


def _before(folder: RunFolder) -> str:
    """Say what a folder held before this command: nothing, a part of the run, or the whole."""
    from fedsim.privacy import ledger

    if os.path.isfile(folder.result):  # False for a name that is too long, which the run refuses
        return "trained nothing: the run was finished before"
    if not os.path.isfile(folder.ledger):
        return ""
    return f"went on after step {ledger.read(folder.ledger).steps}"


def _train(config: Config, folder: RunFolder, backend: str, options: argparse.Namespace) -> dict[str, Any]:
    with importing():
        from fedsim import api

    folder.expect(options.resume)
    quiet = options.json or not config.monitor.progress
    with contextlib.nullcontext() if quiet else extraction.shown():
        return api.run(config, folder, backend, options.resume, progress=False if options.json else None)


def _folder(out: Path | None, config: Config, overrides: Sequence[str] = ()) -> RunFolder:
    from fedsim.engine.run_folder import RunFolder, default_folder

    return RunFolder(out or default_folder(Path("runs"), config, overrides))


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    """Train federated and centralized and compare accuracy, epsilon, time and every parameter."""
    import torch
    from safetensors.torch import load_file

    from fedsim.engine.run_folder import default_folder
    from fedsim.merging import Choice

    config = load(options)
    if config.federation.examples_per_holder_at_most is not None or config.monitor.public_only:
        validate.conflicts(
            "verify compares with one holder that has all examples, and shows what it compares: neither "
            "federation.examples_per_holder_at_most nor monitor.public_only goes with it.",
            "Leave both null.",
        )
    central = dataclasses.replace(
        config,
        title=f"{config.title}-centralized",
        federation=dataclasses.replace(config.federation, holders=1, nodes=1, partition=Choice("iid")),
    )
    base = options.out or default_folder(Path("runs"), config, options.overrides)
    rows: dict[str, tuple[dict[str, Any], RunFolder]] = {}
    for name, which, backend in (("federated", config, options.backend), ("centralized", central, "local")):
        folder = _folder(base / name, which)
        if not options.json:
            how = (
                f"{which.federation.holders} holders on {which.federation.nodes} nodes"
                if name == "federated"
                else "one holder"
            )
            print(f"{name}: {how}, backend {backend}, in {hints.short(folder.root)}", file=sys.stderr)
        rows[name] = (_train(which, folder, backend, options), folder)
    first, second = (load_file(rows[name][1].final) for name in ("federated", "centralized"))
    difference = max(float(torch.max(torch.abs(first[k] - second[k]))) for k in first)
    answer = {name: result for name, (result, _) in rows.items()} | {
        "largest_parameter_difference": difference
    }
    if not options.json:
        headline = Metric.of(rows["federated"][0])
        score = f"{config.data.judged_by} {headline.name}"
        table = show.table("", score, "epsilon per example", "epsilon per holder", "steps", "seconds")
        for name, (result, _) in rows.items():
            spent = result["epsilon"]
            table.add_row(
                name,
                headline.shown(result[headline.name]),
                *(number(spent.get(unit, {}).get("value")) for unit in ("example", "holder")),
                str(result["steps"]),
                f"{result['seconds']:.0f}",
            )
        console = show.console()
        console.print(table)
        for name, (result, _) in rows.items():
            for unit in ("example", "holder"):
                if unit in result["epsilon"]:
                    console.print(
                        f"{name}, per {unit}: {show.spent(result['epsilon'][unit])}", highlight=False
                    )
        console.print(f"Largest difference between any two parameters: {difference:.2e}", highlight=False)
        print(hints.tensorboard(base.absolute()))
        print(f"Results:     {hints.short(rows['federated'][1].result)}")
        if further := _next_runs(options.config, config):
            print(f"Try next:\n{further}")
    return answer


def _next_runs(name: str, config: Config) -> str:
    """Commands that change one thing of this run: its budget, if it has one, or the number of owners."""
    from fedsim.partitions import PARTITIONS

    budget = config.privacy.target_epsilon
    changes = {f"federation.holders={10 * config.federation.holders}": "same parameters, more owners"}
    if PARTITIONS.make(config.federation.partition).owned:
        changes = {}  # how many owners there are follows from the data
    if budget is not None:
        smaller = 1.0 if budget > 1 else budget / 2
        changes = {f"privacy.target_epsilon={smaller:g}": "what stronger privacy costs"} | changes
    fedsim = hints.program("fedsim")
    proposed = {f"{fedsim} run {name} {new}": why for new, why in changes.items()}
    if compared := hints.comparison(name):
        proposed[compared] = "trust models side by side: a page for the browser"
    wide = max(map(len, proposed), default=0)
    return "\n".join(f"  {line:{wide}}  # {why}" for line, why in proposed.items())


def _print_result(result: dict[str, Any], judged_by: str, folder: RunFolder, before: str) -> None:
    table = show.table(result["title"] or "run", "")
    headline = Metric.of(result)
    if headline.name in result:
        table.add_row(f"{judged_by} {headline.name}", headline.shown(result[headline.name]))
    for row in show.epsilons(result["epsilon"]):
        table.add_row(*row)
    table.add_row(
        "steps", f"{result['steps']}" + (" (stopped by the budget)" if result["stopped_by_budget"] else "")
    )
    if "seconds" in result:
        table.add_row("seconds", f"{result['seconds']:.1f}")
    if result["tuning"]:
        table.add_row("tuning", result["tuning"])
    if before:
        table.add_row("this command", before)
    table.add_row("folder", hints.short(folder.root))
    show.console().print(table)
    if result["noise_source"] == "seeded" and result["noise_multiplier"]:
        print(
            "Noise came from the seed: whoever knows it can remove it. In deployment use "
            "privacy.noise_source=secure."
        )
    if folder.tensorboard.exists():
        print(hints.tensorboard(folder.root))
