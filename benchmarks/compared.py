"""One command a table: run a comparison of configs/compare/ and bring README.md and docs/ up to date.

    python -m benchmarks.compared trust_models --search
    python -m benchmarks.compared holders label_skew
    python -m benchmarks.compared                  # all of them

Finished runs are kept, so the same command goes on where it stopped. --search chooses the settings anew
before, where configs/tune/NAME.yaml says how (`fedsim tune`), and writes configs/tuned/NAME.yaml. Full
Fashion-MNIST is fetched where a comparison needs it. What was measured is kept as results/NAME.json, with
what a search cost.
"""

from __future__ import annotations

import argparse
import json
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


def names() -> list[str]:
    """Return the comparisons of configs/compare/."""
    return sorted(path.stem for path in (CONFIG_DIR / "compare").glob("*.yaml"))


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


def searched(name: str, folder: Path) -> dict[str, Any]:
    """Return what is kept of the search in `folder`: its command, commit, seconds, and every trial."""
    held = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    parts = ("variant", "epsilon", "settings", "score")
    return {
        "command": f"fedsim tune tune/{name}",
        **{key: held[key] for key in ("commit", "seconds", "holdout_examples", "epsilons")},
        "trials": [{part: trial[part] for part in parts} for trial in held["trials"]],
    }


def known_search(wanted: Comparison, before: Path) -> dict[str, Any] | None:
    """Return the search that the last result file tells of, if the settings of today came from it."""
    if wanted.tuned is None or not before.is_file():
        return None
    search: dict[str, Any] | None = json.loads(before.read_text(encoding="utf-8"))["search"]
    tried = [] if search is None else [(t["variant"], t["epsilon"], t["settings"]) for t in search["trials"]]
    chosen = Tuned.read(Path(wanted.tuned)).chosen
    return search if all((c.variant, c.epsilon, c.settings) in tried for c in chosen) else None


def make(name: str, overrides: Sequence[str], out: Path, *, search: bool, results: Path) -> Path:
    """Run what is missing of a comparison and write its result file; return the path.

    Args:
        name: under configs/compare/, or the path of a comparison.
        overrides: "key=value" strings for all runs.
        out: folder of all runs: compare/TITLE and tune/TITLE below it.
        search: choose the settings first.
        results: folder of the result file.

    Raises:
        FedsimError: a run, its configuration or its data is missing or wrong.
    """
    stem = Path(name).stem
    source = name if Path(name).is_file() else f"compare/{name}"
    path = results / f"{stem}.json"
    kept = _search(stem, overrides, out / "tune") if search else None
    wanted = compare.load(source)
    _fetch(wanted, overrides)
    command = " ".join(["fedsim compare", source, *overrides])
    folder = out / "compare" / file_name(wanted.title, "comparison")
    cells = compare.run(wanted, list(overrides), folder, runner_of("local"), sys.stderr, command)
    if len(cells) != (runs := len(compare.cells(wanted, list(overrides)))):
        raise RunError(f"{runs - len(cells)} of {runs} runs diverged: see {folder / 'report.html'}.")
    held = collect(cells, command, kept or known_search(wanted, path))
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(held['rows'])} rows of {len(held['cells'])} runs, {held['seconds']:.0f} s")
    return path


def _search(name: str, overrides: Sequence[str], out: Path) -> dict[str, Any]:
    """Run what is missing of a search and take its settings up."""
    wanted = tune.load(f"tune/{name}")
    folder = out / file_name(wanted.title, "search")
    tune.run(wanted, list(overrides), folder, runner_of("local"), sys.stderr)
    settings = (folder / "tuned.yaml").read_text(encoding="utf-8")
    about = f"# Written by `fedsim tune tune/{name}`.\n"
    (CONFIG_DIR / "tuned" / f"{name}.yaml").write_text(about + settings, encoding="utf-8")
    return searched(name, folder)


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
    options = parser.parse_args(arguments)
    try:
        for name in options.names or names():
            make(name, options.set, options.out, search=options.search, results=tables.RESULTS)
    except FedsimError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return report.main([])


if __name__ == "__main__":
    sys.exit(main())
