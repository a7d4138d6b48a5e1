"""Tables of measured speed, memory, launches and bounds, from results/*.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fedsim.report.held import Held, loaded
from fedsim.report.markers import missing, provenance, table
from fedsim.validate import InputError

RESULTS = Path(__file__).resolve().parents[1] / "results"


_read: ContextVar[list[Path]] = ContextVar("files that a part of a page has read")


@contextmanager
def reading() -> Iterator[list[Path]]:
    """Within the block, the list that is yielded gets the path of every file that `load` is asked for."""
    paths: list[Path] = []
    token = _read.set(paths)
    try:
        yield paths
    finally:
        _read.reset(token)


def load(name: str) -> Any:
    """Content of a result file; None where there is none.

    Raises:
        InputError: it is no JSON, or no mapping; later, from what is returned, where a key is not there.
    """
    path = RESULTS / name
    _read.get([]).append(path)
    held = loaded(path) if path.exists() else None
    if not isinstance(held, Held | None):
        raise InputError(
            f"{path}: a result must be a JSON mapping, got a {type(held).__name__}. Make it again."
        )
    return held


def gradients(name: str) -> str:
    """Ratios to the non-private step, one row a model and number of views, one column a method."""
    held = load(name)
    if held is None:
        return missing("python -m benchmarks.gradients", name)
    shown: list[tuple[str, dict[str, Any]]] = []
    for row in held["rows"]:
        reading: dict[str, Any] | None = row
        while reading is not None:  # replaced readings stay in sight
            shown.append((row["model"] if reading is row else f"{row['model']}, replaced", reading))
            reading = reading.get("replaced")
    methods = list(dict.fromkeys(m for _, row in shown for m in row["ratios"]))
    rows = [
        [label, str(row["views"]), str(row["examples"])]
        + [f"{row['ratios'][m]:.2f}" if m in row["ratios"] else "-" for m in methods]
        for label, row in shown
    ]
    heads = ["model", "K", "examples", *methods, "ours / best Opacus"]
    for cells, (_, row) in zip(rows, shown, strict=True):
        opacus = [ratio for method, ratio in row["ratios"].items() if method.startswith("Opacus")]
        cells.append(f"{row['ratios']['ours'] / min(opacus):.2f}" if opacus else "-")
    if any("jax" in row for _, row in shown):
        heads.append("jax_privacy / JAX non-private")
        for cells, (_, row) in zip(rows, shown, strict=True):
            own = row.get("jax", {}).get("ratio_to_own_step")
            cells.append("-" if own is None else f"{own:.2f}")
    again: dict[str, list[str]] = {}
    for row in held["rows"]:
        if "measured" in row:
            line = provenance({**held, **row["measured"]})
            again.setdefault(line, []).append(f"{row['model']} K = {row['views']}")
    notes = [f"\nMeasured again, {', '.join(which)}: {line.strip()}\n" for line, which in again.items()]
    return table(heads, rows) + provenance(held) + "".join(notes)


def readings(name: str) -> str:
    """Both ways of taking our ratios from the turns of `gradients`, and how far the turns differ."""
    held = load(name)
    if held is None:
        return missing("python -m benchmarks.gradients", name)
    rows = []
    for row in held["rows"]:
        seconds = row["seconds"]
        base = seconds["non-private"]
        for method in (m for m in ("ours", "ours, channels-last") if m in seconds):
            turns = [own / plain for own, plain in zip(seconds[method], base, strict=True)]
            low, middle, high = statistics.quantiles(turns, n=4, method="inclusive")
            medians = statistics.median(seconds[method]) / statistics.median(base)
            label = [row["model"], str(row["views"]), method, str(len(turns))]
            rows.append([*label, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{medians:.2f}"])
    heads = ["model", "K", "method", "turns", "median of ratios", "middle half", "ratio of medians"]
    return table(heads, rows)


def memory(name: str) -> str:
    """Peak memory of the non-private step in megabytes a view, and of the methods relative to it."""
    held = load(name)
    if held is None:
        return missing("python -m benchmarks.memory", name)
    found = [row["megabytes_per_view"] for row in held["rows"]]
    methods = [m for m in dict.fromkeys(m for row in found for m in row) if m != "non-private"]
    rows = []
    for row, own in zip(held["rows"], found, strict=True):
        base = own["non-private"]
        ratios = [f"{own[m] / base:.2f}" if m in own else "-" for m in methods]
        rows.append([row["model"], str(row["views"]), str(row["examples"]), f"{base:.3g} MB", *ratios])
    return table(["model", "K", "examples", "non-private, a view", *methods], rows) + provenance(held)


def captioner(name: str) -> str:
    """The captioner's clipped sum relative to ordinary training, a row a model and batch."""
    held = load(name)
    if held is None:
        return missing("python -m benchmarks.captioner", name)
    rows = []
    for row in held["rows"]:
        low, high = row["middle_half"]
        model = f"{row['size']}, patches of {row['patch']}, decoder of {row['decoder_depth']}"
        data = f"{row['edge']} px, {row['places']} places, {row['tokens']:,} tokens"
        cells = [model, data, str(row["views"]), str(row["examples"]), f"{row['ratio']:.2f}"]
        rows.append([*cells, f"{low:.2f} to {high:.2f}", f"{row['load']:.1f}"])
    heads = ["captioner", "data", "K", "examples", "ratio", "middle half of the turns", "load of the machine"]
    return table(heads, rows) + provenance(held)


