"""What tuning is worth, and what counting it costs: the main job untuned, tuned freely and tuned privately.

    python -m benchmarks.tuning --json results/tuning.json [--seeds 0 1 2 3 4] [--epsilon 3] [--out FOLDER]

Untuned: the recipe as it is. Free: the settings of one search (configs/tune/quickstart), then every seed on
all training examples; the search is not counted. Private: one search a seed, of which the best trial is
released; epsilon is that of the whole search. Scores are on the public test set. Interrupted, the same
command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import load
from fedsim import loading, provenance
from fedsim.cli.many import runner_of
from fedsim.engine.run_folder import RunFolder
from fedsim.headline import Metric
from fedsim.report.markers import missing, table
from fedsim.report.markers import provenance as line_of
from fedsim.report.significance import holm, of_scores, welch
from fedsim.study import private_tune, tune

SEARCH = "tune/quickstart"
MEAN_TRIALS = 10
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path("runs/tuning"))
    options = parser.parse_args(arguments)
    tuning = tune.load(SEARCH)
    train, trial = runner_of("local"), runner_of("local", searching=True)
    budget = f"privacy.target_epsilon={options.epsilon}"
    rows: list[Row] = []

    def trained(how: str, source: str | Path, more: Sequence[str], trials: int) -> None:
        for seed in options.seeds:
            config = loading.load(source, [*more, f"seed={seed}"])
            rows.append(_row(how, seed, train(config, RunFolder(options.out / how / str(seed))), trials))

    trained("untuned", str(tuning.recipe), [*tuning.overrides, budget], 0)
    free = options.out / "search"
    tune.run(tuning, [budget], free, train, sys.stderr)
    (chosen,) = (free / "chosen").glob("*.yaml")
    trained("tuned, the search not counted", chosen, [], tuning.trials)
    for seed in options.seeds:
        search = dataclasses.replace(tuning, trials=MEAN_TRIALS, seed=seed)
        out = options.out / "private" / str(seed)
        found = private_tune.run(search, [budget], out, trial, sys.stderr, keep=True)
        if found.folder is not None:
            trials = len(list((out / "runs").iterdir()))
            result = json.loads((found.folder / "result.json").read_text())
            rows.append(_row("tuned, the search counted", seed, result, trials))
    held = {
        "kind": "tuning cost",
        "epsilon": options.epsilon,
        "held_out_examples": tuning.holdout_examples,
        "mean_trials": MEAN_TRIALS,
        "rows": rows,
        "command": shlex.join(["python", "-m", "benchmarks.tuning", *(arguments or sys.argv[1:])]),
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
    }
    options.json.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return 0


def _row(how: str, seed: int, result: Row, trials: int) -> Row:
    spent = result["epsilon"]["example"]
    return {
        "how": how,
        "seed": seed,
        "score": result[Metric.of(result).name],
        "headline": result["headline"],
        "epsilon": spent["value"],
        "accountant": spent["accountant"],
        "noise_multiplier": result["noise_multiplier"],
        "trials": trials,
    }


def page() -> str:
    """The three ways side by side: mean with its 95 % interval, and a test against the row above."""
    held = load("tuning.json")
    if held is None:
        return missing("python -m benchmarks.tuning --json results/tuning.json", "tuning.json")
    groups: dict[str, list[Row]] = {}
    for row in held["rows"]:
        groups.setdefault(row["how"], []).append(row)
    scores_of = {how: [row["score"] for row in group] for how, group in groups.items()}
    pairs = zip(list(scores_of.values())[1:], scores_of.values(), strict=False)
    tests = [None, *holm([welch(own, above) for own, above in pairs])]
    rows = []
    for (how, group), test in zip(groups.items(), tests, strict=True):
        scores, headline = scores_of[how], Metric(**group[0]["headline"])
        rows.append(
            [
                how,
                f"{max(row['epsilon'] for row in group):.3g} ({group[0]['accountant']})",
                of_scores(scores, headline),
                "-" if test is None else f"{headline.number(test.mean)} ({test.verdict})",
                f"{statistics.mean(row['trials'] for row in group):.3g}",
                f"{group[0]['noise_multiplier']:.3f}",
            ]
        )
    seeds = len(next(iter(groups.values())))
    head = ["quickstart", "epsilon stated", "test score", "against the row above", "trials", "noise"]
    note = (
        f"\nMean over {seeds} seeds ± half its 95 % interval, Welch's test, adjusted (Holm); noise is the "
        f"noise multiplier. A private search has {held['mean_trials']} trials on average (geometric), judged "
        f"by {held['held_out_examples']} held-out examples.\n"
    )
    return table(head, rows) + note + line_of(held)


if __name__ == "__main__":
    raise SystemExit(main())
