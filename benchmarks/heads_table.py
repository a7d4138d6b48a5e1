"""Table and picture of results/heads.json, which `python -m benchmarks.heads` writes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks.tables import load
from fedsim.report.markers import missing, provenance, table
from fedsim.report.significance import Difference, half_width, holm, mean_with_interval, welch

Cell = tuple[str, str, float | None]


def cells(held: Mapping[str, Any]) -> dict[Cell, list[float]]:
    """Return (features, method, epsilon) -> accuracies in percent, one a seed."""
    out: dict[Cell, list[float]] = {}
    for row in held["rows"]:
        if not row["held_out"]:
            key = row["features"], row["method"], row["epsilon"]
            out.setdefault(key, []).append(100 * row["accuracy"])
    return out


def heads() -> str:
    """Mean accuracy with its standard deviation, method by features by budget; the best is bold."""
    held = load("heads.json")
    if held is None:
        return missing("python -m benchmarks.heads --json results/heads.json", "heads.json")
    found = cells(held)
    epsilons = sorted({epsilon for *_, epsilon in found if epsilon is not None})
    best = {e: max(statistics.mean(v) for (*_, own), v in found.items() if own == e) for e in epsilons}
    rows = []
    for features, method in dict.fromkeys((features, method) for features, method, _ in found):
        row = [features, method]
        for epsilon in [*epsilons, None]:
            values = found.get((features, method, epsilon))
            row.append("" if values is None else _text(values, epsilon is not None and best[epsilon]))
        rows.append(row)
    seeds = sorted({len(values) for (*_, epsilon), values in found.items() if epsilon is not None})
    note = (
        f"\nTest accuracy in percent, mean ± half its 95 % interval over {seeds[0]} to {seeds[-1]} seeds of "
        "the noise (one number: one seed). Bold: the best mean at a budget.\n"
    )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in held["rows"]))
    about = {"command": "python -m benchmarks.heads --json results/heads.json", "commit": commits}
    head = ["features", "method", *(f"epsilon {e:g}" for e in epsilons), "no noise"]
    return table(head, rows) + note + provenance({**about, "hardware": held["hardware"]})


def _text(values: list[float], best: float | bool) -> str:
    mean = statistics.mean(values)
    text = f"{mean:.1f}" if len(values) == 1 else mean_with_interval(values, 1)
    return f"**{text}**" if best is not False and mean == best else text


def laws() -> str:
    """What the paper says, tested: DP-FC and DP-LS against every other method, in points, by Welch's test;
    the table shows the difference to the best of them, its p adjusted for all that were tested."""
    held = load("heads.json")
    if held is None:
        return missing("python -m benchmarks.heads --json results/heads.json", "heads.json")
    found = {key: values for key, values in cells(held).items() if key[2] is not None and len(values) > 1}
    epsilons = sorted({epsilon for *_, epsilon in found if epsilon is not None})
    laws_of = ("DP-FC", "DP-LS")
    pairs = [
        ((features, method, epsilon), other)
        for features, method, epsilon in found
        if method in laws_of
        for other in dict.fromkeys(m for f, m, e in found if (f, e) == (features, epsilon) and m != method)
    ]
    tests = holm([welch(found[key], found[key[0], other, key[2]]) for key, other in pairs])
    known = dict(zip(pairs, tests, strict=True))
    rows = []
    for method in laws_of:
        for features in dict.fromkeys(features for features, *_ in found):
            row = [f"{method} minus the best other", features]
            for epsilon in epsilons:
                rivals = [known[key, o] for key, o in pairs if key == (features, method, epsilon)]
                row.append(_said(min(rivals, key=lambda test: test.mean)) if rivals else "")
            rows.append(row)
    note = (
        f"\nPoints, with the p of Welch's test over the seeds, adjusted for all {len(pairs)} pairs of "
        "methods that are tested here (Holm); n.s.: p above 0.05.\n"
    )
    return table(["", "features", *(f"epsilon {e:g}" for e in epsilons)], rows) + note


def _said(test: Difference) -> str:
    return f"{test.mean:+.1f} ({test.verdict if test.significant else 'n.s.'})"


def costs() -> str:
    """Seconds of the sums and solves, and the share of the product rate that second moments reach."""
    held = load("head_cost.json")
    if held is None:
        return missing("python -m benchmarks.head_cost --json results/head_cost.json", "head_cost.json")
    parts = list(held["rows"][0]["seconds"])
    rows = [
        [
            f"{row['case']}: {row['examples']:,} x {row['features']:,}, {row['classes']} classes",
            *(f"{row['seconds'][part]:.1f}" for part in parts),
            *(f"{100 * share:.0f} %" for share in row["of_product_rate"].values()),
        ]
        for row in held["rows"]
    ]
    shares = [f"{part}, of the product rate" for part in held["rows"][0]["of_product_rate"]]
    return table(["seconds", *parts, *shares], rows) + "\n" + provenance(held)


def picture(held: Mapping[str, Any]) -> Figure:
    """Accuracy against epsilon, one panel a kind of features, one line a method."""
    found = cells(held)
    kinds = list(dict.fromkeys(features for features, *_ in found))
    figure = Figure(figsize=(3.4 * len(kinds), 3.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(method for _, method, epsilon in found if epsilon is not None))
    for panel, features in zip(panels, kinds, strict=True):
        for place, method in enumerate(methods):
            line = sorted((e, v) for (f, m, e), v in found.items() if (f, m) == (features, method) and e)
            if line:
                means = [statistics.mean(values) for _, values in line]
                spread = [half_width(values) or math.nan for _, values in line]
                points = [epsilon for epsilon, _ in line]
                panel.errorbar(points, means, spread, marker="o", ms=3, color=f"C{place}", label=method)
        panel.set_xscale("log")
        panel.set_xlabel("epsilon")
        panel.set_title(features)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy (%)")
    panels[-1].legend(fontsize="small")
    return figure