def streaming(name: str) -> str:
    """Pictures in files, from benchmarks.streaming: training, decoding, a million samples."""
    held = load(name)
    if held is None:
        return missing("python -m benchmarks.streaming --json results/streaming.json", name)
    about = held["folder"]
    lines = [
        f"A folder of {about['pictures'][1]:,} JPEGs of many sizes, {about['bytes_a_file'] / 1e3:.0f} kB "
        f"each on average, and {about['pictures'][0]:,} of them; 64 x 64 pixels; one view an example. The "
        "ImageNet configurations with steps, batch and size lowered on the command line:\n"
    ]
    rows = [
        [
            f"`{row['recipe']}`, {row['model']}",
            f"{row['pictures']:,}",
            str(row["threads"]),
            f"{row['seconds_to_open']:.1f}",
            f"{row['megabytes']['opened']['own']:.0f}",
            f"{row['megabytes']['after']['peak']:.0f}",
            f"{row['views_a_step'] / row['seconds_a_step']:.1f}",
            f"{100 * row['share_waiting_for_data']:.1f} %",
        ]
        for row in held["training"]
    ]
    head = ["recipe, model", "pictures", "torch threads", "s to open", "MB opened", "MB peak"]
    lines.append(table([*head, "views a second", "waits for data"], rows))
    lines.append("Views that one core decodes a second, files in memory, crop and flip included:\n")
    rows = [
        [str(row["edge"]), row["decode"], *(f"{n:,.0f}" for n in row["a_second_and_core"].values())]
        for row in held["decoding"]
    ]
    lines.append(table(["edge", "decode", "K = 1", "K = 4", "evaluation"], rows))
    lines.append("Small samples in tar files, over holders, two nodes in one process:\n")
    rows = [
        [
            f"{row['samples']:,}",
            f"{row['holders']:,}",
            f"{row['first']:.1f}",
            f"{row['seconds_to_open']:.2f}",
            f"{1e3 * row['seconds_a_draw']:.1f}",
            f"{row['bytes_a_sample_by_arrays']['together']:.0f}",
        ]
        for row in held["many"]
    ]
    times = ["s to open first", "s to open", "ms a draw"]
    if "many_by" in held:
        times = [f"CPU {name}" for name in times]
    head = ["samples", "holders", *times, "bytes a sample held"]
    lines.append(table(head, rows))
    per = held["many"][-1]["bytes_a_sample"]
    lines.append(
        "Between the two, a sample costs "
        + ", ".join(f"{max(0.0, per[key]):.1f} bytes ({key})" for key in per)
        + ": memory of the process's own, mapped pages of the index, and the largest it ever had.\n"
    )
    if "many_by" in held:
        lines.append("The last table: `{command}`, commit {commit}; the others:\n".format(**held["many_by"]))
    return "\n".join(lines) + provenance(held)


def rounds(name: str) -> str:
    """Federation overhead, from benchmarks.rounds."""
    held = load(name)
    if held is None:
        return missing("python -m benchmarks.rounds", name)
    rows: list[list[str]] = []
    for case, row in held.get("hosted", {}).items():
        ratios = {"the node": row["ratio_of_node"], "the whole step": row["ratio"]}
        for part, ratio in ratios.items():
            rows.append([f"local engine, trivial clients, {case}: {part}", f"{ratio:.2f} x the plain loop"])
    for model, row in held.get("work", {}).items():
        for case, ratio in row["ratio_to_one_holder"].items():
            rows.append([f"local engine, {model} gradients, {case}", f"{ratio:.2f} x one holder"])
    if "server" in held:
        rows.append(
            ["server work a step, 2.75 M parameters", f"{1e3 * held['server']['seconds_per_step']:.0f} ms"]
        )
    for case, row in held.get("pfl", {}).items():
        for method, seconds in row["seconds"].items():
            ratio = f"{row['ratio_to_plain_loop'][method]:.2f} x the plain loop"
            rows.append([f"{case}: {method}", f"{1e3 * seconds:.0f} ms an iteration, {ratio}"])
    for model, row in held.get("flower", {}).items():
        rows.append(
            [
                f"Flower simulation, {model}, 1,000 holders on 2 nodes, added a step",
                f"{row['seconds_added_per_step']:.2f} s",
            ]
        )
    for case, seconds in held.get("crowd", {}).get("seconds", {}).items():
        ratio = f"{seconds / held['crowd']['seconds']['one Flower client a holder']:.3f}"
        rows.append(
            [f"Flower simulation, 1,000 holders, 0.5 MB: {case}", f"{seconds:.2f} s a step, {ratio} x"]
        )
    return table(["what", "measured"], rows) + provenance(held)


