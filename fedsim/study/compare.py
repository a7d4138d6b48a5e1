"""One recipe under several variants, budgets and seeds: run what is missing, then report.

A comparison file names a recipe, overrides for all cells, and variants (lists of overrides). Every cell is
an ordinary run in its own folder, so a comparison resumes where it stopped and finished cells are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from fedsim import loading, rules, validate
from fedsim.config import Config
from fedsim.engine import opening
from fedsim.engine.experiment import prepare
from fedsim.engine.metrics import numbers_of, read_steps
from fedsim.engine.run_folder import RunFolder
from fedsim.headline import Metric
from fedsim.merging import parse_options, read
from fedsim.report import comparison
from fedsim.report.cells import Cell
from fedsim.report.page import About
from fedsim.study import claimed, names, taken_up, unlike
from fedsim.study.judged import Judges, all_unscored, unscored
from fedsim.study.tuned import Tuned, recipe_name
from fedsim.validate import Diverged, InputError, RunError


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        title: heading of the report.
        recipe: configuration every cell starts from; paths start at the comparison's own folder.
        overrides: "key=value" strings for all cells.
        seeds: one run each; spreads are over these.
        epsilons: target epsilons for the private variants; empty: what the variants say.
        variants: name -> "key=value" strings.
        tuned: file of settings by variant and budget, as `fedsim tune` writes it; those of the nearest budget
            come after the variant's own.
    """

    title: str = ""
    recipe: str = ""
    overrides: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    epsilons: list[float] = field(default_factory=list)
    variants: dict[str, list[str]] = field(default_factory=dict)
    tuned: str | None = None


@dataclass(frozen=True)
class Planned:
    """One cell that is to be run: its place in the table, its configuration, and what its variant sets."""

    variant: str
    epsilon: float | None
    seed: int
    config: Config
    settings: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What people call the run."""
        budget = "" if self.epsilon is None else f" at epsilon {self.epsilon:g}"
        return f"{self.variant}{budget}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Name of the run's folder; the digest keeps cells of an edited comparison apart."""
        budget = "" if self.epsilon is None else f"-eps{self.epsilon:g}"
        return f"{names.slug(self.variant)}{budget}-seed{self.seed}-{self.config.digest()[:8]}"


Runner = Callable[[Config, RunFolder], dict[str, Any]]


def load(source: str | Path, *, untuned: bool = False) -> Comparison:
    """Load a comparison from a path or a name under configs/; `untuned`: without the settings that a search
    chose for it, whose file need not be there yet.

    Raises:
        InputError: unreadable file, unknown key, or nothing to compare.
    """
    path = loading.find(source)
    content = OmegaConf.to_container(read(path))
    assert isinstance(content, dict)
    names.check_numbers(path, content)
    variants = content.get("variants")
    for name, settings in variants.items() if isinstance(variants, dict) else ():
        if not isinstance(settings, list):
            raise InputError(
                f"{path}: variant '{name}' must be a list of settings, such as [strategy=local], got "
                f"{settings!r}."
            )
    comparison_: Comparison = parse_options({str(k): v for k, v in content.items()}, Comparison, str(path))
    if not comparison_.recipe or not comparison_.variants or not comparison_.seeds:
        raise InputError(f"{path}: a comparison needs recipe, variants and seeds.")
    for name, values in (("seeds", comparison_.seeds), ("epsilons", comparison_.epsilons)):
        if len(set(values)) != len(values):
            raise InputError(f"{path}: {name} must be different numbers, one run each, got {values}.")
    names.check(path, comparison_.title, comparison_.variants, comparison_.epsilons)
    variants = {name: loading.located(given, path.parent) for name, given in comparison_.variants.items()}
    return dataclasses.replace(
        comparison_,
        recipe=str(loading.find(comparison_.recipe, path.parent)),
        overrides=loading.located(comparison_.overrides, path.parent),
        variants=variants,
        tuned=None if untuned or not comparison_.tuned else str(loading.find(comparison_.tuned, path.parent)),
    )


