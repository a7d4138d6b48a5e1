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
import functools
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
from fedsim.privacy import accountant, events, search
from fedsim.privacy.events import DISTRIBUTIONS, Selection
from fedsim.privacy.family import EventFamily
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
        private = dataclasses.replace(tuning, trials=MEAN_TRIALS, seed=seed)
        out = options.out / "private" / str(seed)
        found = private_tune.run(private, [budget], out, trial, sys.stderr, keep=True)
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
    """The three ways side by side: mean with its 95 % interval, and a test of every pair."""
    held = load("tuning.json")
    if held is None:
        return missing("python -m benchmarks.tuning --json results/tuning.json", "tuning.json")
    groups: dict[str, list[Row]] = {}
    for row in held["rows"]:
        groups.setdefault(row["how"], []).append(row)
    scores_of = {how: [row["score"] for row in group] for how, group in groups.items()}
    ways = list(groups)
    pairs = [(i, j) for i in range(len(ways)) for j in range(i)]
    found = holm([welch(scores_of[ways[i]], scores_of[ways[j]]) for i, j in pairs])
    tests = dict(zip(pairs, found, strict=True))
    rows = []
    for place, (how, group) in enumerate(groups.items()):
        test = tests.get((place, place - 1))
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
    headline = Metric(**held["rows"][0]["headline"])
    further = "; ".join(
        f"{ways[i].capitalize()} against {ways[j]}: {headline.number(test.mean)} ({test.verdict})"
        for (i, j), test in tests.items()
        if i - j > 1
    )
    note = (
        f"\nMean over {seeds} seeds ± half its 95 % interval. Welch's test, for a private search draws "
        f"seeds of its own for its trials; adjusted for all {len(pairs)} pairs (Holm). {further}. "
        f"Noise is the noise multiplier. A private search has {held['mean_trials']} trials on average "
        f"(geometric), judged by {held['held_out_examples']} held-out examples.\n"
    )
    return table(head, rows) + note + line_of(held)


@functools.cache  # it follows from the code alone, and takes seconds
def price() -> str:
    """What a private search states where its runs have one epsilon, by distribution and by how the runs were
    accounted."""
    rate, steps, delta, alone = 0.1, 100, 1e-5, 2.6
    family = EventFamily.gaussian(rate)
    states: dict[str, list[float]] = {}
    for by in ("rdp", "pld"):
        sigma = search.noise_multiplier_for(alone, delta, family, steps, by).noise_multiplier
        for name in DISTRIBUTIONS:
            event = events.selected(family.event(sigma, steps), Selection(float(MEAN_TRIALS), name))
            value = accountant.epsilon(event, delta).value
            assert value is not None
            states.setdefault(name, []).append(value)
    rows = [
        [name, f"{mine:.2f}", f"{tight:.2f}", f"{tight - mine:+.2f}"]
        for name, (mine, tight) in states.items()
    ]
    head = ["distribution", f"runs of {alone:g} by rdp", f"runs of {alone:g} by pld", "more"]
    return (
        f"Epsilon of a search of {MEAN_TRIALS} trials on average, whose runs are {steps} steps at a sampling "
        f"rate of {rate:g}, delta {delta:g}:\n\n{table(head, rows)}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