def versions(name: str) -> str:
    """One row a case: time of this version relative to that of another, and to itself."""
    held = load(name)
    if held is None:
        return missing("python -m benchmarks.versions CHECKOUT", name)
    rows = [
        [
            row["model"],
            str(row["views"]),
            str(row["examples"]),
            f"{row['milliseconds']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['again']:.3f}",
        ]
        for row in held["rows"]
    ]
    head = ["model", "K", "examples", "ms", f"time relative to commit {held['other_commit']}", "again (A/A)"]
    mean = f"\nGeometric mean {held['geometric_mean']:.3f}.\n"
    return table(head, rows) + mean + provenance(held)


def launches(name: str) -> str:
    """One row a piece: what it asks of a GPU, and the least time by the figures of a card."""
    held = load(name)
    if held is None:
        return missing("python -m benchmarks.launches", name)
    head = [
        "model",
        "K",
        "launched",
        "waits",
        "copies",
        "launched, before",
        "least ms",
        "ordinary, least ms",
        "ratio",
    ]
    rows = [
        [
            row["model"],
            str(row["views"]),
            f"{row['launched']:,}",
            str(row["waits"]),
            str(row["copies"]),
            f"{row['before']['launched']:,}" if "before" in row else "-",
            f"{row['least_ms']:.1f}",
            f"{row['ordinary_least_ms']:.1f}",
            f"{row['ratio']:.2f}",
        ]
        for row in held["rows"]
    ]
    (wide,) = (row for row in held["rows"] if row["model"] == "wrn-16-4" and row["views"] == 16)
    step = (
        f"\nA step of WRN-16-4 with B = 4,096 and K = 16: {wide['launched_a_step']:,} launched, "
        f"{wide['waits_a_step']} waits"
    )
    if "before" in wide:
        earlier, pieces = wide["before"], wide["launched_a_step"] // wide["launched"]
        step += (
            f"; before (commit {held['before_commit']}): {earlier['launched_a_step']:,} launched, "
            f"{pieces * earlier['convolution_backward']:,} of them `convolution_backward`"
        )
    return table(head, rows) + f"{step}. Card: {held['card']}.\n" + provenance(held)


def layers(name: str) -> str:
    """One row for each layer or model that was judged, and what is wrong, if anything."""
    held = load(name)
    if held is None:
        return missing("python -m benchmarks.layers", name)
    head = ["layer or model", "served by", "float64 error", "float32 error", "plain float32", "longest / C"]
    parts = []
    for group in dict.fromkeys(row["group"] for row in held["rows"]):
        rows = []
        for row in (row for row in held["rows"] if row["group"] == group):
            seen = row["moments"]
            pairs = [" / ".join(f"{m[key]:.0e}" for m in seen) for key in ("error64", "error32", "plain32")]
            lengths = " / ".join(f"{m['longest']:.6f}" for m in seen)
            served = "refused, as it must be" if row["refused"] else row["served"]
            wrong = f" **wrong: {'; '.join(row['wrong'])}**".replace("|", "/").replace("\n", " ")
            rows.append([row["name"], served + (wrong if row["wrong"] else ""), *pairs, lengths])
        parts.append(f"### {group[0].upper()}{group[1:]}\n\n{table(head, rows)}\n")
    wrong = sum(bool(row["wrong"]) for row in held["rows"])
    first = f"{len(held['rows'])} rows, {wrong} of them wrong.\n\n"
    return first + "".join(parts).rstrip("\n") + "\n" + provenance(held)


def bound(name: str) -> str:
    """One row for each kind of layer: hostile cases, and the longest contribution."""
    held = load(name)
    if held is None:
        return missing("python -m benchmarks.bound", name)
    rows = [
        [
            row["rule"].replace("_", " "),
            f"{row['cases']:,}",
            str(row["wrong"]),
            f"{row['longest']:.7f}",
            row["of"].replace("_", " "),
        ]
        for row in held["rows"]
    ]
    ways = ", ".join(f"{way} {cases:,}" for way, cases in held["by_way"].items())
    head = [
        "kind of layer",
        "cases",
        "trials wrong",
        "closest to its bound / C",
        "inputs, gradients, rule, way",
    ]
    return f"{held['cases']:,} cases ({ways}).\n\n" + table(head, rows) + provenance(held)
