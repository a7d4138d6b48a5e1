"""What results/captioning_law.json says, as a table and as a picture."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.captioning_law import NONE
from benchmarks.tables import load
from fedsim.report.claim import number
from fedsim.report.markers import missing, provenance, table
from fedsim.report.significance import half_width, mean_with_interval

PROBES = ("linear", "few")


def law() -> str:
    """A row for each level of noise over batch, and for what stands beside."""
    held = load("captioning_law.json")
    if held is None:
        return missing("python -m benchmarks.captioning_law", "captioning_law.json")
    titles = [
        "encoder",
        "scenes",
        "noise multiplier",
        "noise over batch",
        "epsilon",
        "perplexity",
        "linear probe, %",
        f"{held['shots']} a class, %",
        "linear probe above the initialisation",
    ]
    known, start = held["beside"], held["beside"]["initialisation"]
    drawn = [scores for name, scores in known.items() if name.startswith("drawn")]
    rows = [
        _beside("as drawn", drawn, "-"),
        _beside("public initialisation", [start], f"{held['public_perplexity']:.3f} (public scenes)"),
    ]
    for (scenes, noise), runs in _levels(held):
        gains = _gains(runs, start)
        rows.append(
            [
                f"private captioning, {len(runs)} seeds",
                f"{scenes:,}",
                f"{noise:.3g}",
                f"{noise / held['batch']:.2g}",
                number(runs[0]["epsilon"]),
                f"{statistics.mean(run['perplexity'] for run in runs):.3f}",
                *(_spread([statistics.mean(run["probes"][kind]) for run in runs]) for kind in PROBES),
                f"{'+' if statistics.mean(gains) > 0 else ''}{mean_with_interval(gains, 1)}",
            ]
        )
    rows.append(_beside("pixels", [known["pixels"]], "-"))
    note = (
        f"\n{held['steps']} steps of {held['batch']:,} scenes. Every probe is a mean over three draws of its "
        "data. Means ± half a 95 % interval: of private runs over their seeds, of all else over the draws.\n"
    )
    return table(titles, rows) + note + provenance(held)


def picture(held: dict[str, Any]) -> Figure:
    """Gain of the linear probe over the initialisation against noise over batch."""
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.subplots()
    start = held["beside"]["initialisation"]
    whole = max(row["scenes"] for row in held["rows"])
    for scenes in sorted({row["scenes"] for row in held["rows"]}, reverse=True):
        mine = [
            (runs[0]["noise_over_batch"] if runs[0]["share"] > NONE else 0.0, _gains(runs, start))
            for (n, noise), runs in _levels(held)
            if n == scenes
        ]
        axes.errorbar(
            [place for place, _ in mine],
            [statistics.mean(gains) for _, gains in mine],
            yerr=[half_width(gains) or math.nan for _, gains in mine],
            marker="o" if scenes == whole else "s",
            capsize=4,
            label=f"{scenes:,} scenes",
        )
    axes.axhline(0.0, linestyle=":", color="gray", label="public initialisation")
    least = min(row["noise_over_batch"] for row in held["rows"] if row["share"] > NONE)
    axes.set_xscale("symlog", linthresh=least / 2)
    axes.set_xlim(-least / 16, 1.5 * max(row["noise_over_batch"] for row in held["rows"]))
    axes.set_xlabel("noise multiplier over batch")
    axes.set_ylabel("points of the linear probe gained")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _levels(held: dict[str, Any]) -> list[tuple[tuple[int, float], list[dict[str, Any]]]]:
    """Runs by (scenes, noise multiplier), most scenes and least noise first."""

    def level(row: dict[str, Any]) -> tuple[int, float]:
        return -row["scenes"], row["noise_multiplier"]

    found = itertools.groupby(sorted(held["rows"], key=level), key=level)
    return [((-scenes, noise), list(runs)) for (scenes, noise), runs in found]


def _gains(runs: Sequence[dict[str, Any]], start: dict[str, list[float]]) -> list[float]:
    """Points above the initialisation of each run, means over the draws of the probe's data."""
    before = statistics.mean(start["linear"])
    return [100 * (statistics.mean(run["probes"]["linear"]) - before) for run in runs]


def _beside(name: str, found: Sequence[dict[str, list[float]]], perplexity: str) -> list[str]:
    scores = [_spread([score for one in found for score in one[kind]]) for kind in PROBES]
    return [name, "-", "-", "-", "-", perplexity, *scores, "-"]


def _spread(scores: Sequence[float]) -> str:
    return mean_with_interval([100 * score for score in scores], 1)
