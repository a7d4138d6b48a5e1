"""The plots of a comparison."""

from __future__ import annotations

import io
import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from fedsim.report import significance
from fedsim.report.cells import Cell, Group, by_budget, groups


def figures(cells: Sequence[Cell]) -> list[tuple[str, Figure]]:
    """Return (caption, figure): scores against budgets, against steps at each budget, costs where
    their bytes differ, holders."""
    found = groups(cells)
    name, colours = found[0].headline.name.capitalize(), _colours(found)
    out = []
    if any(group.epsilon is not None for group in found):
        out.append((f"{name} against the target epsilon, with 95% intervals", _budgets(found, colours)))
    budgets = by_budget(found)
    beside = budgets.pop(None, []) if len(budgets) > 1 else []
    for epsilon, rivals in budgets.items():
        at = "" if epsilon is None else f" at epsilon {epsilon:g}"
        if any(len(group.cells[0].curve) > 1 for group in rivals):
            out.append((f"{name} against steps{at}", _curves([*rivals, *beside], colours)))
    if len({_kilobytes(group) for group in found}) > 1:  # else the page's table of costs says it all
        out.append(("Cost of one run", _costs(found, colours)))
    if all(group.holders for group in found):
        out.append((f"{name} over holders: median, 5% to 95%", _holders(found, colours)))
    return out


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element that takes its text colour from the page around it.

    Args:
        figure: what to draw.
        name: keeps the ids of two figures on one page apart.
    """
    FigureCanvasSVG(figure)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), warnings.catch_warnings():
        # Text stays text, for the fonts of whoever reads it: what those here lack is no matter.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :].replace("#000000", "currentColor")


def _colours(found: Sequence[Group]) -> dict[str, str]:
    return {variant: f"C{i % 10}" for i, variant in enumerate(dict.fromkeys(g.variant for g in found))}


def _words(name: str) -> str:
    """A name as matplotlib is to show it: dollars are no formulas, and underscores in front hide nothing."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _axes(x: str, y: str, height: float = 3.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(_words(x))
    axes.set_ylabel(_words(y))
    axes.grid(alpha=0.3)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(fontsize=8, framealpha=0, labelcolor="#000000")


def _budgets(found: Sequence[Group], colours: dict[str, str]) -> Figure:
    headline = found[0].headline
    figure, axes = _axes("target epsilon", found[0].axis)
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for group in found:
        if group.epsilon is None:
            without = "no claimable epsilon" if group.noised else "no privacy"
            label = f"{group.variant} ({'budget of its own' if group.protected else without})"
            colour = colours[group.variant]
            axes.axhline(headline.scale * group.mean, linestyle="--", color=colour, label=_words(label))
        else:
            half = headline.scale * (significance.half_width(group.scores) or math.nan)
            lines.setdefault(group.variant, []).append((group.epsilon, headline.scale * group.mean, half))
    for variant, points in lines.items():
        x, y, error = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=_words(variant), color=colours[variant])
    axes.set_xscale("log")
    budgets = sorted({group.epsilon for group in found if group.epsilon is not None})
    axes.set_xticks(budgets, [f"{epsilon:g}" for epsilon in budgets])
    axes.minorticks_off()
    _legend(axes)
    return figure


def _curves(rivals: Sequence[Group], colours: dict[str, str]) -> Figure:
    """Means over seeds, a line a variant; dashed where it has no budget and others do."""
    headline = rivals[0].headline
    figure, axes = _axes("step", rivals[0].axis)
    for group in rivals:
        steps = [step for step, _ in group.cells[0].curve]
        curves = [[score for _, score in c.curve] for c in group.cells if len(c.curve) == len(steps)]
        means = [headline.scale * statistics.mean(at) for at in zip(*curves, strict=True)]
        style = "--" if group.epsilon is None and rivals[0].epsilon is not None else "-"
        axes.plot(steps, means, style, color=colours[group.variant], label=_words(group.variant))
    _legend(axes)
    return figure


def _costs(found: Sequence[Group], colours: dict[str, str]) -> Figure:
    figure, axes = _axes("kilobytes per holder and step (up and down)", "seconds of a run")
    for variant, colour in colours.items():
        mine = [group for group in found if group.variant == variant]
        axes.scatter(
            _kilobytes(mine[0]), statistics.mean(g.seconds for g in mine), label=_words(variant), color=colour
        )
    _legend(axes)
    return figure


def _kilobytes(group: Group) -> float:
    return float(group.result["trust"]["bytes_per_holder"]) / 1e3


def _holders(found: Sequence[Group], colours: dict[str, str]) -> Figure:
    headline = found[0].headline
    label = f"{headline.label} at a holder's own mix of classes"
    figure, axes = _axes(label, "", max(2.4, 0.9 + 0.2 * len(found)))
    names = []
    for row, group in enumerate(found):
        assert group.holders is not None
        low, middle, high = (headline.scale * value for value in group.holders)
        error, colour = [[middle - low], [high - middle]], colours[group.variant]
        axes.errorbar(middle, row, xerr=error, marker="o", capsize=3, color=colour)
        name = group.variant if group.epsilon is None else f"{group.variant}, {group.epsilon:g}"
        names.append(_words(name))
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    return figure
