"""A search that epsilon counts: a hidden random number of trials, of which the best alone is released.

Papernot and Steinke 2022, "Hyperparameter Tuning with Renyi Differential Privacy". What their bound needs,
and how it is kept:

* The number of trials is random, of a known distribution, and stays hidden. It is drawn from the search's own
  root, and the trials are removed once the best is out.
* Trials are independent and alike: settings, draws and noise of each follow from a root of its own, and all
  settings of the space have the same event; a space that changes it is refused.
* The score is part of what is bounded. It is the number of held-out examples that are classified correctly,
  which one example changes by 1, plus Gaussian noise whose Renyi DP is at no order above that of training. An
  example is trained on or held out, never both, so a trial's curve is the larger of the two (parallel
  composition), that of training.

A target epsilon is that of the whole search, by the run's own mechanism (`EventFamily.selection`), and its
ledger says it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import loading, seeds, validate
from fedsim.config import Config
from fedsim.data import datasets
from fedsim.engine import model_card, scoring
from fedsim.engine.checkpoint import write_atomic
from fedsim.engine.experiment import Experiment, prepare
from fedsim.engine.run_folder import RunFolder
from fedsim.headline import Metric
from fedsim.mechanism import selection_of
from fedsim.privacy import accountant, events
from fedsim.report.plain import as_json
from fedsim.study import compare, space
from fedsim.study.compare import Planned, Runner
from fedsim.study.space import Space
from fedsim.study.tune import Tuning, evaluated_on, forgiving, space_of
from fedsim.validate import InputError, RunError

WINNER = "winner"
_SEARCH, _HIDDEN = "search.json", "hidden.json"
_PUBLISHED = ("config.yaml", "ledger.jsonl", "final.safetensors", "model.json")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a private search releases.

    Attributes:
        folder: configuration, ledger and model of the best trial; None where no trial was drawn, or all
            diverged.
        settings: that it was found with.
        score: its noisy score on the held-out examples, a fraction; may lie outside 0 .. 1.
        score_std: standard deviation of the noise on scores.
        epsilon: of the whole search, as the ledger says it.
    """

    folder: Path | None
    settings: tuple[str, ...]
    score: float
    score_std: float
    epsilon: dict[str, Any]


def run(
    tuning: Tuning, overrides: Sequence[str], out: Path, runner: Runner, log: TextIO, *, keep: bool = False
) -> Outcome:
    """Run the trials that are not finished, release the best into `out`/winner and remove the others.

    Args:
        tuning: what to search; of one variant at one budget, with one seed.
        overrides: "key=value" strings for all trials, applied last.
        out: folder of the search.
        runner: trains one configuration into a folder and returns its result.
        log: where progress goes. It tells how many trials there are, so it is for the data's owner alone.
        keep: leave the trials, and what must stay hidden, where they are: to study a simulation.

    Raises:
        InputError: what cannot be searched privately, says why; or a folder of another search. Nothing was
            started.
        RunError: a file could not be written.
    """
    variant, epsilon = _only(tuning)
    searched = space_of(tuning, variant)
    fixed = [
        *tuning.overrides,
        *([] if epsilon is None else [f"privacy.target_epsilon={epsilon}"]),
        *tuning.variants[variant],
    ]
    always = [
        *overrides,
        *evaluated_on(tuning),
        "tuning.mode=private",
        f"tuning.trials={tuning.trials}",
        f"tuning.held_out_examples={tuning.holdout_examples}",
        f"tuning.distribution={tuning.distribution}",
    ]
    first = _checked(str(tuning.recipe), fixed, searched, always)
    _claim(out, [first.config.digest(), dataclasses.asdict(searched), tuning.seed])
    if (held := _released(out)) is not None:
        return held
    std = score_std(first)
    root, number = _drawn(first.config, tuning.seed, out)
    planned = [_trial(tuning, fixed, searched, always, variant, epsilon, root, i) for i in range(number)]
    best: tuple[float, tuple[str, ...], RunFolder] | None = None
    cells = [cell for cell, _ in planned]
    finished = compare.finish(cells, out, forgiving(runner), log)
    for i, ((_, settings), (_, folder, result)) in enumerate(zip(planned, finished, strict=True)):
        score = noisy_score(result, tuning.holdout_examples, std, seeds.derive(root, "score", i))
        if score > (-math.inf if best is None else best[0]):
            best = score, settings, folder
    with validate.failures_as(RunError, f"the best trial was not released to {out}", "Repeat the command."):
        return _release(best, std, first, out, keep)


