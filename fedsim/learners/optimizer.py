"""The server's update: rule, learning rate and the average of the weights.

All of this happens after the noise, on the mean gradient (noisy sum / expected batch size): it is
post-processing and costs no privacy, weight decay included. Every state is a few tensors and integers, so
that a resumed run continues bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import validate
from fedsim.config import Config, OptimizerConfig, TrainConfig
from fedsim.grads.flat import FlatSpec
from fedsim.learners import LEARNERS
from fedsim.learners.base import Learner, Learning, Means
from fedsim.merging import Choice
from fedsim.optimizers import OPTIMIZERS
from fedsim.optimizers.base import Update
from fedsim.queries.base import Query
from fedsim.schedules import SCHEDULES
from fedsim.validate import InputError


def resolved(config: OptimizerConfig, train: TrainConfig, examples: int) -> OptimizerConfig:
    """Return the configuration with settings that follow from the batch and the data worked out.

    `scale_with_batch` r: the rate becomes learning_rate * expected_batch_size / r, or that of the imitated
    batch where the run imitates a larger one, the linear rule of Goyal
    et al. 2017, by which Kurakin et al. 2022 state their rates for r = 256. `warmup_epochs`: becomes the
    steps, rounded up, that draw that many times `examples` on average.

    Args:
        config: as written.
        train: gives the expected batch size.
        examples: in the training set, over all holders.
    """
    batch = train.expected_batch_size
    whole = batch if train.imitated_batch_size is None else train.imitated_batch_size
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.scale_with_batch is not None:
        rate *= whole / config.scale_with_batch
    if config.warmup_epochs is not None:
        warmup = math.ceil(round(config.warmup_epochs * examples / batch, 9))
    return dataclasses.replace(
        config, learning_rate=rate, warmup_steps=warmup, scale_with_batch=None, warmup_epochs=None
    )


def learning_rate(config: OptimizerConfig, steps: int, step_index: int) -> float:
    """Return the learning rate of one step.

    Warm-up: a rise linear in the step over the first `warmup_steps`, the last of which has the full rate.
    Then as the schedule says (fedsim.schedules).

    Args:
        config: rate, schedule, warm-up.
        steps: steps of the whole run.
        step_index: counted from 0; from `steps` on the final rate holds.
    """
    if step_index < config.warmup_steps:
        return config.learning_rate * (step_index + 1) / config.warmup_steps
    progress = min(1.0, (step_index - config.warmup_steps) / (steps - config.warmup_steps))
    return config.learning_rate * SCHEDULES.make(config.schedule).factor(progress)


@LEARNERS.register("optimizer")
@dataclass(frozen=True)
class OptimizerLearner(Learner):
    """A step of the optimizer along the mean gradient or update, as the section optimizer says."""

    takes = ("sum",)

    def start(self, config: Config, query: Query, layout: FlatSpec, examples: int) -> ServerOptimizer:
        """See `Learner.start`."""
        return ServerOptimizer(resolved(config.optimizer, config.train, examples), config.train, layout)


class ServerOptimizer(Learning):
    """An update rule (fedsim.optimizers) on flat parameters, with its state, schedule and average.

    Args:
        config: rule, rates and coefficients; from `resolved` where it scales with the batch.
        train: steps of the whole run, for the schedule, and `ema_decay`; 0 means no average is kept.
        spec: layout of the flat vector.

    Raises:
        InputError: see `check`; also a warm-up that is not shorter than the run.
    """

    def __init__(self, config: OptimizerConfig, train: TrainConfig, spec: FlatSpec) -> None:
        check(config)
        if config.scale_with_batch is not None or config.warmup_epochs is not None:
            raise InputError(
                "optimizer.scale_with_batch and warmup_epochs must be worked out before. Use resolved()."
            )
        validate.positive(train.steps, "train.steps")
        validate.in_range(
            config.warmup_steps, 0, train.steps - 1, "optimizer.warmup_steps", "Keep it below train.steps."
        )
        self.config = config
        self.steps = train.steps
        self._rule = OPTIMIZERS.make(Choice(config.name, config.options))
        self._spec = spec
        self._ema = Ema(train.ema_decay) if train.ema_decay else None
        self._updates = 0
        self._slots: dict[str, Tensor] = {}

    def learning_rate(self, step_index: int) -> float:
        """Return the learning rate of step `step_index`, counted from 0."""
        return learning_rate(self.config, self.steps, step_index)

    def average(self) -> Tensor | None:
        """Return the averaged parameters (P,), or None when `ema_decay` is 0; not a copy."""
        return None if self._ema is None else self._ema.value

    def init(self, params: Tensor) -> None:
        """Start afresh from parameters (P,): all moments 0, no update made, the average at `params`."""
        self._updates = 0
        self._slots = {name: torch.zeros_like(params) for name in self._rule.slots}
        if self._ema is not None:
            self._ema.init(params)

    def step(self, params: Tensor, gradient_mean: Tensor, step_index: int) -> Tensor:
        """Return the new parameters; `params` and `gradient_mean` stay as they are.

        Args:
            params: (P,) current parameters.
            gradient_mean: (P,) noisy gradient sum over the expected batch size, same dtype.
            step_index: counted from 0; sets the learning rate and the warm-up of the average.

        Raises:
            InputError: shapes or dtypes differ, or `init` was not called for this shape.
        """
        if gradient_mean.shape != params.shape or gradient_mean.dtype != params.dtype:
            raise InputError(
                f"gradient_mean must have the parameters' shape and dtype {tuple(params.shape)} "
                f"{params.dtype}, got {tuple(gradient_mean.shape)} {gradient_mean.dtype}."
            )
        if any(slot.shape != params.shape for slot in self._slots.values()) or (
            len(self._slots) != len(self._rule.slots)
        ):
            raise InputError(
                f"optimizer state must fit parameters of shape {tuple(params.shape)}, but was never set for "
                "them. Call init(params) or load_state_dict first."
            )
        self._updates += 1
        step = Update(self.learning_rate(step_index), self._updates, self.config.weight_decay, self._spec)
        new = self._rule.updated(params, gradient_mean, self._slots, step)
        if self._ema is not None:
            self._ema.update(new, step_index)
        return new

    def update(self, params: Tensor, means: Means, step_index: int) -> Tensor:
        """See `Learning.update`: `step` along the main part."""
        gradient = torch.from_numpy(means.values[means.main]).to(params.dtype)
        return self.step(params, gradient, step_index)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return copies of the tensors (P,): moments and average; and the plain numbers beside them."""
        tensors = {name: slot.clone() for name, slot in self._slots.items()}
        if self._ema is not None:
            tensors["average"] = self._ema.value.clone()
        return tensors, {"updates": self._updates}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Take over what `state_dict` of the same rule returned; `init` is then not needed.

        Raises:
            InputError: the entries are not those of this rule, or a tensor does not have shape (P,).
        """
        wanted = {*self._rule.slots, *(["average"] if self._ema is not None else [])}
        if set(tensors) != wanted or set(numbers) != {"updates"}:
            raise InputError(
                f"optimizer state for {self.config.name} must hold {sorted(wanted)} and ['updates'], got "
                f"{sorted(tensors)} and {sorted(numbers)}. Resume with the optimizer the run started with."
            )
        for name, value in tensors.items():
            if value.shape != (self._spec.total,):
                raise InputError(
                    f"optimizer state '{name}' must have shape ({self._spec.total},), got "
                    f"{tuple(value.shape)}. Resume with the model the run was started with."
                )
        self._updates = numbers["updates"]
        self._slots = {name: tensors[name].clone() for name in self._rule.slots}
        if self._ema is not None:
            self._ema.init(tensors["average"])


class Ema:
    """Exponential moving average of the parameters with warm-up (De et al. 2022).

    After step t, counted from 0: average = d * average + (1 - d) * parameters, d = min(decay,
    (1 + t) / (10 + t)), from the initial parameters on. With decay 0 the average is the parameters.

    Args:
        decay: in [0, 1).

    Raises:
        InputError: decay out of range.
    """

    def __init__(self, decay: float) -> None:
        validate.in_range(decay, 0.0, 1.0 - 1e-12, "train.ema_decay")
        self.decay = decay
        self._value: Tensor | None = None

    def init(self, params: Tensor) -> None:
        """Start at `params` (P,)."""
        self._value = params.clone()

    @property
    def value(self) -> Tensor:
        """The average (P,); not a copy."""
        if self._value is None:
            raise InputError("the average of the parameters must be started with init.")
        return self._value

    def update(self, params: Tensor, step_index: int) -> None:
        """Take in the parameters (P,) that step `step_index` gave."""
        decay = min(self.decay, (1 + step_index) / (10 + step_index))
        self._value = decay * self.value + (1.0 - decay) * params


def check(config: OptimizerConfig) -> None:
    """Check what the configuration alone can tell.

    Raises:
        InputError: unknown optimizer or schedule (with the nearest valid one), a coefficient out of range, or
            an option that the named rule or schedule does not have.
    """
    OPTIMIZERS.make(Choice(config.name, config.options))
    SCHEDULES.make(config.schedule)
    validate.positive(config.learning_rate, "optimizer.learning_rate")
    for optional, name in (
        (config.scale_with_batch, "optimizer.scale_with_batch"),
        (config.warmup_epochs, "optimizer.warmup_epochs"),
    ):
        if optional is not None:
            validate.positive(optional, name)
    validate.in_range(config.weight_decay, 0.0, 1e6, "optimizer.weight_decay")