def cells(comparison_: Comparison, overrides: list[str]) -> list[Planned]:
    """Return every cell with its checked configuration.

    Raises:
        InputError: a cell's configuration is wrong, has another seed or budget than its place in the table,
            is judged by something else than the others or has another delta; names the variant.
    """
    out: list[Planned] = []
    tuned = _tuned(comparison_)
    for variant, changes in comparison_.variants.items():
        if any(change.partition("=")[0].strip() == "seed" for change in changes):
            raise InputError(
                f"variant '{variant}': seed must be left out, for every variant runs with each of the "
                "`seeds` of the comparison."
            )
    for variant, changes in comparison_.variants.items():
        for epsilon in _budgets(comparison_, changes):
            budget = [] if epsilon is None else [f"privacy.target_epsilon={epsilon}"]
            given = [*comparison_.overrides, *budget, *changes]
            last = [f"seed={comparison_.seeds[0]}", *overrides]
            chosen: list[str] = []
            if tuned is not None:
                own = epsilon or _loaded(comparison_, variant, [*given, *last]).privacy.target_epsilon
                chosen = tuned.overrides(variant, own)
                own_settings = [item for item in chosen if not item.startswith("tuning.")]
                if all(_replaced(item, overrides) for item in own_settings):  # nothing is left of a search
                    chosen = own_settings
            config = _loaded(comparison_, variant, [*given, *chosen, *last])
            _check_place(config, variant, epsilon, comparison_.seeds[0])
            if out:
                _check_comparable(out[0], variant, config)
            settings = [item for item in (*changes, *chosen) if not _replaced(item, overrides)]
            for seed in comparison_.seeds:
                rules.check(one := dataclasses.replace(config, seed=seed))
                out.append(Planned(variant, epsilon, seed, one, list(settings)))
    names.refuse_shared(((cell.folder, cell.name) for cell in out), "run a folder")
    return out


def _loaded(comparison_: Comparison, variant: str, given: list[str]) -> Config:
    try:
        return loading.load(comparison_.recipe, given, where="settings")
    except InputError as error:
        raise InputError(f"variant '{variant}': {error}") from error


def _tuned(comparison_: Comparison) -> Tuned | None:
    if comparison_.tuned is None:
        return None
    found = Tuned.read(Path(comparison_.tuned))
    found.of_recipe(comparison_.recipe, comparison_.tuned)
    return found


def _replaced(item: str, overrides: Sequence[str]) -> bool:
    """Whether an override, which comes last, says all that "key=value" says: a mapping does not."""
    said = [
        key for key, _, value in (o.partition("=") for o in overrides) if not value.lstrip().startswith("{")
    ]
    return any(f"{item.partition('=')[0]}.".startswith(f"{key}.") for key in said)


def _check_place(config: Config, variant: str, epsilon: float | None, seed: int) -> None:
    """Refuse a run that a variant or an override makes another one than the table will call it."""
    if config.seed != seed:
        raise InputError(
            f"variant '{variant}': seed must be {seed} in this run, got {config.seed}. The seeds of a "
            "comparison are its key `seeds`."
        )
    if epsilon is not None and config.privacy.target_epsilon != epsilon:
        raise InputError(
            f"variant '{variant}': privacy.target_epsilon must be {epsilon:g} in this run, got "
            f"{config.privacy.target_epsilon}. Budgets are the key `epsilons`; a variant with one of its own "
            "says privacy.target_epsilon=NUMBER among its settings, and is compared with others of that kind."
        )


def _check_comparable(first: Planned, variant: str, config: Config) -> None:
    """Refuse scores of different metrics or examples, and budgets that are not the same promise."""
    for name, judged in _JUDGED.items():
        own, other = judged(config), judged(first.config)
        if own != other:
            raise InputError(
                f"variant '{variant}': {name} must be the same in all variants, which are compared; "
                f"got {own}, and {other} in '{first.variant}'. Set it under overrides."
            )


