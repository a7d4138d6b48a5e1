"""One command a table: run a comparison of configs/compare/ and bring README.md and docs/ up to date.

    python -m benchmarks.compared trust_models --search
    python -m benchmarks.compared holders label_skew
    python -m benchmarks.compared                  # all of them
    python -m benchmarks.compared sizes --set train.steps=3     # a try: into runs/results/

Finished runs are kept, so the same command goes on where it stopped. --search chooses the settings anew
before, where configs/tune/NAME.yaml says how (`fedsim tune`), and writes configs/tuned/NAME.yaml. Full
Fashion-MNIST is fetched where a comparison needs it. What was measured is kept as results/NAME.json, with
what a search cost.

With --set, a comparison is another one than the pages show: its result, and the settings that a search chose
for it, go to OUT/results/ (or where --results says), and results/, configs/tuned/ and pages stay as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report, tables
from fedsim import loading
from fedsim.cli.many import runner_of
from fedsim.config import CONFIG_DIR
from fedsim.data import fetch
from fedsim.engine.run_folder import file_name
from fedsim.headline import Metric
from fedsim.report.cells import Cell
from fedsim.report.findings import findings
from fedsim.report.table import note, table
from fedsim.study import compare, tune
from fedsim.study.compare import Comparison
from fedsim.study.tuned import Tuned
from fedsim.validate import FedsimError, InputError, RunError

FIRST = "quickstart"
"""The comparison that the tour shows, which has no table here: that of trust_models says more."""


def names() -> list[str]:
    """Return the comparisons of configs/compare/ that have a table."""
    return sorted({path.stem for path in (CONFIG_DIR / "compare").glob("*.yaml")} - {FIRST})


def collect(cells: Sequence[Cell], command: str, search: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of results/NAME.json.

    Args:
        cells: all runs of a comparison.
        command: that gives them again.
        search: what is kept of the search that chose its settings (`searched`).

    Returns:
        findings and note: what it says; rows: the table, a mapping from column to text each; cells:
        variant, epsilon, seed, the headline, seconds and commit of every run; command, commit, hardware
        and seeds. `commit` lists all commits the runs were made at.

    Raises:
        InputError: the runs are of several machines.
    """
    machines = {json.dumps(cell.result["hardware"], sort_keys=True) for cell in cells}
    if len(machines) > 1:
        raise InputError(f"runs of `{command}` were made on {len(machines)} kinds of hardware. Use one.")
    return {
        "command": command,
        "commit": ", ".join(dict.fromkeys(cell.result["commit"] for cell in cells)),
        "hardware": cells[0].result["hardware"],
        "seeds": sorted({cell.seed for cell in cells}),
        "seconds": sum(cell.result["seconds"] for cell in cells),
        "findings": findings(cells),
        "rows": table(cells),
        "note": note(cells),
        "cells": [
            {
                "variant": cell.variant,
                "epsilon": cell.epsilon,
                "seed": cell.seed,
                Metric.of(cell.result).name: cell.result[Metric.of(cell.result).name],
                **{key: cell.result[key] for key in ("seconds", "commit")},
            }
            for cell in cells
        ],
        "search": search,
    }


