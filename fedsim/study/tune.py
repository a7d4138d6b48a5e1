"""Settings chosen on held-out training examples: every variant gets the same number of trials.

A tuning file names a recipe or a comparison, whose variants and overrides it takes over, and a space of
settings (`fedsim.study.space`). Trial i tries the same place of the space for every variant and budget. Every
trial is an ordinary run in its own folder, evaluated on `holdout_examples` training examples that it does not
train on, so a search resumes where it stopped, and more trials go on from those that are there. The test set
is never looked at.

The search reads private examples and epsilon does not count it (mode "free", which is what most of the
literature does); the chosen configurations say so, and so does every result of theirs. What is counted is
`fedsim.study.private_tune`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from fedsim import loading, provenance, validate
from fedsim.config import Config
from fedsim.engine.checkpoint import write_atomic
from fedsim.merging import parse_options, read
from fedsim.method import Method
from fedsim.report.plain import as_json
from fedsim.study import claimed, compare, fixed, names, space, whole
from fedsim.study.compare import Comparison, Planned, Runner
from fedsim.study.judged import Judges
from fedsim.study.scored import Judged, Trial, chosen, judged, tied, ties
from fedsim.study.space import Space
from fedsim.study.tuned import Chosen, Tuned, name_of, recipe_digest, recipe_name
from fedsim.validate import InputError, RunError

SEARCH = "search.json"
"""What is in the folder of a private search, and of no other."""
TRIALS = claimed.SEARCH.before
_WITHOUT_SEED = re.compile(r"-seed\d+-[0-9a-f]{8}$")


@dataclass(frozen=True)
class Tuning:
    """What to search.

    Attributes:
        title: names the default folder.
        comparison: take recipe, overrides, variants and budgets of this comparison; or
        recipe: the configuration to tune.
        overrides: "key=value" strings for all trials, after those of the comparison.
        variants: name -> "key=value" strings; empty: those of the comparison, or the recipe alone.
        epsilons: budgets to tune at; empty: those of the comparison, or what the recipe says.
        seeds: runs of every trial; its score is their mean.
        trials: for every variant at every budget.
        seed: of the places tried.
        holdout_examples: training examples that trials are judged by and do not train on.
        space: setting -> a list of values, or {low, high, scale}.
        spaces: variant -> settings of its own, beside or in place of those of `space`; null: not searched.
        distribution: of the number of trials of a private search (`fedsim tune --private`), whose mean is
            `trials`: logarithmic, geometric or poisson.
    """

    title: str = ""
    comparison: str | None = None
    recipe: str | None = None
    overrides: list[str] = field(default_factory=list)
    variants: dict[str, list[str]] = field(default_factory=dict)
    epsilons: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    trials: int = 16
    seed: int = 0
    holdout_examples: int = 0
    space: dict[str, Any] = field(default_factory=dict)
    spaces: dict[str, Any] = field(default_factory=dict)
    distribution: str = "geometric"


def load(source: str | Path) -> Tuning:
    """Load a tuning file from a path or a name under configs/, with what its comparison says filled in.

    Raises:
        InputError: unreadable file, unknown key, nothing to search, or no held-out examples.
    """
    path = loading.find(source)
    content = OmegaConf.to_container(read(path))
    assert isinstance(content, dict)
    names.check_numbers(path, content)
    if "tuned" in content:
        raise InputError(
            f"{path} is a comparison, which `fedsim compare` runs. A file for `fedsim tune` names it under "
            "comparison, beside trials, holdout_examples and space."
        )
    found: Tuning = parse_options({str(k): v for k, v in content.items()}, Tuning, str(path))
    if (found.recipe is None) == (found.comparison is None):
        raise InputError(f"{path}: a tuning file needs either recipe or comparison.")
    for name in ("trials", "holdout_examples"):
        validate.positive(getattr(found, name), f"{path}: {name}")
    if not found.seeds or len(set(found.seeds)) != len(found.seeds):
        raise InputError(
            f"{path}: seeds must be different numbers, one run each, at least one, got {found.seeds}."
        )
    if not found.space and not found.spaces:
        raise InputError(f"{path}: a tuning file needs a space: settings with a list or a range of values.")
    held = Comparison(variants={Path(str(found.recipe)).stem: []})
    if found.comparison is not None:
        held = compare.load(loading.find(found.comparison, path.parent), untuned=True)
    names.check(path, found.title, found.variants, found.epsilons)
    variants = {name: loading.located(given, path.parent) for name, given in found.variants.items()}
    made = dataclasses.replace(
        found,
        recipe=held.recipe or str(loading.find(str(found.recipe), path.parent)),
        overrides=[*held.overrides, *loading.located(found.overrides, path.parent)],
        variants=variants or held.variants,
        epsilons=found.epsilons or held.epsilons,
    )
    if unknown := [name for name in made.spaces if name not in made.variants]:
        raise InputError(
            f"{path}: spaces must be of variants, got {unknown[0]!r}. "
            f"{validate.did_you_mean(unknown[0], list(made.variants))}".rstrip()
        )
    for name in made.variants:
        try:
            space_of(made, name)
        except InputError as error:
            raise validate.with_place(error, f"{path}: ") from error
    return made


def space_of(tuning: Tuning, variant: str, overrides: Sequence[str] = ()) -> Space:
    """Return the settings that are searched for a variant.

    Args:
        tuning: what to search.
        variant: of it.
        overrides: "key=value" strings for all trials.

    Raises:
        InputError: a space that is none, or over what a search does not choose (`fedsim.study.fixed`).
    """
    own = tuning.spaces.get(variant, {})
    if not isinstance(own, dict):
        raise InputError(
            f"spaces of {variant} must be settings with a list or a range of values, got {own!r}."
        )
    common = {name: values for name, values in tuning.space.items() if own.get(name, values) is not None}
    kept = {name: values for name, values in own.items() if values is not None}
    found = Space.of(kept, f"spaces of {variant}").over(Space.of(common, "space"))
    fixed.refuse(found.settings, f"space of {variant}")

    def config() -> Config:
        given = [*tuning.overrides, *tuning.variants[variant], *overrides]
        return loading.load(str(tuning.recipe), given, where="settings")

    fixed.refuse_noise(found.settings, f"space of {variant}", tuning.epsilons, config)
    return found.with_integers(lambda name: whole.is_whole(name, config), f"space of {variant}")


def trials(tuning: Tuning, overrides: Sequence[str]) -> list[Trial]:
    """Return all trials with their checked configurations.

    Raises:
        InputError: a trial's configuration is wrong; names the variant.
    """
    spaces = {name: space_of(tuning, name, overrides) for name in tuning.variants}
    for held in spaces.values():
        fixed.refuse_overrides(overrides, held.settings)
    places = space.spread(tuning.trials, max(len(held.settings) for held in spaces.values()), tuning.seed)
    out = [
        trial
        for variant in tuning.variants
        for number in range(tuning.trials)
        for trial in _of_variant(tuning, variant, spaces[variant], number, places[number], overrides)
    ]
    for variant in tuning.variants:
        units = {Method.of(t.runs[0].config).unit for t in out if t.variant == variant}
        if len(units) > 1:
            raise InputError(
                f"variant '{variant}': all trials must protect one unit, got {' and '.join(sorted(units))}: "
                "a score must not choose what is promised. Make a variant of each."
            )
    names.refuse_shared(((run.folder, t.variant) for t in out for run in t.runs), "run a folder")
    named = ((name_of(t.variant, t.epsilon), f"{t.variant} at {t.epsilon}") for t in out)
    names.refuse_shared(named, "choice a file")
    return out


def _of_variant(
    tuning: Tuning,
    variant: str,
    held: Space,
    number: int,
    place: NDArray[np.float64],
    overrides: Sequence[str],
) -> Iterator[Trial]:
    """The trials of one place: one a budget."""
    mine = place[: len(held.settings)].tolist()
    settings = held.at(mine)
    cells: dict[float | None, list[Planned]] = {}
    for cell in runs_of(tuning, variant, settings, tuning.seeds, [*overrides, *evaluated_on(tuning)]):
        cells.setdefault(cell.epsilon, []).append(cell)
    for epsilon, runs in cells.items():
        yield Trial(variant, epsilon, number, tuple(settings), tuple(held.at_the_edge(mine)), tuple(runs))


def runs_of(
    tuning: Tuning, variant: str, settings: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]
) -> list[Planned]:
    """Return the runs of a variant with some settings, one a budget and seed; `overrides` come last.

    Raises:
        InputError: the configuration is wrong; names the variant.
    """
    comparison = Comparison(
        recipe=str(tuning.recipe),
        overrides=tuning.overrides,
        seeds=list(seeds),
        epsilons=tuning.epsilons,
        variants={variant: [*tuning.variants[variant], *settings]},
    )
    return compare.cells(comparison, list(overrides))


def evaluated_on(tuning: Tuning) -> list[str]:
    """Return the overrides by which a trial is judged by all held-out examples and by nothing else."""
    return [f"data.holdout_examples={tuning.holdout_examples}", "data.test_examples=null"]


def run(tuning: Tuning, overrides: Sequence[str], out: Path, runner: Runner, log: TextIO) -> list[Judged]:
    """Check all trials, run those that are not finished, and write what was chosen into `out`.

    Args:
        tuning: what to search.
        overrides: "key=value" strings for all trials, applied last.
        out: folder: tuning.json, which says what it searches, runs/, trials.json and, once all are there,
            tuned.yaml and chosen/.
        runner: trains one configuration into a folder and returns its result.
        log: where progress goes, a line a run.

    Raises:
        InputError: a trial's configuration is wrong, or the folder is another search's or holds more trials,
            before the first run starts.
        RunError: no trial of a variant ended with a number, or a file could not be written.
    """
    planned = trials(tuning, overrides)
    if (out / SEARCH).exists():
        raise InputError(
            f"{out} is the folder of a private search, whose trials stay hidden and are no trials of this "
            "one. Choose another --out."
        )
    search = _search(tuning, planned)
    claimed.check(claimed.SEARCH, out, search)
    _refuse_fewer(tuning, planned, out)
    done: list[Judged] = []
    finished = compare.finish(
        [cell for trial in planned for cell in trial.runs],
        out,
        compare.forgiving(runner),
        log,
        judges=Judges(apart=True),
        before=lambda: claimed.claim(claimed.SEARCH, out, search),
    )
    for trial in planned:
        results = [next(finished)[2] for _ in trial.runs]
        done.append(judged(trial, results))
        with validate.failures_as(RunError, f"{out / TRIALS} was not written", "Repeat the command."):
            write_atomic(out / TRIALS, (as_json(record(tuning, done), indent=1) + "\n").encode())
    with validate.failures_as(RunError, f"what was chosen was not written to {out}", "Repeat the command."):
        _write_chosen(tuning, overrides, chosen(done), done, out)
    return done


def _search(tuning: Tuning, planned: Sequence[Trial]) -> dict[str, Any]:
    """What a search is, but for its number of trials. The digests are of its first trial, which all numbers
    have: of the recipe and of whatever changes it."""
    parts = ("space", "spaces", "holdout_examples", "variants", "epsilons", "seeds", "seed")
    first = [run for trial in planned if trial.number == 0 for run in trial.runs]
    digests = {run.name: run.config.digest() for run in first}
    return {**{name: getattr(tuning, name) for name in parts}, "digests of recipe and overrides": digests}


def _refuse_fewer(tuning: Tuning, planned: Sequence[Trial], out: Path) -> None:
    """Refuse to choose among some of the trials of a folder: the others read the same examples, and one of
    them may be the best."""
    kept = {run.folder for trial in planned for run in trial.runs}
    there = [path.parent.name for path in (out / "runs").glob("*/result.json")]
    found = [_WITHOUT_SEED.sub("", name) for name in there if name not in kept]
    for trial in planned:
        if more := found.count(_WITHOUT_SEED.sub("", trial.runs[0].folder)):
            least = tuning.trials + math.ceil(more / len(trial.runs))
            raise InputError(
                f"{out} holds {least} trials of '{trial.variant}', more than trials={tuning.trials}, and the "
                f"best may be among the others. Say --trials {least} or more, or choose another --out."
            )


def record(tuning: Tuning, done: Sequence[Judged]) -> dict[str, Any]:
    """Return all trials so far as JSON-able values."""
    return {
        "kind": "tuning",
        **dataclasses.asdict(tuning),
        "mode": "free",
        "trials": [
            {
                "variant": one.trial.variant,
                "epsilon": one.trial.epsilon,
                "trial": one.trial.number,
                "settings": list(one.trial.settings),
                "score": None if math.isnan(one.score) else one.score,
                "scores": [None if math.isnan(score) else score for score in one.scores],
                "headline": None if one.headline is None else dataclasses.asdict(one.headline),
                "seconds": one.seconds,
            }
            for one in done
        ],
        "seconds": sum(one.seconds for one in done),
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
    }


def _write_chosen(
    tuning: Tuning,
    overrides: Sequence[str],
    best: dict[tuple[str, float | None], Judged],
    done: Sequence[Judged],
    out: Path,
) -> None:
    """Write tuned.yaml, which a comparison takes up, and one configuration a variant and budget."""
    entries = [
        Chosen(*key, list(one.trial.settings), round(one.score, 5), list(one.trial.edges))
        for key, one in best.items()
    ]
    recipe = str(tuning.recipe)
    tuned = Tuned(
        tuning.title,
        recipe_name(recipe),
        recipe_digest(recipe),
        tuning.trials,
        tuning.holdout_examples,
        tuning.seeds,
        {name: [*tuning.overrides, *given, *overrides] for name, given in tuning.variants.items()},
        entries,
    )
    notes = [
        f"# {f'epsilon {key[1]:g}: ' if key[1] is not None else ''}{text}.\n"
        for key, one in best.items()
        if (text := tied(done, one))
    ]
    write_atomic(out / "tuned.yaml", "".join([*notes, tuned.write()]).encode())
    (out / "chosen").mkdir(exist_ok=True)
    for (variant, epsilon), one in best.items():
        about = tuned.about()
        runs = runs_of(tuning, variant, one.trial.settings, tuning.seeds[:1], [*overrides, *about])
        (config,) = (run.config for run in runs if run.epsilon == epsilon)
        text = f"{_table(variant, epsilon, done)}{loading.to_yaml(config)}"
        write_atomic(out / "chosen" / f"{name_of(variant, epsilon)}.yaml", text.encode())


def _table(variant: str, epsilon: float | None, done: Sequence[Judged]) -> str:
    """All trials of a variant at a budget, the best first, as comments."""
    mine = [one for one in done if (one.trial.variant, one.trial.epsilon) == (variant, epsilon)]
    headline = next(one.headline for one in mine if one.headline is not None)
    sign = -1.0 if headline.higher_is_better else 1.0
    mine.sort(key=lambda one: math.inf if math.isnan(one.score) else sign * one.score)
    lines = ["Chosen by `fedsim tune`, all trials by their score on held-out training examples:"]
    for one in mine:
        score = one.unscored if math.isnan(one.score) else headline.shown(one.score)
        lines.append(f"  {one.trial.number:3d}  {score:>9}  {' '.join(one.trial.settings)}")
    if (count := ties(done, mine[0])) > 1:
        lines.append(f"{count} of them tie; the first is taken.")
    return "".join(f"# {line}\n" for line in lines)
