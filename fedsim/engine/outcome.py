"""What is written of a finished run: result.json, and the run's line among TensorBoard's HParams."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedsim import provenance
from fedsim.engine import checkpoint, scoring
from fedsim.engine.experiment import Experiment
from fedsim.privacy.accountant import EpsilonResult


def result_of(
    experiment: Experiment,
    steps: int,
    released: Tensor,
    scores: Mapping[str, float],
    spent: Mapping[str, EpsilonResult],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of result.json.

    Args:
        experiment: what was run; its model holds the released parameters.
        steps: completed updates.
        released: (P,) the released parameters.
        scores: accuracy and loss of the released model.
        spent: epsilon by unit, from the ledger.
        seconds: of this process's part of the run, by part; "run" is all of it.
    """
    config, plan = experiment.config, experiment.plan
    by_part = dict(seconds)
    return {
        "title": config.title,
        "strategy": config.strategy.name,
        "accuracy": scores["accuracy"],
        "loss": scores["loss"],
        "epsilon": {name: dataclasses.asdict(value) for name, value in spent.items()},
        "noise_multiplier": None if plan.noise is None else plan.noise.noise_multiplier,
        "noise_source": config.privacy.noise_source,
        "steps": steps,
        "stopped_by_budget": plan.stopped_by_budget,
        "seconds": by_part.pop("run"),
        "seconds_by_part": by_part,
        "parameters_sha256": checkpoint.parameters_sha256(released),
        "parameters": released.numel(),
        "holders": config.federation.holders,
        "holder_accuracy": _holder_accuracy(experiment, released),
        "trust": _trust(experiment, released),
        "nodes": config.federation.nodes,
        "seed": config.seed,
        "config": config.digest(),
        "commit": provenance.commit(),
        "code_hash": provenance.code_hash(),
        "hardware": provenance.hardware(),
        "physical_batch_size": config.engine.physical_batch_size,
        "peak_memory_bytes": provenance.peak_memory(),
    }


def _holder_accuracy(experiment: Experiment, released: Tensor) -> dict[str, float]:
    if experiment.config.monitor.public_only:
        return {}
    return scoring.holder_accuracy(experiment.model, experiment.splits, experiment.partition, released.dtype)


def _trust(experiment: Experiment, released: Tensor) -> dict[str, Any]:
    """What a comparison says about the run's trust model."""
    strategy = experiment.strategy
    bytes_per_holder, messages = strategy.traffic(experiment.facts, released.element_size())
    return {
        "trusted": strategy.trusted,
        "noise_added": strategy.noise_added,
        "unit": experiment.plan.unit if strategy.private else "none",
        "bytes_per_holder": bytes_per_holder,
        "messages": messages,
        "survivors_needed": strategy.survivors_needed(),
    }


def hparams(experiment: Experiment) -> dict[str, Any]:
    """Return the settings that TensorBoard compares runs by."""
    c = experiment.config
    return {
        "strategy": c.strategy.name,
        "model": c.model.name,
        "holders": c.federation.holders,
        "partition": c.federation.partition,
        "expected_batch_size": c.train.expected_batch_size,
        "steps": experiment.plan.steps,
        "clip_norm": c.privacy.clip_norm,
        "noise_multiplier": experiment.plan.noise.noise_multiplier if experiment.plan.noise else 0.0,
        "augment_multiplicity": c.train.augment_multiplicity,
        "optimizer": c.optimizer.name,
        "learning_rate": c.optimizer.learning_rate,
        "ema_decay": c.train.ema_decay,
        "seed": c.seed,
    }


def final_numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the final metrics that TensorBoard shows beside the settings."""
    value = result["epsilon"][result["trust"]["unit"]]["value"] if result["noise_multiplier"] else None
    return {
        "accuracy": result["accuracy"],
        "loss": result["loss"],
        "epsilon": float("inf") if value is None else value,
    }
