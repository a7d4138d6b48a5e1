"""What is written of a step: the numbers of its replies and its update, each public or sensitive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedsim.engine.contributions import NORM_EDGES
from fedsim.engine.experiment import Experiment
from fedsim.strategies.base import Release
from fedsim.types import HolderReply, StepRecord
from fedsim.visibility import Numbers, Public, Sensitive


def step_record(
    experiment: Experiment,
    step: int,
    release: Release,
    replies: Sequence[HolderReply],
    signal: float,
    known: Numbers,
    timing: Mapping[str, float],
) -> StepRecord:
    """Return the record of one step.

    Args:
        experiment: whose mechanism says what noise the step had.
        step: number of the step, from 0; the record is that of step + 1 completed updates.
        release: what the step released.
        replies: what the nodes answered.
        signal: L2 norm of the exact sum, of its main part.
        known: numbers of the update and of the evaluation after it.
        timing: seconds by part; sensitive, for nodes take longer for a larger draw.
    """
    sums: dict[str, Any] = {}
    for reply in replies:
        for name, value in reply.statistics.items():
            sums[name] = np.add(sums.get(name, 0.0), value)
    realised = sum(reply.count for reply in replies)
    mechanism = experiment.mechanism
    numbers = {**known, **{f"seconds/{name}": Sensitive(value) for name, value in timing.items()}}
    numbers |= {"realised_batch_size": Sensitive(float(realised)), "sum_norm": Sensitive(signal)}
    if release.noise_stds:
        noise_std = mechanism.noise_std_of_sum(release)
        numbers["noise_std_of_mean"] = Public(noise_std / mechanism.divisor)
        spread = noise_std * release.statistic.main.length**0.5
        numbers["noise_to_signal"] = Sensitive(spread / signal if signal else None)
    if realised:
        if mechanism.method.at.query.measures_loss:
            numbers["train_loss"] = Sensitive(float(sums["loss_sum"]) / realised)
        numbers["clip_fraction"] = Sensitive(float(sums["clipped"]) / realised)
        numbers["mean_gradient_norm"] = Sensitive(float(sums["norm_sum"]) / realised)
        numbers["non_finite_gradients"] = Sensitive(float(sums["non_finite"]))
    if sums["undecodable"]:
        numbers["undecodable"] = Sensitive(float(sums["undecodable"]))
    histogram = (NORM_EDGES, [float(c) for c in sums["norm_histogram"]])
    return StepRecord(step + 1, numbers, {"gradient_norm": Sensitive(histogram)})
