"""Server optimizers on flat vectors, learning-rate schedules and the average of the weights.

All of this happens after the noise, on the mean gradient (noisy sum / expected batch size): it is
post-processing and costs no privacy, weight decay included. Every state is a few tensors and integers, so
that a resumed run continues bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim import rules, validate
from fedsim.config import OptimizerConfig, TrainConfig
from fedsim.grads.flat import FlatSpec
from fedsim.validate import InputError

SLOTS: Mapping[str, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("velocity",),
    "nesterov": ("velocity",),
    "adam": ("first", "second"),
    "adamw": ("first", "second"),
    "lamb": ("first", "second"),
}
"""The vectors (P,) an optimizer keeps between steps."""
OPTIMIZERS = tuple(SLOTS)
SCHEDULES = ("constant", "linear", "cosine")


def resolved(config: OptimizerConfig, train: TrainConfig, examples: int) -> OptimizerConfig:
    """Return the configuration with settings that follow from the batch and the data worked out.

    `scale_with_batch` r: the rate becomes learning_rate * expected_batch_size / r, the linear rule of Goyal
    et al. 2017, by which Kurakin et al. 2022 state their rates for r = 256. `warmup_epochs`: becomes the
    steps, rounded up, that draw that many times `examples` on average.

    Args:
        config: as written.
        train: gives the expected batch size.
        examples: in the training set, over all holders.
    """
    batch = train.expected_batch_size
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.scale_with_batch is not None:
        rate *= batch / config.scale_with_batch
    if config.warmup_epochs is not None:
        warmup = math.ceil(round(config.warmup_epochs * examples / batch, 9))
    return dataclasses.replace(
        config, learning_rate=rate, warmup_steps=warmup, scale_with_batch=None, warmup_epochs=None
    )


def learning_rate(config: OptimizerConfig, steps: int, step_index: int) -> float:
    """Return the learning rate of one step.

    Warm-up: a rise linear in the step over the first `warmup_steps`, the last of which has the full rate.
    Then constant, or a linear or half-cosine fall (Loshchilov and Hutter 2017) towards
    `final_fraction` of the full rate, reached after the last step: no step has rate 0, since each step costs
    privacy.

    Args:
        config: rate, schedule, warm-up and final fraction.
        steps: steps of the whole run.
        step_index: counted from 0; from `steps` on the final rate holds.
    """
    if step_index < config.warmup_steps:
        return config.learning_rate * (step_index + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step_index - config.warmup_steps) / (steps - config.warmup_steps))
    remaining = 1.0 - progress if config.schedule == "linear" else (1.0 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_fraction + (1.0 - config.final_fraction) * remaining)


class ServerOptimizer:
    """One update rule on flat parameters.

    Rules: sgd; momentum and nesterov (Sutskever et al. 2013, PyTorch's form, no dampening); adam (Kingma and
    Ba 2015); adamw (Loshchilov and Hutter 2019); lamb (You et al. 2020, algorithm 2 with phi the identity:
    each parameter tensor is a layer whose update is rescaled to the norm of its weights, by 1 where either
    norm is 0). `weight_decay` is decoupled in adamw, part of the rescaled update in lamb, and for the others
    added to the mean gradient as weight_decay * parameters.

    Args:
        config: name, rates and coefficients; from `resolved` where it scales with the batch.
        train: steps of the whole run, for the schedule, and `ema_decay`; 0 means no average is kept.
        spec: layout of the flat vector, whose tensors are lamb's layers.

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
        self._slots = {name: torch.zeros_like(params) for name in self._slot_names()}
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
            len(self._slots) != len(self._slot_names())
        ):
            raise InputError(
                f"optimizer state must fit parameters of shape {tuple(params.shape)}, but was never set for "
                "them. Call init(params) or load_state_dict first."
            )
        self._updates += 1
        new = self._updated(params, gradient_mean, self.learning_rate(step_index))
        if self._ema is not None:
            self._ema.update(new, step_index)
        return new

    def _updated(self, params: Tensor, gradient_mean: Tensor, rate: float) -> Tensor:
        c = self.config
        if c.name in ("sgd", "momentum", "nesterov"):
            return params - rate * self._momentum(self._with_l2(params, gradient_mean))
        if c.name == "adam":
            return params - rate * self._adam(self._with_l2(params, gradient_mean))
        if c.name == "adamw":
            return params * (1.0 - rate * c.weight_decay) - rate * self._adam(gradient_mean)
        return params - rate * self._lamb(params, gradient_mean)

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
        wanted = {*self._slot_names(), *(["average"] if self._ema is not None else [])}
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
        self._slots = {name: tensors[name].clone() for name in self._slot_names()}
        if self._ema is not None:
            self._ema.init(tensors["average"])

    def _slot_names(self) -> tuple[str, ...]:
        return SLOTS[self.config.name]

    def _with_l2(self, params: Tensor, gradient: Tensor) -> Tensor:
        decay = self.config.weight_decay
        return gradient + decay * params if decay else gradient

    def _momentum(self, gradient: Tensor) -> Tensor:
        if self.config.name == "sgd":
            return gradient
        velocity = self._slots["velocity"].mul_(self.config.momentum).add_(gradient)
        if self.config.name == "nesterov":
            return gradient + self.config.momentum * velocity
        return velocity

    def _adam(self, gradient: Tensor) -> Tensor:
        c = self.config
        first = self._slots["first"].mul_(c.beta1).add_(gradient, alpha=1.0 - c.beta1)
        second = self._slots["second"].mul_(c.beta2).addcmul_(gradient, gradient, value=1.0 - c.beta2)
        mean = first / (1.0 - c.beta1**self._updates)
        scale = (second / (1.0 - c.beta2**self._updates)).sqrt()
        return mean / (scale + c.epsilon)

    def _lamb(self, params: Tensor, gradient: Tensor) -> Tensor:
        update = self._adam(gradient) + self.config.weight_decay * params
        for weights, part in zip(self._spec.split(params), self._spec.split(update), strict=True):
            size, length = weights.norm(), part.norm()
            ratio = torch.where((size > 0) & (length > 0), size / length, torch.ones_like(size))
            part.mul_(ratio)
        return update


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
            a setting that the named rule or schedule would ignore.
    """
    validate.one_of(config.name, OPTIMIZERS, "optimizer.name")
    validate.one_of(config.schedule, SCHEDULES, "optimizer.schedule")
    validate.positive(config.learning_rate, "optimizer.learning_rate")
    validate.positive(config.epsilon, "optimizer.epsilon")
    for optional, name in (
        (config.scale_with_batch, "optimizer.scale_with_batch"),
        (config.warmup_epochs, "optimizer.warmup_epochs"),
    ):
        if optional is not None:
            validate.positive(optional, name)
    validate.in_range(config.beta1, 0.0, 1.0 - 1e-12, "optimizer.beta1")
    validate.in_range(config.beta2, 0.0, 1.0 - 1e-12, "optimizer.beta2")
    validate.in_range(config.momentum, 0.0, 1.0 - 1e-12, "optimizer.momentum")
    validate.in_range(config.weight_decay, 0.0, 1e6, "optimizer.weight_decay")
    validate.in_range(config.final_fraction, 0.0, 1.0, "optimizer.final_fraction")
    if not config.momentum and config.name in ("momentum", "nesterov"):
        validate.conflicts(
            f"optimizer.name is {config.name}, but optimizer.momentum is 0.", "Set it, to 0.9 for example."
        )
    rules.refuse_unread(config, "optimizer")
