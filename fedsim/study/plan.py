"""The dry run of a configuration: what it would release, cost and need, without training anything.

Works for machines and data that are not at hand: sizes of standard sets are public constants (or stated in
`reference.data`), the model is laid out on the meta device, and operations are counted there. A small model
whose data are read is there, and computes its operations in less time than the meta device takes to import.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsim import models, provenance, rules, seeds, validate
from fedsim.config import Config
from fedsim.data import augment, batches, datasets, partition, sizes
from fedsim.data.examples import ArrayDataset
from fedsim.data.pictures.pictures import Pictures
from fedsim.data.targets import Targets
from fedsim.engine.assumed import assumed_public
from fedsim.engine.experiment import Experiment, epsilons, facts_of, planned, prepare
from fedsim.grads import batch
from fedsim.grads.batch import Batch
from fedsim.grads.cost import Cost, cost
from fedsim.grads.flat import spec, trainable_names
from fedsim.learners.optimizer import resolved
from fedsim.mechanism import Mechanism
from fedsim.merging import Choice
from fedsim.method import Method
from fedsim.optimizers import OPTIMIZERS
from fedsim.partitions import Material
from fedsim.privacy import accountant
from fedsim.privacy.accountant import EpsilonResult
from fedsim.privacy.published import AGREEMENT
from fedsim.queries import Part
from fedsim.strategies.base import Release
from fedsim.tasks import TASKS, Task
from fedsim.validate import InputError
from fedsim.visibility import Public, Sensitive, Tagged, sensitive_names, shown

FLOPS_PER_SECOND = 5e13
"""Default rate: 50 teraflops sustained, about a third of an A100's TF32 peak."""

COMPUTED_UP_TO = 10**8
"""Where parameters times entries of an example are more, operations are counted on the meta device."""

DEADLINES = {"a day": 24, "a week": 168, "a month": 720}
"""Hours within which so many machines of the given rate would finish, if they shared the work alike."""

PHYSICAL_BATCHES = (16, 64, 256, 1024)

DRAWN_UP_TO = 5 * 10**7
"""Examples of which it is drawn who holds which; of more, the sizes of the holders must be known without."""

READ_UP_TO = 10_000
"""Data sets with more training examples are planned from their public sizes, which takes no time."""


@dataclasses.dataclass(frozen=True)
class _Known:
    """What the plan rests on."""

    mechanism: Mechanism
    holders: Tagged[dict[str, float]]
    model: nn.Module
    task: Task
    view: tuple[Batch, Batch]
    source: str
    declared: Targets
    vocabulary: int | None
    undecodable: Tagged[dict[str, Any]] = Public(dict[str, Any]())  # noqa: RUF009


