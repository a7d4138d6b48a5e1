"""Judge every layer and model against one example at a time in float64: see `benchmarks.layers.judge`.

    python -m benchmarks.layers [--json FILE] [--only PATTERN ...] [--without-zoo] [--engine NAME]

Prints a line a row; exit code 1 where a row is wrong. Rows of timm and transformers need the extra "zoo".
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.layers.case import SEED
from benchmarks.layers.judge import UPDATES, judge
from benchmarks.layers.rows import architectures, layers
from fedsim import provenance
from fedsim.grads import ENGINES


def main() -> int:
    """Judge, print and write the JSON."""
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = []
    for case in layers() + ([] if arguments.without_zoo else architectures()):
        if any(fnmatch(case.name, pattern) for pattern in arguments.only):
            rows.append(judge(case, arguments.engine))
            print(line(rows[-1]), flush=True)
    wrong = [row for row in rows if row["wrong"]]
    print(f"{len(rows)} rows, {len(wrong)} wrong")
    if arguments.json is not None:
        result = {
            "command": shlex.join(["python", "-m", "benchmarks.layers", *sys.argv[1:]]),
            "commit": provenance.commit(),
            "hardware": provenance.hardware(),
            "seed": SEED,
            "engine": arguments.engine,
            "updates": UPDATES,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


def line(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    seen = [
        f"{m['error64']:.0e} {m['error32']:.0e} ({m['plain32']:.0e}) {m['longest']:.6f}"
        for m in row["moments"]
    ]
    verdict = "WRONG" if row["wrong"] else "refused" if row["refused"] else "ok"
    name = f"{row['group']}: {row['name']}"
    return f"{verdict:8}{name:70} {row['served']:26} " + "  ".join([*seen, *row["wrong"]])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="shell patterns of names")
    parser.add_argument(
        "--without-zoo", action="store_true", help="leave out torchvision, timm, transformers"
    )
    parser.add_argument("--engine", choices=ENGINES, default="bookkeeping")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