def _claim(out: Path, search: list[Any]) -> None:
    """Write which search a folder is of, or refuse that of another: its hidden trials are no trials of this.

    Raises:
        InputError: it is of another search.
    """
    path = out / _SEARCH
    digest = hashlib.sha256(json.dumps(search, sort_keys=True).encode()).hexdigest()
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps({"search": digest}) + "\n").encode())
    if json.loads(path.read_text())["search"] != digest:
        raise InputError(
            f"{out} is the folder of another search: recipe, space, seed or number of trials differ. Choose "
            "another --out; what both release adds up."
        )


def score_std(experiment: Experiment) -> float:
    """Return the standard deviation of the noise on a trial's number of correct answers: the least at which
    its Renyi DP is at no order above that of training."""
    event, _ = events.apart(experiment.mechanism.total_event(experiment.mechanism.steps))
    renyi = accountant.named(accountant.answering(event, "rdp"))
    orders = np.array(renyi.orders)  # type: ignore[attr-defined]
    curve = renyi.curve(accountant.parts_of(event))  # type: ignore[attr-defined]
    usable = np.isfinite(curve) & (curve > 0.0)
    return float(np.sqrt(orders[usable] / (2.0 * curve[usable])).max())


def noisy_score(result: dict[str, Any], examples: int, std: float, key: bytes) -> float:
    """Return the noisy fraction of correct answers of a trial; minus infinity where its parameters, which are
    private already, are no numbers."""
    if "diverged" in result:
        return -math.inf
    correct = float(round(result[Metric.of(result).name] * examples))
    return (correct + std * float(seeds.generator(key).standard_normal())) / examples


def number_of_trials(mean: float, distribution: str, generator: np.random.Generator) -> int:
    """Return a random number of trials of this distribution and mean."""
    if distribution == "poisson":
        return int(generator.poisson(mean))
    if distribution == "geometric":
        return int(generator.geometric(1.0 / mean))
    low, high = 1e-12, 1.0 - 1e-12  # of p, with mean -p / ((1 - p) log(1 - p))
    for _ in range(200):
        middle = (low + high) / 2.0
        if -middle / ((1.0 - middle) * math.log1p(-middle)) < mean:
            low = middle
        else:
            high = middle
    return int(generator.logseries(low))


def _only(tuning: Tuning) -> tuple[str, float | None]:
    """The variant and the budget of a private search."""
    if len(tuning.variants) != 1 or len(tuning.epsilons) > 1 or len(tuning.seeds) != 1:
        validate.conflicts(
            f"a private search is of one variant at one budget with one seed, but there are "
            f"{len(tuning.variants)} variants, {len(tuning.epsilons)} budgets and {len(tuning.seeds)} seeds.",
            "Search each on its own: every search spends its own epsilon.",
        )
    return next(iter(tuning.variants)), next(iter(tuning.epsilons), None)


def _checked(recipe: str, fixed: list[str], searched: Space, always: list[str]) -> Experiment:
    """One trial's experiment, after seeing that all settings have the same event and a score to be bounded.

    Raises:
        InputError: they do not; says which setting changes it.
    """
    experiments = [
        (corner, prepare(loading.load(recipe, [*fixed, *corner, *always]))) for corner in searched.corners()
    ]
    first = experiments[0][1]
    config, mechanism = first.config, first.mechanism
    if selection_of(config) is None or not mechanism.method.private or mechanism.unit != "example":
        validate.conflicts(
            "a private search is of a mechanism that protects examples, but this one protects "
            + (f"a {mechanism.unit}." if mechanism.method.private else "nobody."),
            "Use fedsim tune without --private, and say so.",
        )
    if config.task.name != "classification" or first.task.chosen.name != "accuracy":
        validate.conflicts(
            f"a private search judges by the number of correct answers, which one example changes by 1, but "
            f"task={config.task.name} is judged by {first.task.chosen.name}.",
            "Use task=classification, or fedsim tune without --private.",
        )
    wanted = mechanism.total_event(mechanism.steps)
    for corner, other in experiments:
        if other.mechanism.total_event(other.mechanism.steps) != wanted:
            validate.conflicts(
                f"a private search has trials of one event, but {' '.join(corner)} changes it.",
                "Leave out of the space what changes noise, steps or sampling.",
            )
    return first


