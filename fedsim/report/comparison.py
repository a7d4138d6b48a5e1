"""The files of a comparison: page, tables, and the cells they come from."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from fedsim.report import markers
from fedsim.report.cells import Cell
from fedsim.report.findings import findings
from fedsim.report.page import About, missing, page
from fedsim.report.plain import as_json
from fedsim.report.table import COLUMNS, COSTS, RESULTS, costs, note, table


def write(cells: Sequence[Cell], about: About, out: Path) -> None:
    """Write table.md, table.csv, cells.json and report.html into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = table(cells)
    (out / "table.md").write_text(_markdown(cells, rows, about), encoding="utf-8")
    (out / "table.csv").write_text(_csv(rows), encoding="utf-8")
    (out / "cells.json").write_text(as_json(list(cells), indent=1) + "\n", encoding="utf-8")
    (out / "report.html").write_text(page(cells, about), encoding="utf-8")


def _markdown(cells: Sequence[Cell], rows: Sequence[dict[str, str]], about: About) -> str:
    parts = [
        "\n".join([*missing(cells, about), *findings(cells)]) + "\n",
        markers.table(RESULTS, [[row[c] for c in RESULTS] for row in rows]),
        about.below(note(cells)) + "\n",
        markers.table(COSTS, [list(row.values()) for row in costs(cells)]),
    ]
    return "\n".join(parts)


def _csv(rows: Sequence[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
