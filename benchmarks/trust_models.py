"""Turn a finished comparison into results/NAME.json, from which README.md and docs/ are generated.

    fedsim compare compare/trust_models                   # or holders, label_skew, dropout_rates, ...
    python -m benchmarks.trust_models runs/compare/trust-models --json results/trust_models.json
    python -m benchmarks.report

Settings that `fedsim tune` chose come with what the search cost: --search runs/tune/TITLE. The name of the
JSON file says which comparison of configs/compare/ it is. Every cell of that comparison must be in the
folder, finished, with exactly its configuration, so that a table never mixes settings; overrides that were
given to `fedsim compare` are given here too. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim import loading
from fedsim.headline import Metric
from fedsim.report.cells import Cell
from fedsim.report.findings import findings
from fedsim.report.table import note, table
from fedsim.study import compare
from fedsim.validate import FedsimError, InputError


def collect(
    folder: Path, name: str, overrides: Sequence[str] = (), search: Path | None = None
) -> dict[str, Any]:
    """Return the content of results/NAME.json.

    Args:
        folder: output folder of `fedsim compare`.
        name: comparison under configs/compare/, or path of one.
        overrides: "key=value" strings the comparison was run with.
        search: folder of the search that chose its settings.

    Returns:
        findings and note: what it says; rows: the table, a mapping from column to text each; cells:
        variant, epsilon, seed, the headline, seconds and commit of every run; command, commit, hardware
        and seeds. `commit` lists all commits the cells were made at; cells of several machines are refused.
        search: command, commit, seconds, held-out examples and every trial of it, or None.

    Raises:
        InputError: the folder has no cells.json, lacks cells of the comparison or holds cells of other
            settings, or its cells were run on different hardware.
    """
    found = _cells(folder)
    source = name if Path(name).is_file() else f"compare/{name}"
    planned = compare.cells(compare.load(source), list(overrides))
    command = " ".join(["fedsim compare", source, *overrides])
    now = _digests(folder)
    by_config = {(cell.variant, now.get(cell.result["config"], "")): cell for cell in found}
    wanted = {(cell.variant, cell.config.digest()): cell.folder for cell in planned}
    missing = [folder for key, folder in wanted.items() if key not in by_config]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of the {len(planned)} cells of {source}, first {missing[0]}. Run "
            f"`{command} --out {folder}`; give here the overrides the comparison was run with."
        )
    cells = [by_config[key] for key in wanted]
    if foreign := [cell.variant for key, cell in by_config.items() if key not in wanted]:
        raise InputError(
            f"{folder} also holds cells of other settings: {foreign[0]}. Use a folder of its own."
        )
    machines = {json.dumps(cell.result["hardware"], sort_keys=True) for cell in cells}
    if len(machines) > 1:
        raise InputError(f"cells of {folder} were run on {len(machines)} kinds of hardware. Run all on one.")
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
        "search": None if search is None else _search(search, name),
    }


def _search(folder: Path, name: str) -> dict[str, Any]:
    """Return what is kept of the search in `folder`, for the comparison of this name."""
    held = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    parts = ("variant", "epsilon", "settings", "score")
    return {
        "command": f"fedsim tune tune/{Path(name).stem}",
        **{key: held[key] for key in ("commit", "seconds", "holdout_examples", "epsilons")},
        "trials": [{part: trial[part] for part in parts} for trial in held["trials"]],
    }


def _cells(folder: Path) -> list[Cell]:
    path = folder / "cells.json"
    if not path.is_file():
        raise InputError(f"{folder} must be a folder written by `fedsim compare`, but has no cells.json.")
    return [Cell(**held) for held in json.loads(path.read_text(encoding="utf-8"))]


def _digests(folder: Path) -> dict[str, str]:
    """Return the digest a run stated -> the digest of its configuration as it reads today, which differs
    where settings were added to the schema since."""
    out = {}
    for path in sorted((folder / "runs").glob("*/result.json")):
        stated = json.loads(path.read_text(encoding="utf-8"))["config"]
        out[stated] = loading.load(path.with_name("config.yaml")).digest()
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the JSON file, or print what is wrong; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="output folder of `fedsim compare`")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", type=Path, required=True, metavar="results/NAME.json")
    parser.add_argument("--config", metavar="FILE", help="the comparison, where it is not compare/NAME")
    parser.add_argument("--search", type=Path, metavar="FOLDER", help="of the search that chose the settings")
    options = parser.parse_args(arguments)
    try:
        held = collect(options.folder, options.config or options.json.stem, options.overrides, options.search)
    except FedsimError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print(f"{options.json}: {len(held['rows'])} rows of {len(held['cells'])} runs, {held['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