def describe(config: Config, flops_per_second: float = FLOPS_PER_SECOND) -> dict[str, Any]:
    """Return the plan: mechanism, epsilon beside the published one, operations, hours, bytes and memory.

    Args:
        config: any configuration; where its data set is large it need not be there.
        flops_per_second: what the machine sustains, for `gpu_hours`.

    Raises:
        InputError: the configuration is wrong, or its data are of unknown size and not there.
    """
    validate.positive(flops_per_second, "--flops-per-second")
    rules.refuse_outside_search(config)
    size = sizes.of(config)
    if size is None or (size.train <= READ_UP_TO and config.data.name == "fashion_mnist_subset"):
        known = _from_data(prepare(config))
    else:
        known = _from_sizes(config, size)
    public_only = bool(config.monitor.public_only)
    epsilons_of_plan = _spent(known, config)
    spent = shown(epsilons_of_plan, public_only=public_only)
    sensitive = sensitive_names(
        {"epsilon": epsilons_of_plan, "undecodable": known.undecodable, "holders": known.holders}
    )
    mechanism, train = known.mechanism, config.train
    facts, release = mechanism.facts, mechanism.release()
    noise_std = mechanism.stds_of_sums(release).get(release.statistic.main.name)
    optimizer = resolved(config.optimizer, train, facts.examples)
    return {
        "method": config.method(),
        "unit": mechanism.unit,
        "data": known.source,
        "own_code": {name: provenance.reference_hash(name) or "this process" for name in config.references()},
        "examples": facts.examples,
        "assumed_public": assumed_public(config, known.declared, known.vocabulary),
        "sensitive": sensitive,
        "undecodable": shown({"": known.undecodable}, public_only=public_only).get("", {}),
        "holders": shown({"": known.holders}, public_only=public_only).get("", {}),
        "steps": mechanism.steps,
        "stopped_by_budget": mechanism.stopped_by_budget,
        "sampling_rate": mechanism.sampling_rate,
        "expected_batch_size": train.expected_batch_size,
        "epochs": mechanism.steps * train.expected_batch_size / facts.examples,
        "learning_rate": optimizer.learning_rate,
        "warmup_steps": optimizer.warmup_steps,
        "noise_multiplier": mechanism.noise_multiplier or None,
        "noise_std_of_sum": noise_std,
        "noise_std_of_mean": None if noise_std is None else noise_std / mechanism.divisor,
        "entries_of_sums": _by_sum(mechanism, lambda release, part: part.length),
        "noise_std_of_sums": _by_sum(
            mechanism, lambda release, part: mechanism.stds_of_sums(release).get(part.name)
        ),
        "epsilon": {name: dataclasses.asdict(value) for name, value in spent.items()},
        "published": published(config, spent),
        **_costs(config, known, flops_per_second),
    }


def _by_sum(mechanism: Mechanism, of: Callable[[Release, Part], Any]) -> dict[str, Any]:
    """Return what `of` says of every part of every release; empty where a run has one part and one kind."""
    found = {
        f"{part.name}, {steps} step{'s' * (steps > 1)}": of(release, part)
        for release, steps in mechanism.releases()
        for part in release.statistic.parts
    }
    return found if len(found) > 1 else {}


def published(config: Config, spent: dict[str, EpsilonResult]) -> dict[str, Any] | None:
    """Return the recipe's published values beside the accounted ones; None where it names none.

    `difference` is accounted / published - 1 by accountant; `agrees` whether that of the recipe's own
    accountant is within `tolerance` (2 % unless the reference says otherwise: two printed digits).
    """
    reference = config.reference
    if reference.get("epsilon") is None:
        return None
    for name in ("epsilon", "tolerance"):
        if isinstance(reference.get(name, 1.0), bool | str | list | dict):
            raise InputError(f"reference.{name} must be a number, got {reference[name]!r}.")
    validate.positive(reference["epsilon"], "reference.epsilon")
    stated = float(reference["epsilon"])
    unit = next(iter(spent))
    own = {unit, f"{unit}_check", f"{unit}_rdp"}
    found = {s.accountant: s.value for name, s in spent.items() if name in own and s.value is not None}
    tolerance = float(reference.get("tolerance", AGREEMENT))
    main = spent[unit].value
    row = ("paper", "table", "row", "accuracy", "accuracy_status")
    keys = (*row, "epsilon", "delta", "accountant", "status", "note")
    return {
        **{key: reference[key] for key in keys if reference.get(key) is not None},
        "difference": {name: value / stated - 1.0 for name, value in found.items()},
        "tolerance": tolerance,
        "agrees": main is not None and abs(main / stated - 1.0) <= tolerance,
    }