_JUDGED: dict[str, Callable[[Config], Any]] = {
    "task": lambda config: config.task,
    "data.name": lambda config: config.data.name,
    "data.holdout_examples": lambda config: config.data.holdout_examples,
    "data.test_examples": lambda config: config.data.test_examples,
    "privacy.delta": lambda config: config.privacy.delta,
}


def _budgets(comparison_: Comparison, changes: list[str]) -> Sequence[float | None]:
    """Those a variant is run at; one that sets its own budget, or has none, is run once a seed."""
    own = any(c.startswith(("privacy.target_epsilon=", "privacy.noise_multiplier=")) for c in changes)
    return [None] if own or not comparison_.epsilons else comparison_.epsilons


def run(
    comparison_: Comparison,
    overrides: list[str],
    out: Path,
    runner: Runner,
    log: TextIO,
    command: Callable[[Sequence[str]], str] = lambda _: "",
) -> list[Cell]:
    """Check all cells, run those that are not finished, and write the report into `out`. Runs that diverge,
    or have no score, are left out, and named on it; those that were finished before stand on it with what
    they were made with.

    Args:
        comparison_: what to compare.
        overrides: "key=value" strings for all cells, applied last.
        out: folder of the comparison: comparison.json, which says of which, runs/, report.html, table.md,
            table.csv, cells.json.
        runner: trains one configuration into a folder and returns its result.
        log: where progress goes, a line a cell.
        command: gives, with those of `overrides` that all runs were made with, what the page names as the way
            to make it again.

    Raises:
        InputError: a cell's configuration or folder is wrong, it is judged by other examples than the
            others, or the folder is another comparison's, before the first run starts.
        RunError: the report could not be written, no run has a score, or data changed meanwhile.
    """
    done: list[Cell] = []
    planned, judges = cells(comparison_, overrides), Judges()
    others = {c.folder: taken_up.otherwise(RunFolder(out / "runs" / c.folder), c.config) for c in planned}
    given = [*(item for item in comparison_.overrides if not _replaced(item, overrides)), *overrides]
    shared, lost = taken_up.of_all(given, list(others.values()))
    about = About(
        comparison_.title,
        Path(comparison_.recipe).stem,
        shared,
        command(taken_up.of_all(overrides, list(others.values()))[0]),
        len(planned),
        _chosen(comparison_, planned, overrides),
        taken_up=taken_up.told({c.name: taken_up.as_strings(others[c.folder]) for c in planned}),
    )
    there = [RunFolder(out / "runs" / cell.folder).result.exists() for cell in planned]
    following = dict(zip((cell.folder for cell in planned), [*there[1:], False], strict=True))
    own = {"title": comparison_.title, "recipe": recipe_name(comparison_.recipe)}
    claimed.check(claimed.COMPARISON, out, own)
    finished = finish(
        planned,
        out,
        forgiving(runner),
        log,
        judges=judges,
        before=lambda: claimed.claim(claimed.COMPARISON, out, own),
    )
    for cell, folder, result in finished:
        about = dataclasses.replace(about, inputs=judges.inputs())
        if why := unscored(result):
            about = dataclasses.replace(about, left_out=[*about.left_out, (cell.name, why)])
            print(f"{cell.folder}: {why}; it is left out", file=log, flush=True)
            continue
        curve, held_out = _curve(folder, Metric.of(result)), bool(cell.config.data.holdout_examples)
        settings = taken_up.of_run([*lost, *cell.settings], others[cell.folder])
        done.append(Cell(cell.variant, cell.epsilon, cell.seed, result, curve, settings, held_out))
        if following[cell.folder]:  # it is there already: the next report follows at once
            continue
        with validate.failures_as(RunError, f"the report in {out} was not written", "Repeat the command."):
            comparison.write(done, about, out)
    if not done:
        raise RunError(f"no run in {out} has a score: {all_unscored([why for _, why in about.left_out])}")
    if about.left_out:
        comparison.write(done, about, out)
    return done


