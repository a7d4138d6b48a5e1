"""Hostile random trials of the bound on contributions: see `benchmarks.bound.judge`.

    python -m benchmarks.bound [--reduced] [--cases N] [--first TRIAL] [--json FILE]

With --reduced in bfloat16 and TF32: see `benchmarks.bound.reduced`.

Trials are numbered, and a number draws the same trial again. Exit code 1 where a contribution is too long.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.bound import reduced
from benchmarks.bound.judge import Trial, trial
from benchmarks.bound.rules import RULES
from fedsim import provenance

CASES = 20_000


def main() -> int:
    """Run trials until enough examples are judged, print a line a rule and write the JSON."""
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rules: Sequence[str] = list(reduced.MODELS if arguments.reduced else RULES)
    one = reduced.trial if arguments.reduced else trial
    least = arguments.cases or (reduced.CASES if arguments.reduced else CASES)
    trials: list[Trial] = []
    cases = 0
    while cases < least or len(trials) % len(rules):
        trials.append(one(arguments.first + len(trials)))
        cases += trials[-1].cases
        if trials[-1].wrong:
            print(f"WRONG {trials[-1]}", flush=True)
    rows = [_row(rule, [t for t in trials if t.rule == rule]) for rule in rules]
    for row in rows:
        print(f"{row['rule']:26} {row['cases']:6} cases  {row['wrong']:4} wrong  {row['longest']:.7f} C")
    wrong = [t for t in trials if t.wrong]
    print(f"{len(trials)} trials, {cases} cases, {len(wrong)} trials wrong")
    if arguments.json is not None:
        result = {
            "command": shlex.join(["python", "-m", "benchmarks.bound", *sys.argv[1:]]),
            "commit": provenance.commit(),
            "hardware": provenance.hardware(),
            "first": arguments.first,
            "trials": len(trials),
            "cases": cases,
            "by_way": {
                way: sum(t.cases for t in trials if t.way == way) for way in sorted({t.way for t in trials})
            },
            "rows": rows,
            "wrong": [asdict(t) for t in wrong[:100]],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


def _row(rule: str, trials: Sequence[Trial]) -> dict[str, Any]:
    judged = [t for t in trials if not t.problem]
    closest = max(judged, key=lambda t: t.excess, default=None)
    return {
        "rule": rule,
        "trials": len(trials),
        "cases": sum(t.cases for t in trials),
        "wrong": sum(t.wrong for t in trials),
        "longest": closest.longest if closest else 0.0,
        "of": f"{closest.inputs}, {closest.gradients}, {closest.clip}, {closest.way}" if closest else "",
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, help="judge at least as many")
    parser.add_argument("--reduced", action="store_true", help="bfloat16 and TF32, whole models")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