def _from_data(experiment: Experiment) -> _Known:
    train, task, model = experiment.splits.train, experiment.task, experiment.model
    strata, cpu = task.strata_of(train), torch.device("cpu")
    placeholder, target = batches.placeholder(train, 1, seeds.stream(0, "view"), torch.float32, cpu)
    views = batch.shown(task.shown, placeholder, target)
    if sum(p.numel() for p in model.parameters()) * math.prod(train.example_shape) > COMPUTED_UP_TO:
        model = models.skeleton(
            experiment.config.model, train.example_shape, task.outputs(train.declared), train.vocabulary
        )
    return _Known(
        mechanism=experiment.mechanism,
        holders=Sensitive(
            experiment.partition.summary(np.zeros(len(train), int) if strata is None else strata)
        ),
        model=model,
        task=task,
        view=(batch.each(lambda array: array[0], views), target),
        source=f"{train.name}, read",
        declared=train.declared,
        vocabulary=train.vocabulary,
        undecodable=_undecodable(train),
    )


def _undecodable(train: ArrayDataset) -> Tagged[dict[str, Any]]:
    """Return how many pictures of the split's files are known to be none; empty where none are in files."""
    if not isinstance(train.inputs, Pictures):
        return Public({})
    count, how = train.inputs.frames.known
    return Sensitive({"pictures": count, "known": how})


def _from_sizes(config: Config, size: sizes.Size) -> _Known:
    method = Method.of(config)
    datasets.resolve(config.data)  # refuses unknown names
    augment.check(config.train.augmentations, _example(config, size))
    task = TASKS.make(config.task)
    kind = "tokens" if size.places else "labels" if task.kind == "labels" else "class"
    declared = Targets(kind, size.classes)
    task.check(declared)
    skeleton = models.skeleton(config.model, size.shape, task.outputs(declared))
    method.at.clip.group_of(trainable_names(skeleton))  # refuses groups that do not fit the model
    method.learner.start(config, method.at.query, spec(skeleton), size.train)  # refuses what it cannot learn
    held, summary = _spread(config, size)
    trained = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    facts = facts_of(config, held, trained, size.shape, task.outputs(declared))
    shape = " x ".join(map(str, size.shape))
    source = f"{config.data.name}, not read: {size.train} examples of {shape}, {size.classes} "
    source += {"labels": "labels", "tokens": "tokens"}.get(kind, "even classes")
    form = {"labels": (1, size.classes), "tokens": (1, size.places)}.get(kind, (1,))
    target = torch.zeros(form, dtype=torch.long)
    view = task.shown(torch.zeros(1, *size.shape), target), target
    return _Known(planned(method, facts), Public(summary), skeleton, task, view, source, declared, None)


def _spread(
    config: Config, size: sizes.Size
) -> tuple[partition.Partition | partition.Planned, dict[str, float]]:
    """Spread examples with even labels over the holders; a population too large to draw, by sizes alone."""
    if size.train > DRAWN_UP_TO:
        held = partition.planned(size.train, config.federation)
        if held is None:
            raise InputError(
                f"a dry run of {size.train} examples must have a partition whose sizes follow from numbers "
                f"alone, got {config.federation.partition.name}. Use federation.partition=iid."
            )
        return held, held.summary()
    labels = np.arange(size.train, dtype=np.int64) % (1 if size.places else size.classes)
    material = Material(size.train, None if size.places else labels)
    drawn = partition.partition(material, config.federation, config.seed)
    return drawn, drawn.summary(labels)


def _example(config: Config, size: sizes.Size) -> NDArray[Any]:
    """An example of the right shape and dtype, without content."""
    if config.data.features is not None:
        return np.zeros(size.shape, np.float16)
    channels, height, width = size.shape
    return np.zeros((height, width, channels), np.uint8)


def _spent(known: _Known, config: Config) -> dict[str, Tagged[EpsilonResult]]:
    """All epsilons of the run; RDP with its default orders and PLD are always among them."""
    plan = known.mechanism
    spent = epsilons(plan, plan.steps, config)
    if config.privacy.accountant == "rdp_objax":
        total = plan.total_event(plan.steps)
        units = plan.facts.examples if plan.unit == "example" else plan.facts.holders
        renyi = accountant.epsilon(total, config.privacy.delta, "rdp", plan.unit)
        spent[f"{plan.unit}_rdp"] = Public(renyi.among(units))
    return spent


