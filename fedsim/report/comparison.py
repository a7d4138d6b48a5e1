"""Tables and a self-contained HTML page from finished comparison cells."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedsim.headline import Metric
from fedsim.report.claim import delta
from fedsim.report.plain import as_json

COLUMNS = (
    "variant",
    "trusted",
    "noise added",
    "unit",
    "epsilon per example",
    "epsilon per holder",
    "score",
    "spread",
    "holders' scores, 5% to 95%",
    "bytes per holder and step",
    "messages per step",
    "seconds",
    "survivors needed",
)


@dataclass(frozen=True)
class Cell:
    """One finished run of a comparison, and (step, headline) over its course."""

    variant: str
    epsilon: float | None
    seed: int
    result: dict[str, Any]
    curve: list[tuple[int, float]]


def write(cells: Sequence[Cell], title: str, out: Path) -> None:
    """Write table.md, table.csv, cells.json and report.html into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = table(cells)
    (out / "table.md").write_text(markdown(rows), encoding="utf-8")
    (out / "table.csv").write_text(_csv(rows), encoding="utf-8")
    (out / "cells.json").write_text(as_json(list(cells), indent=1) + "\n", encoding="utf-8")
    (out / "report.html").write_text(page(cells, title), encoding="utf-8")


def table(cells: Iterable[Cell]) -> list[dict[str, str]]:
    """Return one row for each (variant, budget): means over seeds, spread as standard deviation."""
    rows = []
    for group in _groups(cells).values():
        first = group[0].result
        headline = Metric.of(first)
        scores = _scores(group)
        spread = statistics.stdev(scores) if len(scores) > 1 else None
        spread_of_holders = _holder_percentiles(group)
        trust = first["trust"]
        values = (
            group[0].variant,
            trust["trusted"],
            trust["noise_added"],
            trust["unit"],
            _epsilon(first["epsilon"].get("example")),
            _epsilon(first["epsilon"].get("holder")),
            f"{headline.name} {headline.shown(statistics.mean(scores))}",
            "one seed" if spread is None else headline.number(spread),
            f"{headline.shown(spread_of_holders[0])} to {headline.shown(spread_of_holders[2])}"
            if spread_of_holders
            else "not computed",
            f"{trust['bytes_per_holder']:,.0f}",
            str(trust["messages"]),
            f"{statistics.mean(c.result['seconds'] for c in group):.1f}",
            str(trust["survivors_needed"]),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return the table as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row[c] for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def page(cells: Sequence[Cell], title: str) -> str:
    """Return a page that needs nothing but a browser: table and plots as embedded images."""
    rows = table(cells)
    head = "".join(f"<th>{html.escape(c)}</th>" for c in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row[c])}</td>" for c in COLUMNS) + "</tr>" for row in rows
    )
    figures = "".join(
        f"<figure><img alt='{html.escape(name)}' src='data:image/png;base64,{_png(figure)}'>"
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, figure in _figures(cells)
    )
    basis = next(iter(cells[0].result["epsilon"].values()))
    note = f"Epsilon at {delta(basis)}, {basis['relation']}. Scores on public test data."
    tuned = dict.fromkeys(cell.result["tuning"] for cell in cells if cell.result["tuning"])
    note += "".join(f" Tuned: {how}." for how in tuned)
    return PAGE.format(
        title=html.escape(title), head=head, body=body, figures=figures, note=html.escape(note)
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #ccc; padding: .35em .6em; text-align: left; vertical-align: top; }}
figure {{ display: inline-block; margin: 1em 1em 1em 0; }} img {{ max-width: 560px; width: 100%; }}
figcaption {{ color: #555; }}
</style></head><body><h1>{title}</h1><p>{note}</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{figures}</body></html>
"""


def _groups(cells: Iterable[Cell]) -> dict[tuple[str, float | None], list[Cell]]:
    groups: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.variant, cell.epsilon), []).append(cell)
    return groups


def _headline(cells: Sequence[Cell]) -> Metric:
    """The metric of a comparison, whose cells have one task."""
    return Metric.of(cells[0].result)


def _scores(group: Sequence[Cell]) -> list[float]:
    return [cell.result[_headline(group).name] for cell in group]


def _holder_percentiles(group: Sequence[Cell]) -> tuple[float, float, float] | None:
    """Return the 5th, 50th and 95th percentile over holders, means over seeds; None where a run has none."""
    if not all(c.result["holder_scores"] for c in group):
        return None
    low, middle, high = (
        statistics.mean(c.result["holder_scores"][name] for c in group) for name in ("5%", "50%", "95%")
    )
    return low, middle, high


def _epsilon(spent: dict[str, Any] | None) -> str:
    if spent is None or spent["value"] is None or not math.isfinite(spent["value"]):
        return "no claimable epsilon"
    return f"{spent['value']:.3g}"


def _csv(rows: Sequence[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _figures(cells: Sequence[Cell]) -> list[tuple[str, Figure]]:
    figures = []
    name = _headline(cells).name.capitalize()
    if any(cell.epsilon is not None for cell in cells):
        figures.append((f"{name} against the target epsilon", _budgets(cells)))
    figures += [(f"{name} against steps", _curves(cells)), ("Cost of one run", _costs(cells))]
    if all(cell.result["holder_scores"] for cell in cells):
        figures.append((f"{name} over holders: median, 5% to 95%", _holders(cells)))
    return figures


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.2, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _budgets(cells: Sequence[Cell]) -> Figure:
    figure, axes = _axes("target epsilon", f"test {_headline(cells).label}")
    scale = _headline(cells).scale
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for (variant, epsilon), group in _groups(cells).items():
        scores = [scale * score for score in _scores(group)]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        if epsilon is None:
            label = f"{variant} (no budget)"
            axes.axhline(statistics.mean(scores), linestyle="--", color="grey", label=label)
        else:
            lines.setdefault(variant, []).append((epsilon, statistics.mean(scores), spread))
    for variant, points in lines.items():
        x, y, error = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=variant)
    axes.set_xscale("log")
    axes.legend(fontsize=8)
    return figure


def _curves(cells: Sequence[Cell]) -> Figure:
    """Means over seeds: a colour a variant, a line style a budget."""
    figure, axes = _axes("step", f"test {_headline(cells).label}")
    scale = _headline(cells).scale
    colours = {variant: f"C{i % 10}" for i, variant in enumerate(dict.fromkeys(c.variant for c in cells))}
    budgets = sorted({c.epsilon for c in cells if c.epsilon is not None})
    for (variant, epsilon), group in _groups(cells).items():
        steps = [step for step, _ in group[0].curve]
        curves = [[scale * score for _, score in c.curve] for c in group if len(c.curve) == len(steps)]
        label = variant if epsilon is None else f"{variant}, epsilon {epsilon:g}"
        style = "-" if epsilon is None else ("-", "--", ":", "-.")[budgets.index(epsilon) % 4]
        means = [statistics.mean(at) for at in zip(*curves, strict=True)]
        axes.plot(steps, means, style, color=colours[variant], label=label)
    axes.legend(fontsize=6)
    return figure


def _costs(cells: Sequence[Cell]) -> Figure:
    figure, axes = _axes("kilobytes per holder and step (up and down)", "seconds of a run")
    by_variant: dict[str, list[Cell]] = {}
    for cell in cells:
        by_variant.setdefault(cell.variant, []).append(cell)
    for variant, group in by_variant.items():
        seconds = statistics.mean(c.result["seconds"] for c in group)
        axes.scatter(group[0].result["trust"]["bytes_per_holder"] / 1e3, seconds, label=variant)
    axes.legend(fontsize=8)
    return figure


def _holders(cells: Sequence[Cell]) -> Figure:
    headline = _headline(cells)
    figure, axes = _axes(f"{headline.label} at a holder's own mix of classes", "")
    labels = []
    for row, ((variant, epsilon), group) in enumerate(_groups(cells).items()):
        percentiles = _holder_percentiles(group)
        assert percentiles is not None
        low, middle, high = (headline.scale * value for value in percentiles)
        axes.errorbar(middle, row, xerr=[[middle - low], [high - middle]], marker="o", capsize=3, color="C0")
        labels.append(variant if epsilon is None else f"{variant}, {epsilon:g}")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    return figure


def _png(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return base64.b64encode(content.getvalue()).decode()
