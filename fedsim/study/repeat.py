"""One recipe with several seeds: run what is missing, then say mean, spread and what produced them.

The result of a recipe (one JSON object, written to results/NAME.json; `fedsim results` reads these):

    kind             "recipe"
    title, config    name of the run; configuration as given on the command line
    overrides        "key=value" strings on top of it that all runs were made with
    backend, nodes   of the runs, listed where they differ
    reference        what the recipe reproduces, from the configuration
    evaluated_on     "test set", or "held-out training examples" while tuning
    data, model, method, holders, partition, steps, expected_batch_size, noise_multiplier
    target_epsilon   the budget the configuration asks for, or null
    epsilon, delta   by unit, the largest over the seeds, with accountant, relation and note
    headline         the metric: name, unit, direction; of unit "%" values are fractions
    seeds, scores    one number a seed, in one order
    mean             over seeds
    minutes          mean training time of a seed
    tuning           how the settings were chosen, in words; "" where nothing is known
    runs             one mapping a seed: score, minutes, peak memory, epsilon, hashes, commit, hardware,
                     backend, nodes, and settings where other runs have others
    taken_up         which runs were finished before, otherwise than was asked for, in words; "" for none
    command          what to type to get it again
    commit, hardware of the runs, listed where they differ
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from fedsim import loading, validate
from fedsim.config import FREE, Config
from fedsim.engine import places
from fedsim.engine.checkpoint import write_atomic
from fedsim.engine.run_folder import RunFolder, file_name
from fedsim.headline import Metric
from fedsim.partitions import PARTITIONS
from fedsim.report.plain import as_json, plain
from fedsim.study import compare, taken_up
from fedsim.study.compare import Planned, Runner
from fedsim.study.judged import all_unscored, unscored
from fedsim.validate import InputError, RunError

_OF_RUN = (
    "loss",
    "epsilon",
    "holder_scores",
    "peak_memory_bytes",
    "parameters_sha256",
    "code_hash",
    "commit",
    "hardware",
    "nodes",
)


def run(
    source: str,
    overrides: Sequence[str],
    seeds: Sequence[int],
    out: Path | None,
    runner: Runner,
    log: TextIO,
    *,
    backend: str,
    command: Callable[[Sequence[str], str], str],
    results: Path | None = None,
) -> dict[str, Any]:
    """Train the recipe once a seed, skipping what is finished, and return its result.

    Args:
        source: configuration, a path or a name under configs/.
        overrides: "key=value" strings for all seeds.
        seeds: one run each.
        out: folder of the runs; None: runs/repeat/TITLE.
        runner: trains one configuration into a folder and returns its result.
        log: where progress goes, a line a seed.
        backend: name of the runner, which runs that are finished need not have had.
        command: gives, with the overrides and the backend that the runs were made with, what to type to get
            the result again.
        results: file to write the result to as JSON, after all seeds; None: none.

    Raises:
        InputError: wrong configuration or folder, repeated seed; nothing has been started.
        RunError: a run has no score, or the result could not be written.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"--seeds must be different numbers, at least one, got {list(seeds)}.")
    if any(item.startswith("seed=") for item in overrides):
        raise InputError("seed must not be overridden where --seeds are given: use --seeds alone.")
    planned = []
    for seed in seeds:
        config = loading.load(source, [*overrides, f"seed={seed}"])
        planned.append(Planned(config.title or "run", config.privacy.target_epsilon, seed, config))
    if results is not None:
        places.writable(results.absolute().parent, "the folder of --results", "Choose another file")
        if results.is_dir():
            raise InputError(f"--results must be a file, got the folder {results}.")
        _refuse_another(results, source, overrides, seeds)
    root = out or Path("runs") / "repeat" / file_name(planned[0].config.title, "run")
    others = [taken_up.otherwise(RunFolder(root / "runs" / cell.folder), cell.config) for cell in planned]
    done = [(cell.seed, result) for cell, _, result in compare.finish(planned, root, runner, log)]
    if dead := {seed: why for seed, result in done if (why := unscored(result))}:
        raise RunError(
            f"seeds must end with a score, and {list(dead)} did not, so there is no mean to state: "
            f"{all_unscored(dead.values())}"
        )
    kept, lost = taken_up.of_all(overrides, others)
    made_by = {str(seed): _backend(result) for seed, result in done}
    one = next(iter(made_by.values())) if len(set(made_by.values())) == 1 else backend
    about = {
        "config": source,
        "overrides": kept,
        "command": command(kept, one),
        "taken_up": taken_up.told(
            {
                f"seed {seed}": [
                    *([] if by == backend else [f"backend {by}"]),
                    *taken_up.as_strings(other),
                ]
                for (seed, by), other in zip(made_by.items(), others, strict=True)
            }
        ),
    }
    alike = all(other == others[0] for other in others)
    own = [[] if alike else taken_up.of_run(lost, other) for other in others]
    answer = summary(planned[0].config, done, about, own)
    if results is not None:
        with validate.failures_as(RunError, f"{results} was not written", "Repeat the command."):
            results.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(results.absolute(), (as_json(answer, indent=1) + "\n").encode())
    return answer


