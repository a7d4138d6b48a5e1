"""`results`: the generated tables of README.md and docs/results.md."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedsim.cli.arguments import command


def add(commands: Any) -> None:
    """Register the command."""
    parser = command(
        commands,
        "results",
        _results,
        "write the tables of README.md and docs/results.md from results/*.json",
        "Nothing between the markers of these files is typed by hand.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if out of date")
    parser.add_argument("--project", type=Path, default=Path(), help="folder of the checkout (default: here)")


def _results(options: argparse.Namespace) -> dict[str, Any]:
    from fedsim.report import markers, results

    written = markers.update(options.project, results.parts(options.project), check=options.check)
    if not options.json:
        print(f"written: {', '.join(written)}" if written else "up to date")
    return {"written": written}
