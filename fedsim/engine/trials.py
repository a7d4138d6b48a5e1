"""Trials of parts from outside on made-up values: what is honestly wrong is refused by name before a run.

No proof: a part may behave here and not in a run. Samplers have their own (`fedsim.samplers.trial`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim import references, seeds
from fedsim.augmentations import AUGMENTATIONS
from fedsim.clipping.base import ClipRule
from fedsim.config import Config, OptimizerConfig
from fedsim.data import examples
from fedsim.data.examples import ArrayDataset
from fedsim.engine.metrics import check_writers
from fedsim.grads import batch, independence
from fedsim.grads.batch import call
from fedsim.grads.flat import get_flat, spec, trainable_names
from fedsim.merging import Choice
from fedsim.optimizers import OPTIMIZERS
from fedsim.optimizers.base import Update
from fedsim.registry import check_choice
from fedsim.schedules import SCHEDULES
from fedsim.tasks import Task
from fedsim.tasks.base import WithGauges
from fedsim.validate import InputError

ROUNDING = 1e-6


def check(config: Config, clip: ClipRule, train: ArrayDataset, task: Task, model: nn.Module) -> None:
    """Try what the configuration names from outside, and the clip rule, on made-up values.

    Args:
        config: of the run.
        clip: the rule in force.
        train: for the form of its examples; what they hold is not looked at.
        task, model: of the run.

    Raises:
        InputError: a part that fails, or breaks what its base class says of it; by name.
    """
    clip_rule(clip, clip.group_of(trainable_names(model)), config.privacy.clipping.name)
    check_writers(config.monitor.writers)
    if references.is_reference(config.task.name) or task.metrics:
        measures(task, model, train)
    for choice in (check_choice(name, "train.augmentations") for name in config.train.augmentations):
        if choice.name not in AUGMENTATIONS.own():
            augmentation(choice, train.inputs.shape[1:])
    if isinstance(shown := _blank(task, model, train, 1)[0], Mapping):
        ahead(task, model, shown)
    optimizer(config.optimizer, model)


def clip_rule(rule: ClipRule, groups: tuple[int, ...] | None, name: str) -> None:
    """Refuse a rule after which a contribution is longer than its `sensitivity`."""
    bound = rule.sensitivity if math.isfinite(rule.sensitivity) else 1.0
    steps = torch.logspace(-12, 12, 97, dtype=torch.float64) * bound
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), steps, steps * (1 + 1e-12)])
    norms = steps
    if groups is not None:
        mixed = seeds.torch_stream(0, "trial of a clip rule")
        places = torch.randint(len(steps), (400, max(groups) + 1), generator=mixed)
        norms = torch.cat([steps[places], steps[:, None].expand(-1, max(groups) + 1)])
    with _named(f"privacy.clipping={name}"):
        factors = rule.coefficients(norms)
        none = (
            rule.coefficients(torch.full_like(norms[:2], math.nan)),
            rule.coefficients(norms[:2] + math.inf),
        )
    if factors.shape != norms.shape or any(bool((found != 0).any()) for found in none):
        raise InputError(
            f"privacy.clipping={name} must give a factor for every norm, and 0 where a norm is not finite."
        )
    lengths = (factors * norms).reshape(len(norms), -1).norm(dim=1)
    if not bool((lengths <= rule.sensitivity * (1 + ROUNDING)).all()):
        worst = int(lengths.nan_to_num(math.inf).argmax())
        raise InputError(
            f"privacy.clipping={name} states that a contribution is at most {rule.sensitivity:g} long, but "
            f"makes it {float(lengths[worst]):g} of a gradient with norms {norms[worst].tolist()}. Correct "
            "coefficients() or sensitivity: the noise follows from the latter."
        )


def _blank(
    task: Task, model: nn.Module, train: ArrayDataset, count: int
) -> tuple[Tensor | Mapping[str, Tensor], Tensor]:
    """What a model is called with for so many examples without content, and their targets."""
    dtype = get_flat(model).dtype
    inputs = examples.normalise(train.blank(count), train, dtype)
    targets = examples.wanted(train.blank_targets(count), dtype)
    return task.shown(inputs, targets), targets


def ahead(task: Task, model: nn.Module, shown: Mapping[str, Tensor]) -> None:
    """Refuse a model that fails on what the task shows it, or that says a token by looking at it.

    Args:
        shown: one example; its arrays of tokens (1, T) are what was before each place.
    """
    trial, tokens = copy.deepcopy(model), {name: t for name, t in shown.items() if not t.is_floating_point()}
    with _named(f"model on what task {type(task).__name__} shows it"), torch.no_grad():
        before = call(trial, shown)[:, :-1]
        for name, array in tokens.items():
            other = torch.cat([array[:, :-1], 1 - array[:, -1:].clamp(max=1)], 1)
            after = call(trial, {**shown, name: other})[:, :-1]
            if not torch.allclose(before, after, rtol=1e-4, atol=1e-6):
                raise InputError(
                    f"task {type(task).__name__} must have a model that does not look ahead, but the last of "
                    f"{name} changes what it says before. Give its attention a causal mask."
                )


def apart(model: nn.Module, train: ArrayDataset, task: Task) -> None:
    """Refuse a model in which made-up examples meet, or that is random, or that says what the loss does not
    take.

    `fedsim.grads.independence` looks again at the examples of the run."""
    _registered(model)
    dtype = get_flat(model).dtype
    blank, some = train.blank(independence.EXAMPLES), seeds.generator(seeds.derive(0, "trial of a model"))
    if blank.dtype.kind == "f":
        made = some.standard_normal(blank.shape).astype(blank.dtype)
    else:
        made = some.integers(0, train.vocabulary or 256, blank.shape).astype(blank.dtype)
    inputs = examples.normalise(made, train, dtype)
    targets = examples.wanted(train.blank_targets(independence.EXAMPLES), dtype)
    shown = task.shown(inputs, targets)
    problem = independence.problem(
        copy.deepcopy(model),
        batch.each(lambda array: array[:, None], shown),
        targets,
        task.loss,
    )
    if problem:
        raise InputError(problem)
    with torch.no_grad():
        task.check_outputs(call(copy.deepcopy(model), shown))


def _registered(model: nn.Module) -> None:
    """Refuse layers and parameters in lists and dictionaries of Python, which torch does not see: they would
    not be trained, nor saved."""
    known = {id(part) for part in (*model.modules(), *model.parameters())}
    for module in model.modules():
        for name, value in vars(module).items():
            parts = list(value.values()) if isinstance(value, dict) else value
            if not isinstance(parts, list | tuple):
                continue
            if any(isinstance(part, nn.Module | nn.Parameter) and id(part) not in known for part in parts):
                raise InputError(
                    f"model must train and save all of its layers, but torch does not see those in {name!r}, "
                    f"a {type(value).__name__} of {type(module).__name__}. Keep them in nn.ModuleList, "
                    "nn.ModuleDict or nn.ParameterList."
                )


def measures(task: Task, model: nn.Module, train: ArrayDataset) -> None:
    """Refuse a task or metrics that fail on made-up outputs and blank targets, or give another shape."""
    name = type(task).__name__
    shown, targets = _blank(task, model, train, 2)
    with torch.no_grad():
        said = call(copy.deepcopy(model), shown)
    outputs = torch.randn(said.shape, generator=seeds.torch_stream(0, "trial of a task"), dtype=said.dtype)
    kept = outputs._version, targets._version
    with _named(f"loss of task {name}"):
        own = outputs.clone().requires_grad_()
        both, alone = task.loss(own, targets), task.loss(outputs[:1], targets[:1])
    _one_each(both, "loss", name)
    if not both.requires_grad:
        raise InputError(
            f"loss of task {name} must be computed from the outputs by torch, but no gradient leads to them. "
            "Leave out detach(), numpy() and item()."
        )
    if not torch.allclose(both[:1], alone, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise InputError(
            f"loss of task {name} must be of one example alone, but changes when another is beside it. Leave "
            "out what looks along the batch axis."
        )
    with _named(f"measures of task {name}"):
        found = task.measures(outputs, targets)
    for what, given, before in (("outputs", outputs, kept[0]), ("targets", targets, kept[1])):
        if given._version != before:
            raise InputError(
                f"loss and measures of task {name} must leave {what} as they get them, which others are "
                f"computed from, and one of them writes there. Make a copy first: {what}.clone()."
            )
    for what, values in found.items():
        _one_each(values, what, name)
    with _named(f"meter of task {name}"):
        meter = task.meter()
        meter.add(outputs, targets)
        lacking = {metric.name for metric in task.own_metrics} - set(meter.result())
    if lacking:
        raise InputError(
            f"measures of task {name} must give all of own_metrics, but not {', '.join(sorted(lacking))}."
        )
    if unnamed := sorted(set(found) - {metric.name for metric in task.own_metrics}):
        raise InputError(
            f"own_metrics of task {name} must name all that its measures give, but not "
            f"{', '.join(unnamed)}: nobody would see it. Add fedsim.headline.Metric({unnamed[0]!r})."
        )
    WithGauges(task).add(outputs, targets)


def augmentation(choice: Choice, shape: tuple[int, ...]) -> None:
    """Refuse one that gives another shape or dtype, or other views where images come in another order."""
    key, made = seeds.derive(0, "trial of an augmentation"), AUGMENTATIONS.make(choice)
    words = seeds.words(key, 0, 12).reshape(4, 3)
    images = seeds.generator(key).integers(0, 256, (4, 1, *shape)).astype(np.uint8)

    def views(backwards: bool) -> NDArray[np.uint8]:
        step = -1 if backwards else 1
        with _named(f"augmentation {choice.name}"):
            found = made.views(images[::step].copy(), words[::step, ::step].copy())
        wanted = (images.shape, (*words.shape, *shape))
        if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.shape not in wanted:
            said = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
            raise InputError(
                f"augmentation {choice.name} must give uint8 views of shape {wanted[1]} for images "
                f"{images.shape} and words {words.shape}, got {said}."
            )
        return found[::step, ::step]

    if not np.array_equal(views(False), views(True)):
        raise InputError(
            f"augmentation {choice.name} gives other views of the same images and words when they come in "
            "another order. A view must follow from its image and its word alone: take all randomness from "
            "the word."
        )


def optimizer(config: OptimizerConfig, model: nn.Module) -> None:
    """Refuse a rule that changes the parameters it gets or gives others of another form, and a schedule that
    gives no number."""
    if config.name not in OPTIMIZERS.own():
        rule, params = OPTIMIZERS.make(Choice(config.name, config.options)), get_flat(model)
        before, slots = params.clone(), {name: torch.zeros_like(params) for name in rule.slots}
        step = Update(config.learning_rate, 1, config.weight_decay, spec(model))
        with _named(f"optimizer {config.name}"):
            after = rule.updated(params, torch.ones_like(params), slots, step)
        if not isinstance(after, Tensor) or (after.shape, after.dtype) != (before.shape, before.dtype):
            said = (
                f"{after.dtype} {tuple(after.shape)}" if isinstance(after, Tensor) else type(after).__name__
            )
            raise InputError(
                f"optimizer {config.name} must give parameters {before.dtype} {tuple(before.shape)}, got "
                f"{said}."
            )
        if not torch.equal(params, before):
            raise InputError(f"optimizer {config.name} must return new parameters and leave those it gets.")
    if config.schedule.name not in SCHEDULES.own():
        schedule = SCHEDULES.make(config.schedule)
        with _named(f"schedule {config.schedule.name}"):
            factors = [schedule.factor(progress) for progress in (0.0, 0.5, 1.0)]
        if not all(isinstance(factor, float | int) and math.isfinite(factor) for factor in factors):
            raise InputError(f"schedule {config.schedule.name} must give finite numbers, got {factors}.")


def _one_each(values: object, what: str, task: str) -> None:
    if not isinstance(values, Tensor) or values.shape != (2,):
        said = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"{what} of task {task} must be one number an example, a tensor of shape (2,) for two, got "
            f"{said}. Average over the other axes, not over examples (reduction='none')."
        )


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Say which part it was that failed."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{part} fails by {type(error).__name__}: {error}. Mend it.") from error
