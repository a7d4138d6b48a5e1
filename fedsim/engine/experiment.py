"""From a configuration to everything a run needs, with every error found before anything starts."""

from __future__ import annotations

import copy
import functools
import logging
import math
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedsim import given, models, provenance, references, seeds
from fedsim.config import Config
from fedsim.data import augment, datasets, examples, partition
from fedsim.data.pictures.pictures import Pictures
from fedsim.engine import device, scoring, trials
from fedsim.engine.evaluate import evaluating
from fedsim.grads.batch import call
from fedsim.grads.flat import get_flat, spec
from fedsim.learners import optimizer
from fedsim.mechanism import Mechanism, selection_of
from fedsim.method import Method
from fedsim.partitions import PARTITIONS, Material
from fedsim.privacy import accountant
from fedsim.privacy.accountant import EpsilonResult
from fedsim.privacy.ledger_view import LedgerHeader, LedgerRecord, LedgerView
from fedsim.strategies.base import DataFacts
from fedsim.tasks import TASKS, Task
from fedsim.validate import InputError
from fedsim.visibility import Public, Sensitive, Tagged

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """A checked configuration with its data, holders, model and mechanism."""

    config: Config
    splits: examples.Splits
    partition: partition.Partition
    model: nn.Module
    mechanism: Mechanism
    task: Task

    @property
    def facts(self) -> DataFacts:
        """Return what the mechanism knows about the data."""
        return self.mechanism.facts

    @functools.cached_property
    def noticed(self) -> Sensitive[dict[str, int]] | None:
        """Return how many training examples have odd targets (`Task.noticed`); None where none has."""
        found, train = Counter[str](), self.splits.train
        if train.whole is not None:  # their targets say nothing
            found["pictures that cannot be read"] = int((~train.whole).sum())
            train = train.take(np.flatnonzero(train.whole))
        for counts in train.of_targets(self.task.noticed):
            found.update(counts)
        return Sensitive({name: n for name, n in found.items() if n}) if any(found.values()) else None


def prepare(config: Config) -> Experiment:
    """Load data, draw the partition, build and check the model, and compose the mechanism.

    Raises:
        InputError: anything wrong with the configuration or the data it names; nothing has been started.
    """
    method = Method.of(config)
    optimizer.check(config.optimizer)
    device.check(config)
    splits = datasets.load(config.data, bool(config.monitor.public_only))
    task = task_of(config, splits)
    _tell_of_pictures(config, splits)
    with datasets.telling(bool(config.monitor.public_only)):
        scoring.check(splits.test, held_out=bool(config.data.holdout_examples))
    augment.check(config.train.augmentations, splits.train.blank(1)[0])
    holders = partition_of(config, splits.train, task, config.seed)
    if config.train.expected_batch_size < 1:
        _log.warning(
            "train.expected_batch_size=%g is a number of examples: most steps draw nobody. Of a sampling "
            "rate it is the rate times the %d training examples.",
            config.train.expected_batch_size,
            len(splits.train),
        )
    scheme = config.federation.partition.name
    if splits.train.groups is not None and scheme in PARTITIONS.own() and scheme not in ("natural", "file"):
        _log.warning(
            "the data have owners of their examples, and federation.partition=%s mixes these: what is said "
            "of holders is not said of those owners. federation.partition=natural keeps them together.",
            scheme,
        )
    model = build_model(config, splits.train, task, config.seed)
    if references.is_reference(config.model.name):
        _check_fits(model, splits.train, task)
        trials.apart(model, splits.train, task)
        _check_kept(model, build_model(config, splits.train, task, config.seed ^ 1), config.model.name)
    trials.check(config, method.at.clip, splits.train, task, model)  # also groups that do not fit the model
    outputs = task.outputs(splits.train.declared)
    facts = facts_of(config, holders, get_flat(model).numel(), splits.train.example_shape, outputs)
    method.at.query.check_model(model, splits.train.example_shape, outputs)
    method.learner.start(config, method.at.query, spec(model), facts.examples)  # refuses what it cannot learn
    made = Experiment(config, splits, holders, model, planned(method, facts), task)
    if made.noticed is not None and not config.monitor.public_only:
        odd = ", ".join(f"{count} {name}" for name, count in made.noticed.value.items())
        _log.warning("%s has %s among its %d training examples", config.data.name, odd, facts.examples)
    return made