def searched(name: str, folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what is kept of the search in `folder`: its command, with the `overrides` of all trials, its
    commit, its seconds, and every trial."""
    held = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    parts = ("variant", "epsilon", "settings", "score")
    return {
        "command": _tune_command(name, overrides),
        **{key: held[key] for key in ("commit", "seconds", "holdout_examples", "epsilons")},
        "trials": [{part: trial[part] for part in parts} for trial in held["trials"]],
    }


def known_search(wanted: Comparison, before: Path) -> dict[str, Any] | None:
    """Return the search that the last result file tells of, if the settings of today came from it."""
    if wanted.tuned is None or not before.is_file():
        return None
    search: dict[str, Any] | None = json.loads(before.read_text(encoding="utf-8"))["search"]
    return search if Tuned.read(Path(wanted.tuned)).came_of(search["trials"] if search else []) else None


def _tune_command(name: str, overrides: Sequence[str]) -> str:
    return shlex.join(["fedsim", "tune", f"tune/{name}", *overrides])


def make(name: str, overrides: Sequence[str], out: Path, *, search: bool, results: Path) -> Path:
    """Run what is missing of a comparison and write its result file; return the path.

    Args:
        name: under configs/compare/, or the path of a comparison.
        overrides: "key=value" strings for all runs.
        out: folder of all runs: compare/TITLE and tune/TITLE below it.
        search: choose the settings first.
        results: folder of the result file, and of the settings that a search chose; where it is results/ and
            nothing is overridden, they are written to configs/tuned/ instead.

    Raises:
        FedsimError: a run, its configuration or its data is missing or wrong.
    """
    stem = Path(name).stem
    source = name if Path(name).is_file() else f"compare/{name}"
    path, known = results / f"{stem}.json", tables.RESULTS / f"{stem}.json"
    wanted, kept = compare.load(source, untuned=search), None
    if search:
        published = results == tables.RESULTS and not overrides
        tuned = CONFIG_DIR / "tuned" / f"{stem}.yaml" if published else results / f"{stem}.tuned.yaml"
        kept = _search(stem, overrides, out / "tune", tuned)
        wanted = dataclasses.replace(wanted, tuned=str(tuned))
    _fetch(wanted, overrides)
    command = ""

    def typed(given: Sequence[str]) -> str:
        nonlocal command
        command = shlex.join(["fedsim", "compare", source, *given])
        return command

    folder = out / "compare" / file_name(wanted.title, "comparison")
    cells = compare.run(wanted, list(overrides), folder, runner_of("local"), sys.stderr, typed)
    if len(cells) != (runs := len(compare.cells(wanted, list(overrides)))):
        raise RunError(f"{runs - len(cells)} of {runs} runs have no score: see {folder / 'report.html'}.")
    held = collect(cells, command, kept or known_search(wanted, path if path.is_file() else known))
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(held['rows'])} rows of {len(held['cells'])} runs, {held['seconds']:.0f} s")
    return path


def _search(name: str, overrides: Sequence[str], out: Path, tuned: Path) -> dict[str, Any]:
    """Run what is missing of a search and write the settings it chose to `tuned`."""
    wanted = tune.load(f"tune/{name}")
    folder = out / file_name(wanted.title, "search")
    tune.run(wanted, list(overrides), folder, runner_of("local"), sys.stderr)
    settings = (folder / "tuned.yaml").read_text(encoding="utf-8")
    tuned.parent.mkdir(parents=True, exist_ok=True)
    about = f"# Written by `{_tune_command(name, overrides)}`.\n"
    tuned.write_text(about + settings, encoding="utf-8")
    return searched(name, folder, overrides)


def _fetch(wanted: Comparison, overrides: Sequence[str]) -> None:
    """Get the full Fashion-MNIST if a comparison reads it and it is not there."""
    config = loading.load(wanted.recipe, [*wanted.overrides, *overrides])
    if config.data.name == "fashion_mnist":
        root = [] if config.data.root is None else ["--root", config.data.root]
        if fetch.main(["fashion_mnist", *root]):
            raise InputError("Full Fashion-MNIST must be there; the reasons are above.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the tables, or print what is wrong; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="under configs/compare (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="for all runs")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="of the runs (default: runs)")
    parser.add_argument("--search", action="store_true", help="choose the settings anew")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="of result files; the pages follow results/ alone (default: results, with --set OUT/results)",
    )
    options = parser.parse_args(arguments)
    results = options.results or (options.out / "results" if options.set else tables.RESULTS)
    if results.resolve() == tables.RESULTS.resolve():
        results = tables.RESULTS
    try:
        if options.set and results == tables.RESULTS:
            raise InputError(
                "--results must be another folder than results/ with --set, for pages show comparisons "
                "as they are under configs/compare/. Leave --results out: it is then OUT/results."
            )
        for name in options.names or names():
            search = options.search and (CONFIG_DIR / "tune" / f"{Path(name).stem}.yaml").is_file()
            if options.search and not search:
                print(f"{name}: no configs/tune/{Path(name).stem}.yaml says how to search; settings stay.")
            make(name, options.set, options.out, search=search, results=results)
    except FedsimError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if results != tables.RESULTS:
        print(f"README.md, docs/ and results/ stay as they are: this went to {results}.")
        return 0
    return report.main([])


if __name__ == "__main__":
    sys.exit(main())
