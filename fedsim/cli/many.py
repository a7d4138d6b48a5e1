"""`compare` and `repeat`: many runs of one recipe, those that are finished kept."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.cli import show
from fedsim.cli.arguments import command, config_arguments
from fedsim.cli.training import backend_argument
from fedsim.headline import Metric

if TYPE_CHECKING:
    from fedsim.config import Config
    from fedsim.engine.run_folder import RunFolder
    from fedsim.study.compare import Runner


def add(commands: Any) -> None:
    """Register the commands."""
    compare = command(
        commands,
        "compare",
        _compare,
        "one recipe under several trust models, budgets and seeds: table and page",
    )
    config_arguments(compare)
    compare.add_argument("--out", type=Path, help="folder of the comparison (default: runs/compare/TITLE)")
    compare.set_defaults(goes_on="the same command")

    repeat = command(
        commands,
        "repeat",
        _repeat,
        "one recipe with several seeds: mean and spread, as a result file",
        "Every seed runs in its own folder under --out; the same command again continues where it stopped "
        "and keeps finished seeds.",
    )
    config_arguments(repeat)
    backend_argument(repeat)
    repeat.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    repeat.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="also write the result here, as results/NAME.json",
    )
    repeat.add_argument("--out", type=Path, help="folder of the runs (default: runs/repeat/TITLE)")
    repeat.set_defaults(goes_on="the same command")


def _compare(options: argparse.Namespace) -> Any:
    """Run the cells of a comparison that are not finished, and show the table."""
    from fedsim.engine.run_folder import file_name
    from fedsim.report.findings import findings
    from fedsim.report.table import COSTS, RESULTS, costs, note, table
    from fedsim.study import compare

    wanted = compare.load(options.config)
    out = options.out or Path("runs") / "compare" / file_name(wanted.title, "comparison")

    def typed(overrides: Sequence[str]) -> str:
        return shlex.join(["fedsim", "compare", options.config, *overrides])

    done = compare.run(wanted, options.overrides, out, runner_of("local"), sys.stderr, typed)
    if not options.json:
        console = show.console()
        print("\n".join(findings(done)), note(done), sep="\n")
        for columns, rows in ((RESULTS, table(done)), (COSTS, costs(done))):
            shown = show.table(*columns)
            for row in rows:
                shown.add_row(*(row[column] for column in columns))
            console.print(shown)
        print(f"Page:  {out / 'report.html'}\nTable: {out / 'table.md'} and table.csv")
    return [dataclasses.asdict(cell) for cell in done]


def _repeat(options: argparse.Namespace) -> dict[str, Any]:
    """Run the seeds that are not finished, show mean and spread, and write the result file."""
    from fedsim.study import repeat

    result = repeat.run(
        options.config,
        options.overrides,
        options.seeds,
        options.out,
        runner_of(options.backend),
        sys.stderr,
        backend=options.backend,
        command=lambda overrides, backend: _as_typed(options, overrides, backend),
        results=options.results,
    )
    if not options.json:
        from fedsim.report.significance import of_scores

        headline = Metric.of(result)
        table = show.table("seed", headline.name, "minutes")
        for run in result["runs"]:
            table.add_row(str(run["seed"]), headline.shown(run["score"]), f"{run['minutes']:.1f}")
        table.add_row("all", of_scores(result["scores"], headline), f"{result['minutes']:.1f} each")
        show.console().print(table)
        for unit, spent in result["epsilon"].items():
            print(f"epsilon ({unit}): {show.spent(spent)}")
        print(f"evaluated on {result['evaluated_on']}")
        if result["taken_up"]:
            print(result["taken_up"])
        if result["tuning"]:
            print(f"tuning: {result['tuning']}")
        if options.results is not None:
            print(f"Results: {options.results}")
    return result


def runner_of(backend: str, *, searching: bool = False) -> Runner:
    """Return what trains one configuration into a folder, or goes on there; `searching`: trials of a private
    search."""
    from fedsim import api

    def runner(config: Config, folder: RunFolder) -> dict[str, Any]:
        return api.run(config, folder, backend, resume=True, progress=False, searching=searching)

    return runner


def _as_typed(options: argparse.Namespace, overrides: Sequence[str], backend: str) -> str:
    """The command that gives this result again; without the folder of the runs, which changes nothing."""
    from fedsim.api import BACKENDS

    parts = ["fedsim", "repeat", options.config, *overrides]
    parts += ["--seeds", *map(str, options.seeds)]
    parts += ["--backend", backend] if backend in BACKENDS and backend != "local" else []
    parts += [] if options.results is None else ["--results", options.results.as_posix()]
    return shlex.join(parts)