def _tell_of_pictures(config: Config, splits: examples.Splits) -> None:
    """Say how many pictures are known to be none, of private ones only where that may be said."""
    told = [] if config.monitor.public_only else [("training", splits.train)]
    if not config.data.holdout_examples:  # held-out examples are of the training files
        told.append(("test", splits.test))
    for split, data in told:
        count, how = data.inputs.frames.known if isinstance(data.inputs, Pictures) else (0, "")
        if count:
            _log.warning(
                "%d pictures of the %s files are known %s to be none: their examples contribute nothing.",
                count,
                split,
                how,
            )


def planned(method: Method, facts: DataFacts) -> Mechanism:
    """Return the mechanism on data of these sizes, with a warning where delta is large for as many units as
    there are of those that it protects.

    Raises:
        InputError: as `Mechanism.of`, and a delta that is much too large.
    """
    mechanism = Mechanism.of(method, facts)
    if method.private:
        delta, unit = method.at.config.privacy.delta, mechanism.unit
        units = facts.examples if unit == "example" else facts.holders
        if accountant.check_delta(delta, units, unit) > accountant.WARNED_N_DELTA:
            _log.warning(
                "privacy.delta %g is above 1 / %d, the number of %ss, whose presence is protected",
                delta,
                units,
                unit,
            )
    return mechanism


def facts_of(
    config: Config,
    holders: partition.Partition | partition.Planned,
    parameters: int,
    shape: tuple[int, ...],
    outputs: int,
) -> DataFacts:
    """Return what a mechanism may know: the largest holder is public where it is the declared cap."""
    at_most = config.federation.examples_per_holder_at_most
    largest = Sensitive(int(holders.sizes().max())) if at_most is None else Public(at_most)
    features = math.prod(shape)
    return DataFacts(holders.examples, config.federation.holders, largest, parameters, features, outputs)


def task_of(config: Config, splits: examples.Splits) -> Task:
    """Return the configuration's task, which goes with these data.

    Raises:
        InputError: unknown task or option, targets of another kind, or that break what the options declare.
    """
    task = TASKS.make(config.task)
    task.check(splits.train.declared)
    for split in (splits.train, splits.test):
        split.of_targets(task.check_targets)
    return task


def partition_of(
    config: Config, train: examples.ArrayDataset, task: Task, seed: seeds.Root
) -> partition.Partition:
    """Return which holder has which example of the training split; see `fedsim.data.partition.partition`.

    Server and nodes of one process have it once in memory, where its scheme is not from outside.
    """
    chosen = config.federation
    said = (chosen.partition, chosen.holders, chosen.examples_per_holder_at_most, config.task)
    key = seeds.derive(seed, "partition"), repr(said)
    of, held = _partitions.get(key, (None, None))
    found = None if of is None or of() is not train or held is None else held()
    if found is None:
        material = Material(len(train), task.strata_of(train), train.groups)
        found = partition.partition(material, config.federation, seed)
        if config.federation.partition.name in PARTITIONS.own():
            _partitions.clear()
            _partitions[key] = weakref.ref(train), weakref.ref(found)
    return found


_partitions: dict[tuple[bytes, str], tuple[Any, Any]] = {}


def build_model(config: Config, train: examples.ArrayDataset, task: Task, seed: seeds.Root) -> nn.Module:
    """Return the configuration's model for this data and task, with its initial parameters."""
    return models.build(
        config.model, train.example_shape, task.outputs(train.declared), seed, train.vocabulary
    )