def forgiving(runner: Runner) -> Runner:
    """Return a runner for which a run that diverges is a result: {"diverged": why}."""

    def run_one(config: Config, folder: RunFolder) -> dict[str, Any]:
        try:
            return runner(config, folder)
        except Diverged as error:
            return {"diverged": str(error)}

    return run_one


def _chosen(comparison_: Comparison, planned: Sequence[Planned], overrides: Sequence[str] = ()) -> str:
    """What is to be known of the settings that a search chose for these cells."""
    held = _tuned(comparison_)
    if held is None:
        return ""
    asked = [(cell.variant, cell.config.privacy.target_epsilon) for cell in planned]
    changed = held.of_recipe(comparison_.recipe, "")
    if held.searched:
        other = unlike.sentence(held, comparison_.recipe, [(cell.variant, cell.config) for cell in planned])
    else:
        other = f"Settings were chosen without {', '.join(overrides)}." if overrides else ""
    judged = "They were chosen by examples that are among those of these scores."
    seen = judged if any(cell.config.data.holdout_examples for cell in planned) else ""
    edges = held.edges(asked, lambda setting: _replaced(f"{setting}=", overrides))
    return " ".join(filter(None, (changed, other, held.borrowed(asked), edges, seen)))


def finish(
    planned: Sequence[Planned],
    out: Path,
    runner: Runner,
    log: TextIO,
    *,
    searching: bool = False,
    judges: Judges | None = None,
    before: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Planned, RunFolder, dict[str, Any]]]:
    """Check all cells, then run those that are not finished under `out`/runs and yield every result.

    Args:
        planned: the cells.
        out, runner, log: as of `run`.
        searching: they are the trials of a private search.
        judges: takes in what they are judged by; None: of its own, for cells that are all compared.
        before: called when all are checked, before the first is run.

    Raises:
        InputError: a cell's configuration or folder is wrong, or it is judged by other examples than the
            others; names the variant, before the first run starts.
        RunError: what a run is judged by changed since then.
    """
    judges = judges or Judges()
    for cell in planned:
        if cell.config.monitor.public_only:
            validate.conflicts(
                "monitor.public_only withholds what runs are compared by (seconds, scores over holders).",
                "Leave it null: studies of several runs are for simulation.",
            )
        folder = RunFolder(out / "runs" / cell.folder)
        folder.check(cell.config, resume=True)
        try:
            if not searching and not folder.result.exists():
                rules.refuse_outside_search(cell.config)
            experiment = prepare(cell.config)
            opening.check_unchanged(experiment, folder)
            judges.see(cell, experiment)
        except InputError as error:
            raise InputError(f"variant '{cell.variant}': {error}") from error
    with validate.failures_as(InputError, f"{out} cannot be written", "Choose another --out."):
        before()
    for number, cell in enumerate(planned, start=1):
        folder = RunFolder(out / "runs" / cell.folder)
        fresh = ""
        if folder.finished() is not None:
            made = taken_up.as_strings(taken_up.otherwise(folder, cell.config))
            fresh = f" (finished before{''.join(f', {one}' for one in made)})"
        print(f"[{number}/{len(planned)}] {cell.folder}{fresh}", file=log, flush=True)
        result = runner(cell.config, folder)
        judges.check(cell, folder)
        yield cell, folder, result


def _curve(folder: RunFolder, headline: Metric) -> list[tuple[int, float]]:
    """(step, headline on the test data) wherever the run evaluated."""
    numbers = [(line["step"], numbers_of(line).get(headline.name)) for line in read_steps(folder.metrics)]
    return [(step, score) for step, score in numbers if score is not None]