def _costs(config: Config, known: _Known, rate: float) -> dict[str, Any]:
    """Operations of the run, hours at a rate, bytes of a step and memory of its processes."""
    train, facts, plan = config.train, known.mechanism.facts, known.mechanism
    one = cost(known.model, *known.view, known.task.loss)
    itemsize = 8 if config.model.dtype == "float64" else 4
    entries = [sum(part.length for part in release.statistic.parts) for release, _ in plan.releases()]
    sums = max(release.statistic.nbytes for release, _ in plan.releases())
    views = plan.steps * plan.sampling_rate * facts.examples * train.augment_multiplicity
    operations = plan.operations(train.augment_multiplicity * one.training)
    holder_bytes, messages = plan.traffic()
    hosted = -(-facts.holders // config.federation.nodes)
    to_node, from_node = plan.node_traffic(hosted)
    return {
        "parameters": facts.parameters,
        "frozen_parameters": one.parameters - facts.parameters,
        "flops": {
            "forward, one view": one.forward,
            "forward and backward, one view": one.training,
            "one step": operations / plan.steps,
            "run": operations,
        },
        "flops_per_second": rate,
        "gpu_hours": operations / rate / 3600.0,
        "machines_for": {
            name: math.ceil(operations / rate / 3600.0 / hours) for name, hours in DEADLINES.items()
        },
        "gradient_evaluations": views,
        "bytes_to_largest_node_per_step": to_node,
        "bytes_from_largest_node_per_step": from_node,
        "bytes_of_a_holder_of_its_own_per_step": holder_bytes,
        "messages_per_step": messages,
        "physical_batch_size": config.engine.physical_batch_size,
        "memory_bytes_without_data_and_libraries": _memory(config, one, sums, max(entries), itemsize),
        "node_memory_bytes_by_physical_batch": {
            f"{views} views": _of_node(config, one, sums, itemsize, views)
            for views in PHYSICAL_BATCHES
            if views >= train.augment_multiplicity
        },
    }


def _physical_batch_size(config: Config) -> int:
    """The configured one; where a probe chooses it, one example's views."""
    given = config.engine.physical_batch_size
    return given if isinstance(given, int) else config.train.augment_multiplicity


def _memory(config: Config, one: Cost, sums: int, entries: int, itemsize: int) -> dict[str, int]:
    """Estimates in bytes, data and libraries not counted.

    A node holds the parameters, the sums of a step and one physical batch: what is saved for the backward
    pass, and for per-example norms either the gradients of all layers' outputs (bookkeeping) or every
    example's whole gradient (vmap, opacus). The server holds parameters, optimizer state, average, and the
    sums and their noise in float64.

    Args:
        config, one: the run, and one view of its model.
        sums, entries: bytes and numbers of the largest step's sums.
        itemsize: bytes of a parameter.
    """
    vector = one.trainable * itemsize
    views = _physical_batch_size(config)
    bookkeeping = config.engine.gradients == "bookkeeping"
    node = _of_node(config, one, sums, itemsize, views)
    rule = OPTIMIZERS.make(Choice(config.optimizer.name, config.optimizer.options))
    slots = len(rule.slots) + bool(config.train.ema_decay)
    return {
        f"physical batch of {views} views": node - one.parameters * itemsize - sums,
        "one more view": one.saved_bytes + (one.output_bytes if bookkeeping else 0),
        "node": node,
        "server": one.parameters * itemsize + slots * vector + 2 * entries * 8,
    }


def _of_node(config: Config, one: Cost, sums: int, itemsize: int, views: int) -> int:
    """Bytes of a node with a physical batch of so many views; see `_memory`."""
    bookkeeping = config.engine.gradients == "bookkeeping"
    examples = max(1, views // config.train.augment_multiplicity)
    extra = views * one.output_bytes if bookkeeping else examples * one.trainable * itemsize
    return one.parameters * itemsize + sums + one.fixed_bytes + views * one.saved_bytes + extra
