"""`tune`: settings chosen on held-out training examples, with or without counting the search."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim import validate
from fedsim.cli import show
from fedsim.cli.arguments import command, config_arguments
from fedsim.cli.many import runner_of

if TYPE_CHECKING:
    from fedsim.study.tune import Tuning


def add(commands: Any) -> None:
    """Register the command."""
    tune = command(
        commands,
        "tune",
        _tune,
        "search settings on held-out training examples, with equally many trials for every variant",
        "The same command again continues where it stopped; more trials go on from those that are there.",
    )
    config_arguments(tune, "tuning file, or a name under configs/ such as tune/quickstart", "for all trials")
    tune.add_argument("--trials", type=int, metavar="N", help="instead of what the file says")
    tune.add_argument(
        "--private", action="store_true", help="count the search: target_epsilon is of all of it"
    )
    tune.add_argument(
        "--keep", action="store_true", help="with --private: keep the trials, which must stay hidden"
    )
    tune.add_argument("--out", type=Path, help="folder of the search (default: runs/tune/TITLE)")
    tune.set_defaults(goes_on="the same command")


def _tune(options: argparse.Namespace) -> Any:
    from fedsim.engine.run_folder import file_name
    from fedsim.study import tune

    tuning = tune.load(options.config)
    if options.trials is not None:
        validate.positive(options.trials, "--trials")
        tuning = dataclasses.replace(tuning, trials=options.trials)
    if options.keep and not options.private:
        validate.conflicts("--keep is for --private; trials of other searches stay anyway.", "Leave it out.")
    name = file_name(tuning.title, "search") + ("-private" if options.private else "")
    out = options.out or Path("runs") / "tune" / name
    return (_private if options.private else _free)(tuning, options, out)


def _free(tuning: Tuning, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run the trials that are not finished, and say what was chosen."""
    from fedsim.study import scored, tune
    from fedsim.study.tuned import name_of

    done = tune.run(tuning, options.overrides, out, runner_of("local"), sys.stderr)
    best = scored.chosen(done)
    if not options.json:
        table = show.table("variant", "budget", "score", "settings", "at the edge")
        for (variant, epsilon), one in best.items():
            assert one.headline is not None
            table.add_row(
                variant,
                "the recipe's" if epsilon is None else f"{epsilon:g}",
                f"{one.headline.name} {one.headline.shown(one.score)}",
                "\n".join(one.trial.settings),
                "\n".join(one.trial.edges) or "-",
            )
        show.console().print(table)
        for (_, epsilon), one in best.items():
            if said := scored.tied(done, one):
                print(f"{'' if epsilon is None else f'At epsilon {epsilon:g}, '}{said}.")
        if any(one.trial.edges for one in best.values()):
            print("A setting at the edge of its range may be better beyond it: widen the range.")
        first = out / "chosen" / f"{name_of(*next(iter(best)))}.yaml"
        print(
            f"{tuning.trials} trials each, judged by {tuning.holdout_examples} held-out training examples; "
            "the test set was not looked at.\n"
            "The search looked at private examples, and no epsilon counts that (--private does).\n"
            f"Trials: {out / 'trials.json'}\nFor a comparison: tuned: {out / 'tuned.yaml'}\n"
            f"Try next:\n  fedsim run {first}"
        )
    return tune.record(tuning, done)


def _private(tuning: Tuning, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run the trials that are not finished, and say what was released."""
    from fedsim.study import private_tune

    found = private_tune.run(
        tuning, options.overrides, out, runner_of("local", searching=True), sys.stderr, keep=options.keep
    )
    if not options.json:
        if found.before:
            print(
                "This search was finished before: nothing was drawn, nothing is spent anew."
                + ("" if found.same_data else " Nothing tells whether the examples are still the same.")
            )
        if found.folder is None:
            print("No trial was drawn, or all diverged: nothing is released.")
        else:
            print(f"Settings: {' '.join(found.settings)}")
            print(
                f"Score:    {100 * found.score:.1f} % of {tuning.holdout_examples} held-out examples, with "
                f"noise of standard deviation {100 * found.score_std:.1f} %"
            )
            print(f"Model:    {found.folder}")
        print(f"epsilon of the whole search: {show.spent(found.epsilon)}")
        print(
            f"The best of a hidden number of trials, {tuning.distribution} with mean {tuning.trials}."
            + (" What must stay hidden was kept." if options.keep else " The others are removed.")
        )
    return dataclasses.asdict(found)