def _check_fits(model: nn.Module, train: examples.ArrayDataset, task: Task) -> None:
    """Refuse a model from outside that does not take the data, or gives another number of outputs."""
    dtype = get_flat(model).dtype
    blank = examples.normalise(train.blank(1), train, dtype)
    targets = examples.wanted(train.blank_targets(1), dtype)
    shape, width = tuple(blank.shape), task.outputs(train.declared)
    try:
        with torch.enable_grad():
            outputs = call(copy.deepcopy(model), task.shown(blank, targets))
        with evaluating(model):  # a forward pass may do in eval mode what it does in no other
            call(model, task.shown(blank, targets))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"model must run on inputs of shape {shape}, one example of the data, but fails by "
            f"{type(error).__name__}: {error}. Change the model, or the data."
        ) from error
    found = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    if not isinstance(outputs, torch.Tensor) or outputs.shape[0] != 1 or outputs.shape[-1] != width:
        raise InputError(
            f"model must give {width} outputs an example, as the task has for {train.declared.said}, shape "
            f"(1, ..., {width}) for one, got {found}. Change its last layer, or what the data declare."
        )
    if not outputs.requires_grad:
        raise InputError(
            "model must compute its outputs from its trainable parameters, but no gradient leads from them. "
            "Leave out detach(), numpy() and no_grad() in its forward pass."
        )


def _check_kept(model: nn.Module, other: nn.Module, name: str) -> None:
    """Refuse a model whose constructor draws what is neither parameter nor buffer, and so is not released
    with the weights: another process, and whoever predicts, would have another model under equal weights.

    Args:
        model, other: by the same constructor, from different seeds.
        name: model.name.
    """
    if given.structure_of(model) != given.structure_of(other):
        raise InputError(
            f"model.name={name} must be the same whenever it is made, but for parameters and buffers, and "
            "its constructor gives other attributes each time. Keep tensors that it draws as buffers "
            "(self.register_buffer), and all else fixed."
        )
    for part, values in (*model.named_parameters(), *model.named_buffers()):
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise InputError(
                f"model.name={name} must start from finite numbers, and {part} holds NaN or infinity. Check "
                "its constructor, or the weights it loads."
            )


def header_of(
    mechanism: Mechanism,
    config: Config,
    run: str = "",
    secret: str = "",
    data: tuple[str, ...] = (),
    evaluation: str = "",
) -> LedgerHeader:
    """Return the header of the ledger of a run; the last four arguments as in `LedgerHeader`."""
    privacy, facts = config.privacy, mechanism.facts
    return LedgerHeader(
        config_hash=config.digest(),
        delta=privacy.delta,
        unit=mechanism.unit,
        relation=mechanism.relation,
        accountant=privacy.accountant,
        target_epsilon=privacy.target_epsilon,
        stop_at_epsilon=privacy.stop_at_epsilon,
        examples=facts.examples,
        holders=facts.holders,
        examples_per_holder_at_most=config.federation.examples_per_holder_at_most,
        holder_noise_factor=mechanism.holder_noise_factor,
        example_noise_factor=mechanism.example_noise_factor,
        selection=selection_of(config),
        imitated_batch_size=config.train.imitated_batch_size,
        run=run,
        secret=secret,
        code=provenance.reference_hash(*config.references()),
        data=data,
        evaluation=evaluation,
    )


def spent(book: LedgerView, facts: DataFacts) -> dict[str, Tagged[EpsilonResult]]:
    """Return every epsilon of what a ledger records: in its unit under its name, the same by the other
    accountant under "UNIT_check", and that of the other unit (seconds of computing).

    That of a whole holder is as public as the size of the largest one."""
    unit = book.header.unit
    other = accountant.named(book.header.accountant).check
    out: dict[str, Tagged[EpsilonResult]] = {
        unit: Public(book.epsilon()),
        f"{unit}_check": Public(book.epsilon(other)),
    }
    if unit == "example" and book.private:
        out["holder"] = facts.largest_holder.map(book.holder_epsilon)
    if (of_example := book.example_epsilon()) is not None:
        out["example"] = Public(of_example)
    return out


def epsilons(mechanism: Mechanism, steps: int, config: Config) -> dict[str, Tagged[EpsilonResult]]:
    """Return what `steps` updates will spend: `spent` of the ledger they would write."""
    records = (LedgerRecord.of(step, mechanism.event_at(step)) for step in range(steps))
    return spent(LedgerView(header_of(mechanism, config), tuple(records)), mechanism.facts)
