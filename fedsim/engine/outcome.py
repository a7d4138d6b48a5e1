"""What is written of a finished run: result.json, and the run's line among TensorBoard's HParams.

Every number is made public or sensitive here or was before; `sensitive` in the result names the sensitive
ones, which are not there in public-only mode. Null is what could not be computed or is not finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedsim import provenance
from fedsim.config import Config
from fedsim.engine import checkpoint, scoring
from fedsim.engine.assumed import assumed_public
from fedsim.engine.experiment import Experiment
from fedsim.engine.state import State
from fedsim.privacy.accountant import EpsilonResult
from fedsim.report.plain import plain
from fedsim.visibility import Numbers, Public, Sensitive, Tagged, sensitive_names, shown


def result_of(
    experiment: Experiment,
    state: State,
    scores: Numbers,
    spent: Mapping[str, Tagged[EpsilonResult]],
    seconds: Mapping[str, float],
    backend: str,
) -> dict[str, Any]:
    """Return the content of result.json.

    Args:
        experiment: what was run; its model holds the released parameters.
        state: after the last step.
        scores: the task's metrics and loss of the released model.
        spent: epsilon by unit, from the ledger.
        seconds: of this process's part of the run, by part; "run" is all of it.
        backend: where this process's part of the run executed.
    """
    config, mechanism, released = experiment.config, experiment.mechanism, state.released()
    train = experiment.splits.train
    public_only = bool(config.monitor.public_only)
    stated = {
        "title": config.title,
        "method": config.method(),
        "task": config.task.name,
        "headline": dataclasses.asdict(experiment.task.chosen),
        "noise_multiplier": mechanism.noise_multiplier or None,
        "noise_source": config.privacy.noise_source,
        "steps": state.completed,
        "steps_repeated_to_rounding": state.differing,
        "stopped_by_budget": mechanism.stopped_by_budget,
        "parameters_sha256": checkpoint.parameters_sha256(released),
        "parameters": released.numel(),
        "examples": experiment.facts.examples,
        "holders": config.federation.holders,
        "examples_per_holder_at_most": config.federation.examples_per_holder_at_most,
        "assumed_public": assumed_public(config, train.declared, train.vocabulary),
        "tuning": tuning_of(config),
        "trust": _trust(experiment),
        "backend": backend,
        "nodes": config.federation.nodes,
        "seed": config.seed,
        "config": config.digest(),
        "commit": provenance.commit(),
        "code_hash": provenance.code_hash(*config.references()),
        "hardware": provenance.hardware(),
        "physical_batch_size": config.engine.physical_batch_size,
        "public_only": public_only,
    }
    by_part = dict(seconds)
    numbers = {
        **scores,
        "epsilon": spent,
        "largest_holder": experiment.facts.largest_holder,
        "holder_scores": scoring.holder_scores(
            experiment.model, experiment.task, experiment.splits, experiment.partition, released.dtype
        ),
        # Nodes take longer, and more memory, for a larger draw.
        "seconds": Sensitive(by_part.pop("run")),
        "seconds_by_part": Sensitive(by_part),
        "peak_memory_bytes": Sensitive(provenance.peak_memory()),
    }
    if noticed := experiment.noticed:
        numbers["noticed"] = noticed
    tagged = {name: Public(value) for name, value in stated.items()} | numbers
    result: dict[str, Any] = plain(shown(tagged, public_only=public_only))
    return result | {"sensitive": sensitive_names(tagged)}


def tuning_of(config: Config) -> str:
    """Return how the settings were chosen, in words; "" where nothing is known."""
    tuning = config.tuning
    if tuning.mode is None:
        return ""
    if tuning.mode == "private":
        return (
            f"the best of a hidden number of trials ({tuning.distribution}, mean {tuning.trials:g}) on "
            f"{tuning.held_out_examples} held-out private examples; epsilon counts that"
        )
    return (
        f"settings chosen by {tuning.trials:g} trials on {tuning.held_out_examples} held-out private "
        "examples; epsilon does not count that"
    )


def _trust(experiment: Experiment) -> dict[str, Any]:
    """What a comparison says about the run's trust model."""
    mechanism, method = experiment.mechanism, experiment.mechanism.method
    bytes_per_holder, messages = mechanism.traffic()
    return {
        "trusted": method.trust.trusted,
        "noise_added": method.noise_added,
        "unit": method.unit if method.private else "none",
        "bytes_per_holder": bytes_per_holder,
        "messages": messages,
        "survivors_needed": mechanism.survivors_needed(),
    }


def hparams(experiment: Experiment) -> dict[str, Any]:
    """Return the settings that TensorBoard compares runs by.

    It sorts them by name and shows the first five beside the scores: those that people ask for have names of
    their own, all others stand in a group.
    """
    c = experiment.config
    first = {
        "epsilon (target)": "none" if c.privacy.target_epsilon is None else c.privacy.target_epsilon,
        "holders": c.federation.holders,
        "learning_rate": c.optimizer.learning_rate,
        "method": c.method(),
        "model": c.model.name,
    }
    others = {
        "partition": c.federation.partition.name,
        "expected_batch_size": c.train.expected_batch_size,
        "steps": experiment.mechanism.steps,
        "clip_norm": c.privacy.clip_norm,
        "noise_multiplier": experiment.mechanism.noise_multiplier,
        "augment_multiplicity": c.train.augment_multiplicity,
        "optimizer": c.optimizer.name,
        "ema_decay": c.train.ema_decay,
        "seed": c.seed,
    }
    return first | {f"other/{name}": value for name, value in others.items()}
