"""From a configuration to everything a run needs, with every error found before anything starts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

import strategies
from fedsim import models, seeds
from fedsim.config import Config
from fedsim.data import augment, datasets, examples, partition
from fedsim.engine import device, optim
from fedsim.grads.flat import get_flat, spec, trainable_names
from fedsim.privacy import accountant, budget
from fedsim.privacy.accountant import EpsilonResult
from fedsim.visibility import Public, Sensitive, Tagged
from strategies.base import DataFacts, Plan, Strategy

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """A checked configuration with its data, holders, model and mechanism."""

    config: Config
    splits: examples.Splits
    partition: partition.Partition
    model: nn.Module
    strategy: Strategy[Any]
    facts: DataFacts
    plan: Plan


def prepare(config: Config) -> Experiment:
    """Load data, draw the partition, build and check the model, and make the plan.

    Raises:
        InputError: anything wrong with the configuration or the data it names; nothing has been started.
    """
    strategy = strategies.load(config)
    optim.check(config.optimizer)
    device.check(config)
    splits = datasets.load(config.data)
    augment.check(config.train.augmentations, splits.train.inputs[0])
    holders = partition.partition(splits.train.labels, splits.train.groups, config.federation, config.seed)
    model = build_model(config, splits.train, config.seed)
    strategy.clip_rule().group_of(trainable_names(model))  # refuses groups that do not fit the model
    facts = facts_of(config, holders, get_flat(model).numel())
    optim.ServerOptimizer(  # refuses a warm-up as long as the run
        optim.resolved(config.optimizer, config.train, facts.examples), config.train, spec(model)
    )
    return Experiment(config, splits, holders, model, strategy, facts, planned(strategy, facts))


def planned(strategy: Strategy[Any], facts: DataFacts) -> Plan:
    """Return the strategy's plan, whose events keep within the budget it was given.

    Raises:
        InputError: they do not, or as `Strategy.plan`.
    """
    plan = strategy.plan(facts)
    if strategy.private:
        delta = strategy.config.privacy.delta
        if accountant.check_delta(delta, facts.examples) > accountant.WARNED_N_DELTA:
            _log.warning("privacy.delta %g is above 1 / %d, the number of examples", delta, facts.examples)
    budget.check(plan.total_event(plan.steps), plan.unit, strategy.config.privacy)
    return plan


def facts_of(config: Config, holders: partition.Partition, parameters: int) -> DataFacts:
    """Return what a plan may know: the largest holder is public where it is the declared cap."""
    at_most = config.federation.examples_per_holder_at_most
    largest = Sensitive(int(holders.sizes().max())) if at_most is None else Public(at_most)
    return DataFacts(holders.examples, config.federation.holders, largest, parameters)


def build_model(config: Config, train: examples.ArrayDataset, seed: seeds.Root) -> nn.Module:
    """Return the configuration's model for this data, with its initial parameters."""
    return models.build(config.model, train.example_shape, train.num_classes, seed)


def epsilons(
    plan: Plan, steps: int, config: Config, facts: DataFacts, *, whole: bool = True
) -> dict[str, Tagged[EpsilonResult]]:
    """Return epsilon of `steps` updates by unit: the plan's own under its name and, when `whole`, the same by
    the other accountant ("_check") and that of the other unit (seconds of computing).

    That of a whole holder is as public as the size of the largest one."""
    total, delta = plan.total_event(steps), config.privacy.delta
    chosen = config.privacy.accountant
    other = "rdp" if chosen == "pld" else "pld"
    units = {"example": facts.examples, "holder": facts.holders}
    out: dict[str, Tagged[EpsilonResult]] = {
        plan.unit: Public(accountant.epsilon(total, delta, chosen, plan.unit).among(units[plan.unit]))
    }
    if not whole:
        return out
    check = accountant.epsilon(total, delta, other, plan.unit)
    out[f"{plan.unit}_check"] = Public(check.among(units[plan.unit]))
    if plan.unit == "example" and plan.noise is not None:

        def of_holder(examples: int) -> EpsilonResult:
            bound = plan.total_event_for_holder(steps, examples)
            return accountant.holder_epsilon_of_event(bound, delta, examples).among(facts.holders)

        out["holder"] = facts.largest_holder.map(of_holder)
    if (event := plan.total_event_for_example(steps)) is not None:
        out["example"] = Public(accountant.epsilon(event, delta, chosen, "example").among(facts.examples))
    return out
