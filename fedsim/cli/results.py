"""`results`: the generated tables of README.md and docs/results.md, and comments of configs/base.yaml."""

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
        "write the tables of README.md and docs/results.md from results/*.json, and what base.yaml lists",
        "Nothing between the markers of these files is typed by hand.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if out of date")
    parser.add_argument("--project", type=Path, default=Path(), help="folder of the checkout (default: here)")


def _results(options: argparse.Namespace) -> dict[str, Any]:
    from fedsim.report import choices, markers, results

    written = markers.update(options.project, results.parts(options.project), check=options.check)
    base = options.project / "configs" / "base.yaml"
    if base.is_file() and (new := choices.commented(base.read_text(encoding="utf-8"))) != base.read_text(
        encoding="utf-8"
    ):
        if options.check:
            raise markers.OutOfDate("out of date: configs/base.yaml. Run the same command without --check.")
        base.write_text(new, encoding="utf-8")
        written.append("configs/base.yaml")
    if not options.json:
        print(f"written: {', '.join(written)}" if written else "up to date")
    return {"written": written}
