"""`run` and `verify`: train one configuration, or train it twice and compare."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim import validate
from fedsim.cli import show
from fedsim.cli.arguments import command, config_arguments, importing, load

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
        engine_argument(parser)
        parser.add_argument("--out", type=Path, help="folder of the run (default: runs/TITLE-HASH)")
        parser.add_argument("--resume", action="store_true", help="continue the run that --out holds")


def engine_argument(parser: argparse.ArgumentParser) -> None:
    """Add the choice between this process and Flower's simulation."""
    parser.add_argument(
        "--engine",
        choices=("local", "flower"),
        default="local",
        help="in this process, or Flower's simulation",
    )


def train(config: Config, folder: RunFolder, engine: str, resume: bool, quiet: bool) -> dict[str, Any]:
    """Check everything, then train with the chosen engine; a finished run's result is returned as it is."""
    with importing():
        from fedsim.engine.experiment import prepare
        from fedsim.engine.metrics import ConsoleProgress
        from fedsim.grads.bookkeeping.memory import retain_freed_memory

    retain_freed_memory()
    folder.check(config, resume)
    if (done := folder.finished()) is not None:
        return done
    experiment = prepare(config)
    progress = None
    if config.monitor.progress and not quiet:
        progress = ConsoleProgress(experiment.plan.steps, config.title)
    try:
        if engine == "flower":
            from fedsim.flower.launch import simulate

            return simulate(config, folder, resume, progress)
        from fedsim.flower.client_app import app
        from fedsim.flower.local_grid import LocalGrid
        from fedsim.flower.server_app import train as train_on

        return train_on(LocalGrid(app, config.federation.nodes), experiment, folder, resume, progress)
    finally:
        if progress is not None:
            progress.close()


def _run(options: argparse.Namespace) -> dict[str, Any]:
    config = load(options)
    folder = _folder(options.out, config)
    result = train(config, folder, options.engine, options.resume, quiet=options.json)
    if not options.json:
        _print_result(result, folder)
    return result


def _folder(out: Path | None, config: Config) -> RunFolder:
    from fedsim.engine.run_folder import RunFolder, default_name

    return RunFolder(out or Path("runs") / default_name(config))


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    """Train federated and centralized and compare accuracy, epsilon, time and every parameter."""
    import torch
    from rich.console import Console
    from safetensors.torch import load_file

    from fedsim.engine.run_folder import default_name

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
        federation=dataclasses.replace(config.federation, holders=1, nodes=1, partition="iid"),
    )
    base = options.out or Path("runs") / default_name(config)
    rows: dict[str, tuple[dict[str, Any], RunFolder]] = {}
    for name, which, engine in (("federated", config, options.engine), ("centralized", central, "local")):
        folder = _folder(base / name, which)
        if not options.json:
            how = (
                f"{which.federation.holders} holders on {which.federation.nodes} nodes"
                if name == "federated"
                else "one holder"
            )
            print(f"{name}: {how}, engine {engine}, in {folder.root}", file=sys.stderr)
        rows[name] = (train(which, folder, engine, options.resume, quiet=options.json), folder)
    first, second = (load_file(rows[name][1].final) for name in ("federated", "centralized"))
    difference = max(float(torch.max(torch.abs(first[k] - second[k]))) for k in first)
    answer = {name: result for name, (result, _) in rows.items()} | {
        "largest_parameter_difference": difference
    }
    if not options.json:
        table = show.table(
            "", "test accuracy", "epsilon per example", "epsilon per holder", "steps", "seconds"
        )
        for name, (result, _) in rows.items():
            spent = result["epsilon"]
            table.add_row(
                name,
                f"{100 * result['accuracy']:.2f}%",
                show.value(spent["example"]["value"]) if "example" in spent else "-",
                show.value(spent["holder"]["value"]) if "holder" in spent else "-",
                str(result["steps"]),
                f"{result['seconds']:.0f}",
            )
        console = Console()
        console.print(table)
        for name, (result, _) in rows.items():
            for unit in ("example", "holder"):
                if unit in result["epsilon"]:
                    console.print(
                        f"{name}, per {unit}: {show.spent(result['epsilon'][unit])}", highlight=False
                    )
        console.print(f"Largest difference between any two parameters: {difference:.2e}", highlight=False)
        print(f"TensorBoard: .venv/bin/tensorboard --logdir {base}")
        print(f"Results:     {rows['federated'][1].result}")
        print(f"Try next:\n{_next_runs(options.config, config)}")
    return answer


def _next_runs(name: str, config: Config) -> str:
    """Commands that change one thing of this run: its budget, if it has one, or the number of owners."""
    budget = config.privacy.target_epsilon
    changes = {f"federation.holders={10 * config.federation.holders}": "same parameters, more owners"}
    if budget is not None:
        smaller = 1.0 if budget > 1 else budget / 2
        changes = {f"privacy.target_epsilon={smaller:g}": "what stronger privacy costs"} | changes
    return "\n".join(f"  .venv/bin/fedsim run {name} {new:33}  # {why}" for new, why in changes.items())


def _print_result(result: dict[str, Any], folder: RunFolder) -> None:
    from rich.console import Console

    table = show.table(result["title"] or "run", "")
    if "accuracy" in result:
        table.add_row("test accuracy", f"{100 * result['accuracy']:.2f}%")
    for name, spent in result["epsilon"].items():
        table.add_row(f"epsilon ({name})", show.spent(spent))
    table.add_row(
        "steps", f"{result['steps']}" + (" (stopped by the budget)" if result["stopped_by_budget"] else "")
    )
    if "seconds" in result:
        table.add_row("seconds", f"{result['seconds']:.1f}")
    table.add_row("folder", str(folder.root))
    Console().print(table)
    if result["noise_source"] == "seeded" and result["noise_multiplier"]:
        print(
            "Noise came from the seed: whoever knows it can remove it. In deployment use "
            "privacy.noise_source=secure."
        )
    print(f"TensorBoard: .venv/bin/tensorboard --logdir {folder.root}")