def _drawn(config: Config, seed: int, out: Path) -> tuple[seeds.Root, int]:
    """The root of the search and its number of trials: from the seed, or secret and kept until the end."""
    if config.privacy.noise_source == "seeded":
        root: seeds.Root = int(seeds.stream(seed, "private search").integers(2**63))
    else:
        root = _secret_root(out)
    generator = seeds.stream(root, "number of trials")
    assert config.tuning.trials is not None
    return root, number_of_trials(config.tuning.trials, config.tuning.distribution, generator)


def _secret_root(out: Path) -> bytes:
    """32 random bytes that stay the same until the search ends, whoever comes first."""
    path = out / _HIDDEN
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        draft = out / f"{_HIDDEN}.{os.getpid()}"
        descriptor = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as handle:
            handle.write(json.dumps(secrets.token_hex(32)))
        with contextlib.suppress(FileExistsError):  # another process was first: its root counts
            os.link(draft, path)
        draft.unlink()
    return bytes.fromhex(json.loads(path.read_text()))


def _trial(
    tuning: Tuning,
    fixed: list[str],
    searched: Space,
    always: list[str],
    variant: str,
    epsilon: float | None,
    root: seeds.Root,
    number: int,
) -> tuple[Planned, tuple[str, ...]]:
    """Trial `number`: settings and seed of its own."""
    place: NDArray[np.float64] = space.independent(number, len(searched.settings), root)
    settings = searched.at(place.tolist())
    seed = int(seeds.stream(root, "seed of a trial", number).integers(2**63))
    config = loading.load(str(tuning.recipe), [*fixed, *settings, *always, f"seed={seed}"])
    return Planned(variant, epsilon, seed, config), tuple(settings)


def _release(
    best: tuple[float, tuple[str, ...], RunFolder] | None,
    std: float,
    first: Experiment,
    out: Path,
    keep: bool,
) -> Outcome:
    """Put what may be seen of the best trial into its folder, then the outcome, and remove the rest."""
    event = first.mechanism.total_event(first.mechanism.steps)
    privacy = first.config.privacy
    spent = accountant.epsilon(event, privacy.delta, privacy.accountant).among(first.facts.examples)
    examples = first.config.data.holdout_examples
    winner = out / WINNER
    if best is not None:
        winner.mkdir(exist_ok=True)
        for name in _PUBLISHED:
            write_atomic(winner / name, (best[2].root / name).read_bytes())
        RunFolder(winner).write_result(_public(best[2]))
    answer = {
        "kind": "private search",
        "winner": WINNER if best is not None else None,
        "settings": [] if best is None else list(best[1]),
        "score": math.nan if best is None else best[0],
        "score_std": std / examples,
        "mean_trials": first.config.tuning.trials,
        "distribution": first.config.tuning.distribution,
        "held_out_examples": examples,
        "epsilon": vars(spent),
        "describe": spent.describe(),
    }
    write_atomic(out / "outcome.json", (as_json(answer, indent=1) + "\n").encode())
    if not keep:
        shutil.rmtree(out / "runs", ignore_errors=True)
        (out / _HIDDEN).unlink(missing_ok=True)
    outcome = _released(out)
    assert outcome is not None
    return outcome


def _public(trial: RunFolder) -> dict[str, Any]:
    """The result of a trial without what was computed of private data, and scored on the test data."""
    result = trial.finished()
    assert result is not None
    for place in result["sensitive"]:
        *sections, name = place.split(".")
        held = result
        for section in sections:
            held = held[section]
        del held[name]
    config = loading.load(trial.config)
    splits = datasets.load(dataclasses.replace(config.data, holdout_examples=0))
    card = model_card.read(trial.card)
    model, dtype = model_card.load_model(card, trial.final), getattr(torch, config.model.dtype)
    scores = scoring.scores_of(model, card.made_task, splits, dtype, held_out=False)
    return (
        result
        | {name: score.value for name, score in scores.items()}
        | {"sensitive": [], "public_only": True}
    )


def _released(out: Path) -> Outcome | None:
    """What an earlier call released, or None."""
    path = out / "outcome.json"
    if not path.exists():
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(
        None if held["winner"] is None else out / held["winner"],
        tuple(held["settings"]),
        math.nan if held["score"] is None else held["score"],
        held["score_std"],
        held["epsilon"],
    )
