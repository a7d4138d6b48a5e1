"""Time of one clipped gradient sum by this checkout of fedsim and by another, in turn.

    python -m benchmarks.versions CHECKOUT [--json FILE] [--models NAME ...] [--views K ...] [--repeats N]

For every case of `benchmarks.models` three processes take turns: the other checkout, this one, and this one
a second time, each call after an untimed one, by the process's own CPU time with one thread. Figures are
medians of the ratios within each turn; `again` is what two equal programs differ by. Freed memory stays in
all processes, as the fedsim command has it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.models import CASES, SEED, Case
from benchmarks.process import Process
from fedsim import provenance

METHOD = "ours"
# What `retain_freed_memory` sets, for checkouts whose benchmark does not.
KEEP = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="folder of the other checkout")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--views", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    here = Path(__file__).resolve().parents[1]
    result = {
        "command": f"python -m benchmarks.versions CHECKOUT {shlex.join(sys.argv[2:])}",
        "commit": provenance.commit(),
        "other_commit": commit_of(given.checkout),
        "hardware": provenance.hardware(),
        "seed": SEED,
        "threads": 1,
        "rows": rows,
    }
    for name, views in itertools.product(given.models, given.views):
        row = _row(CASES[name], views, given.checkout.resolve(), here, given.repeats)
        rows.append(row)
        result["geometric_mean"] = statistics.geometric_mean(row["ratio"] for row in rows)
        print(
            f"{name} K={views} B={row['examples']}: {row['milliseconds']:.1f} ms, "
            f"{row['ratio']:.3f} of the other; again {row['again']:.3f}",
            flush=True,
        )
        if given.json is not None:
            given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"geometric mean {result['geometric_mean']:.3f}")


def _row(case: Case, views: int, other: Path, here: Path, repeats: int) -> dict[str, Any]:
    examples = case.examples if views == 1 else max(1, case.examples * 2 // views)
    own = ("--serve", case.name, METHOD, str(examples), str(views))
    places = {"other": other, "this": here, "again": here}
    seconds: dict[str, list[float]] = {name: [] for name in places}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(
                Process(
                    "benchmarks.gradients",
                    *own,
                    environment={**os.environ, **KEEP, "PYTHONPATH": str(place)},
                    folder=place,
                )
            )
            for name, place in places.items()
        }
        order = list(processes)
        for turn in range(repeats):
            for name in (*order[turn % 3 :], *order[: turn % 3]):  # nobody always follows the same one
                seconds[name].append(processes[name].seconds(METHOD))

    def ratio(one: str, of: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[of], strict=True))

    return {
        "model": case.name,
        "views": views,
        "examples": examples,
        "ratio": ratio("this", "other"),
        "again": ratio("again", "this"),
        "milliseconds": 1e3 * statistics.median(seconds["this"]),
        "seconds": seconds,
    }


def commit_of(checkout: Path) -> str:
    """The commit that is checked out there."""
    found = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.strip()


if __name__ == "__main__":
    main()
