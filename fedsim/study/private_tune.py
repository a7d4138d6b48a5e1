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

import dp_accounting as dp
import numpy as np
import torch

from fedsim import loading, seeds, validate
from fedsim.accountants.renyi import Rdp
from fedsim.config import Config
from fedsim.data import datasets
from fedsim.engine import model_card, opening, scoring
from fedsim.engine.checkpoint import write_atomic
from fedsim.engine.experiment import Experiment, prepare
from fedsim.engine.run_folder import RunFolder
from fedsim.headline import Metric
from fedsim.privacy import accountant, events, ledger
from fedsim.report.plain import as_json
from fedsim.study import compare, fixed, space
from fedsim.study.compare import Planned, Runner, forgiving
from fedsim.study.tune import SEARCH, Tuning, evaluated_on, runs_of, space_of
from fedsim.validate import InputError, RunError

WINNER = "winner"
_HIDDEN = "hidden.json"
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
        before: an earlier call released it; this one drew nothing.
        same_data: the training examples are those that it was found with; None where nobody can tell: no
            model was released, or its key is gone (secure noise).
    """

    folder: Path | None
    settings: tuple[str, ...]
    score: float
    score_std: float
    epsilon: dict[str, Any]
    before: bool = False
    same_data: bool | None = None


def run(
    tuning: Tuning, overrides: Sequence[str], out: Path, runner: Runner, log: TextIO, *, keep: bool = False
) -> Outcome:
    """Run the trials that are not finished, release the best into `out`/winner and remove the others.

    Args:
        tuning: what to search; of one variant at one budget, with one seed.
        overrides: "key=value" strings for all trials, applied last.
        out: folder of the search.
        runner: trains one configuration into a folder and returns its result; made for a search, as other
            runs are refused such configurations.
        log: where progress goes. It tells how many trials there are, so it is for the data's owner alone.
        keep: leave the trials, and what must stay hidden, where they are: to study a simulation.

    Raises:
        InputError: what cannot be searched privately, says why; or a folder of another search. Nothing was
            started.
        RunError: a file could not be written, or the model that an earlier call released is gone.
    """
    variant = _only(tuning)
    searched = space_of(tuning, variant, overrides)
    fixed.refuse(searched.settings, f"space of {variant}", private=True)
    fixed.refuse_overrides(overrides, searched.settings)
    always = [
        *overrides,
        *evaluated_on(tuning),
        "tuning.mode=private",
        f"tuning.trials={tuning.trials}",
        f"tuning.held_out_examples={tuning.holdout_examples}",
        f"tuning.distribution={tuning.distribution}",
    ]

    def trial(settings: Sequence[str], seed: int) -> Planned:
        (planned,) = runs_of(tuning, variant, settings, [seed], always)
        return planned

    corners = [(corner, trial(corner, tuning.seeds[0])) for corner in searched.corners()]
    first = _checked(corners)
    _claim(out, [first.config.digest(), {"settings": dataclasses.asdict(searched)["settings"]}, tuning.seed])
    if (held := _released(out)) is not None:
        return dataclasses.replace(held, before=True, same_data=_unchanged(out, first.config))
    root, number = _drawn(first.config, tuning.seed, out)
    planned = []
    for i in range(number):
        settings = searched.at(space.independent(i, len(searched.settings), root).tolist())
        seed = int(seeds.stream(root, "seed of a trial", i).integers(2**63))
        planned.append((settings, trial(settings, seed)))
    _checked([*corners[:1], *planned])
    std = score_std(first)
    best: tuple[float, Sequence[str], RunFolder] | None = None
    finished = compare.finish([cell for _, cell in planned], out, forgiving(runner), log, searching=True)
    for i, ((settings, _), (_, folder, result)) in enumerate(zip(planned, finished, strict=True)):
        score = noisy_score(result, tuning.holdout_examples, std, seeds.derive(root, "score", i))
        if score > (-math.inf if best is None else best[0]):
            best = score, settings, folder
    with validate.failures_as(RunError, f"the best trial was not released to {out}", "Repeat the command."):
        return _release(best, std, first, out, keep)


def _claim(out: Path, search: list[Any]) -> None:
    """Write which search a folder is of, or refuse that of another: its hidden trials are no trials of this.

    Raises:
        InputError: it is of another search, or of one that is not private.
    """
    path = out / SEARCH
    digest = hashlib.sha256(json.dumps(search, sort_keys=True).encode()).hexdigest()
    if not path.exists():
        if (out / "runs").exists() or (out / "trials.json").exists():
            raise InputError(
                f"{out} holds runs of a search or a study that is not private, among which this one's would "
                "be seen. Choose another --out."
            )
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
    event, _ = events.apart(_event(experiment))
    renyi = accountant.named(accountant.answering(event, "rdp"))
    assert isinstance(renyi, Rdp)
    orders, curve = np.array(renyi.orders), renyi.curve(accountant.parts_of(event))
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


def _only(tuning: Tuning) -> str:
    """The variant of a private search, which has one budget and one seed."""
    if len(tuning.variants) != 1 or len(tuning.epsilons) > 1 or len(tuning.seeds) != 1:
        validate.conflicts(
            f"a private search is of one variant at one budget with one seed, but there are "
            f"{len(tuning.variants)} variants, {len(tuning.epsilons)} budgets and {len(tuning.seeds)} seeds.",
            "Search each on its own: every search spends its own epsilon.",
        )
    return next(iter(tuning.variants))


def _checked(trials: Sequence[tuple[Sequence[str], Planned]]) -> Experiment:
    """The first of these trials (settings, run), after seeing that all are alike in what the bound needs.

    Raises:
        InputError: another event than the first one's, or no score that one example changes by 1.
    """
    first: Experiment | None = None
    for settings, planned in trials:
        experiment = prepare(planned.config)
        config, mechanism = planned.config, experiment.mechanism
        if not mechanism.method.private or mechanism.unit != "example":
            validate.conflicts(
                "a private search is of a mechanism that protects examples, but this one protects "
                + (f"a {mechanism.unit}." if mechanism.method.private else "nobody."),
                "Use fedsim tune without --private, and say so.",
            )
        if config.task.name != "classification" or experiment.task.chosen.name != "accuracy":
            validate.conflicts(
                "a private search judges by the number of correct answers, which one example changes by 1, "
                f"but task={config.task.name} is judged by {experiment.task.chosen.name}.",
                "Use task=classification, or fedsim tune without --private.",
            )
        first = experiment if first is None else first
        if _event(experiment) != _event(first):
            validate.conflicts(
                f"a private search has trials of one event, but {' '.join(settings)} changes it.",
                "Leave out of the space what changes noise, steps or sampling.",
            )
    assert first is not None
    return first


def _event(experiment: Experiment) -> dp.DpEvent:
    """What a whole search releases of which this is a trial."""
    return experiment.mechanism.total_event(experiment.mechanism.steps)


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


def _release(
    best: tuple[float, Sequence[str], RunFolder] | None,
    std: float,
    first: Experiment,
    out: Path,
    keep: bool,
) -> Outcome:
    """Put what may be seen of the best trial into its folder, then the outcome, and remove the rest."""
    privacy = first.config.privacy
    spent = accountant.epsilon(_event(first), privacy.delta, privacy.accountant).among(first.facts.examples)
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


def _unchanged(out: Path, now: Config) -> bool | None:
    """Whether the examples are still those of the search that ended in `out`, by the digests in its winner's
    ledger; None where nothing tells.

    Raises:
        InputError: they are others, or own code is.
    """
    winner = RunFolder(out / WINNER)
    header = ledger.read_header(winner.ledger)
    if header is None:
        return None
    held = loading.load(winner.config)
    there = dataclasses.replace(held, data=dataclasses.replace(held.data, root=now.data.root))
    try:
        opening.check_unchanged(prepare(there), winner)
    except InputError as error:
        raise InputError(
            f"{out} holds what a private search released, but of other training examples or own code than "
            "there are now. Choose another --out: a search of these is a release of its own, and the "
            "epsilons add up for whoever is in both."
        ) from error
    return None if header.run else True


def _released(out: Path) -> Outcome | None:
    """What an earlier call released, or None."""
    path = out / "outcome.json"
    if not path.exists():
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    if held["winner"] is not None and not RunFolder(out / held["winner"]).result.exists():
        raise RunError(
            f"{out} ended with a model, and {out / held['winner']} holds none any more. Put it back: trained "
            "anew it would be another release, and another --out."
        )
    return Outcome(
        None if held["winner"] is None else out / held["winner"],
        tuple(held["settings"]),
        math.nan if held["score"] is None else held["score"],
        held["score_std"],
        held["epsilon"],
    )
