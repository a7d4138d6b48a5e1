"""Pictures of docs/, drawn from results/*.json as SVG by `python -m benchmarks.report`."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks import by_seed
from fedsim.report.significance import half_width


def batch_law(held: dict[str, Any]) -> Figure:
    """Accuracy and epsilon against the batch, noise in proportion: results/kurakin_law.json."""
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    left = figure.subplots()
    names = [row["variant"] for row in held["rows"]]
    places = range(len(names))
    reached = [[100 * c["accuracy"] for c in held["cells"] if c["variant"] == name] for name in names]
    accuracy = left.errorbar(
        places,
        [statistics.mean(values) for values in reached],
        yerr=[half_width(values) or math.nan for values in reached],
        marker="o",
        capsize=4,
        color="C0",
    )
    left.set_xticks(places, names)
    left.set_xlabel("batch and noise multiplier")
    left.set_ylabel("test accuracy (%)")
    middle = statistics.mean(value for values in reached for value in values)
    left.set_ylim(middle - 2, middle + 2)
    left.grid(alpha=0.3)
    right = left.twinx()
    epsilon = right.plot(
        places, [float(row["epsilon per example"]) for row in held["rows"]], "s--", color="C1"
    )
    right.set_yscale("log")
    right.set_ylabel("epsilon per example")
    left.legend([accuracy, epsilon[0]], ["accuracy (left)", "epsilon (right)"], loc="upper right")
    return figure


def holders(measured: dict[str, Any], law: dict[str, Any]) -> Figure:
    """Accuracy against the number of holders under central and local noise, and what the law says of the
    latter: results/holders.json and results/holders_law.json."""
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.subplots()
    found = by_seed.accuracy(measured)
    for trust, marker in (("central", "o"), ("local", "s")):
        mine = {
            variant: list(scores.values()) for variant, scores in found.items() if variant.startswith(trust)
        }
        axes.errorbar(
            [_holders(variant) for variant in mine],
            [statistics.mean(scores) for scores in mine.values()],
            yerr=[half_width(scores) or math.nan for scores in mine.values()],
            fmt=marker,
            capsize=4,
            label=f"{trust} noise",
        )
    expected = by_seed.accuracy(law)
    axes.plot(
        [_holders(variant) for variant in expected],
        [statistics.mean(scores.values()) for scores in expected.values()],
        "--",
        color="C1",
        label="law: central noise times the root of holders",
    )
    axes.set_xscale("log")
    axes.set_xlabel("holders")
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    return figure


def budgets(held: dict[str, Any]) -> Figure:
    """Accuracy against epsilon, a line a variant, and without a budget as a dotted line:
    results/trust_models.json."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for number, variant in enumerate(dict.fromkeys(cell["variant"] for cell in held["cells"])):
        epsilons = sorted(
            {cell["epsilon"] for cell in held["cells"] if cell["variant"] == variant and cell["epsilon"]}
        )
        if not epsilons:
            level = statistics.mean(by_seed.of(held, variant, None))
            axes.axhline(level, linestyle=":", color="gray", label=f"{variant} (no privacy)")
            continue
        scores = [by_seed.of(held, variant, epsilon) for epsilon in epsilons]
        axes.errorbar(
            [epsilon * 1.02**number for epsilon in epsilons],  # beside one another where they are equal
            [statistics.mean(values) for values in scores],
            yerr=[half_width(values) or math.nan for values in scores],
            marker="os^vDP"[number % 6],
            capsize=3,
            label=variant,
        )
    axes.set_xscale("log")
    axes.set_xticks(ticks := sorted({c["epsilon"] for c in held["cells"] if c["epsilon"]}))
    axes.set_xticklabels([f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("epsilon")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    return figure


def _holders(variant: str) -> int:
    return int(variant.split()[-2])


def write(figure: Figure, path: Path) -> None:
    """Write SVG whose bytes depend on the figure and the version of matplotlib alone."""
    FigureCanvasSVG(figure)
    with matplotlib.rc_context({"svg.hashsalt": "fedsim", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