def _backend(result: dict[str, Any]) -> str:
    return str(result.get("backend", taken_up.NOT_RECORDED))


def _binding(overrides: Sequence[str]) -> set[str]:
    """The overrides that a result depends on."""
    free = tuple(f"{name}." for name in FREE)
    return {item for item in overrides if not f"{item.partition('=')[0]}.".startswith(free)}


def _refuse_another(results: Path, source: str, overrides: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse to write over the result of other settings, or of seeds that are not among these."""
    try:
        held = json.loads(results.read_text(encoding="utf-8"))
        other, there = (held["config"], held["overrides"]), set(map(int, held["seeds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return  # none is there, or none that is worth keeping
    if other[0] != source or _binding(other[1]) != _binding(overrides):
        raise InputError(
            f"--results {results} holds the result of {' '.join([other[0], *other[1]])}, and would be "
            f"written over by that of {' '.join([source, *overrides])}. Choose another file, or delete it."
        )
    if lost := sorted(there - set(seeds)):
        raise InputError(
            f"--results {results} holds the result of seeds {' '.join(map(str, sorted(there)))}, and "
            f"would be written over without {' '.join(map(str, lost))}. Name them under --seeds too, whose "
            "runs are kept, choose another file, or delete it."
        )


def summary(
    config: Config,
    done: Sequence[tuple[int, dict[str, Any]]],
    about: dict[str, Any],
    settings: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """Return the result of finished runs, as JSON-able values.

    Args:
        config: configuration of any of the seeds.
        done: (seed, content of result.json) of every run.
        about: config, overrides, command, taken_up.
        settings: of each run, beside the overrides.
    """
    headline = Metric.of(done[0][1])
    scores = [float(result[headline.name]) for _, result in done]
    answer = {
        "kind": "recipe",
        "title": config.title,
        **about,
        "reference": config.reference,
        "evaluated_on": "held-out training examples" if config.data.holdout_examples else "test set",
        "data": dataclasses.asdict(dataclasses.replace(config.data, root=None)),
        "model": dataclasses.asdict(config.model),
        "method": config.method(),
        "holders": config.federation.holders,
        "backend": _listed([_backend(result) for _, result in done]),
        "nodes": _listed([result["nodes"] for _, result in done]),
        "partition": _partition(config),
        "steps": done[0][1]["steps"],
        "expected_batch_size": config.train.expected_batch_size,
        "noise_multiplier": done[0][1]["noise_multiplier"],
        "target_epsilon": config.privacy.target_epsilon,
        "epsilon": _largest([result["epsilon"] for _, result in done]),
        "delta": config.privacy.delta,
        "seeds": [seed for seed, _ in done],
        "headline": dataclasses.asdict(headline),
        "scores": scores,
        "mean": statistics.mean(scores),
        "minutes": statistics.mean(result["seconds"] for _, result in done) / 60.0,
        "tuning": done[0][1]["tuning"],
        "runs": [
            _one(seed, result) | ({"settings": list(own)} if own else {})
            for (seed, result), own in zip(done, settings or [()] * len(done), strict=True)
        ],
        "commit": ", ".join(dict.fromkeys(str(result["commit"]) for _, result in done)),
        "hardware": _joined([result["hardware"] for _, result in done]),
    }
    out: dict[str, Any] = plain(answer)
    return out


def _one(seed: int, result: dict[str, Any]) -> dict[str, Any]:
    score = result[Metric.of(result).name]
    kept = {name: result[name] for name in _OF_RUN} | {"backend": _backend(result)}
    return {"seed": seed, "score": score, "minutes": result["seconds"] / 60.0, **kept}


def _listed(values: Sequence[Any]) -> Any:
    """The value of all runs, or those there are."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else ", ".join(map(str, found))


def _partition(config: Config) -> str:
    """The partition with the options that shape it."""
    chosen = config.federation.partition
    scheme = PARTITIONS.make(chosen)
    shaped = {entry.name: getattr(scheme, entry.name) for entry in dataclasses.fields(scheme)}
    options = ", ".join(f"{name}={value}" for name, value in shaped.items())
    return f"{chosen.name}({options})" if options else chosen.name


def _largest(spent: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For every unit the epsilon that holds for all runs (holders differ in size from seed to seed)."""

    def size(epsilon: dict[str, Any]) -> float:
        return math.inf if epsilon["value"] is None else float(epsilon["value"])

    return {unit: max((each[unit] for each in spent), key=size) for unit in spent[0]}


def _joined(machines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One description of the hardware; values that differ between runs are listed."""
    return {
        key: machines[0][key]
        if all(machine.get(key) == machines[0][key] for machine in machines)
        else ", ".join(dict.fromkeys(str(machine.get(key)) for machine in machines))
        for key in machines[0]
    }
