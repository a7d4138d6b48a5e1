"""`engine.physical_batch_size: auto`: what a node can take, tried once before the first step.

The process that starts a run tries it, on the device the nodes will use, and from then on the number stands
in the configuration: nodes get it in their messages, and the run folder keeps it, so that a resumed run adds
in the same order and gives the same bits. Where nodes run on other machines than the server (a deployment),
give a number that the smallest of them can take.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fedsim import loading, seeds
from fedsim.config import Config, EngineConfig
from fedsim.data import batches
from fedsim.engine import device as devices
from fedsim.engine.experiment import Experiment
from fedsim.engine.run_folder import RunFolder
from fedsim.grads import batch
from fedsim.grads.batch_size import Choice, choose, measure
from fedsim.grads.flat import get_flat
from fedsim.grads.per_example import clipped_gradient_sum, clipped_gradient_sums

_log = logging.getLogger(__name__)


def settle(experiment: Experiment, folder: RunFolder, parallel: bool) -> Experiment:
    """Return the experiment with a number as physical batch size: its own, the run folder's, or a new one.

    Args:
        experiment: prepared; its model is not touched.
        folder: of the run, already checked to be this experiment's.
        parallel: whether nodes will be processes of their own.

    Raises:
        InputError: not even one example fits into `engine.memory_limit`.
    """
    engine = experiment.config.engine
    if isinstance(engine.physical_batch_size, int):
        return experiment
    size: int | str = "auto"
    if folder.config.exists():
        size = loading.load(folder.config).engine.physical_batch_size
    if not isinstance(size, int):
        size = _probed(experiment, parallel)
    engine = replace(engine, physical_batch_size=size, memory_limit=None)
    return replace(experiment, config=replace(experiment.config, engine=engine))


def _probed(experiment: Experiment, parallel: bool) -> int:
    if experiment.config.query.name != "gradient":  # the others have blocks or batches of their own
        return int(EngineConfig().physical_batch_size)
    choice = probe(experiment, parallel)
    size = choice.examples * experiment.config.train.augment_multiplicity
    _log.info(
        "engine.physical_batch_size: %d views, %.0f MB and %.3g s a batch (stopped by: %s)",
        size,
        choice.cost.memory / 1e6,
        choice.cost.seconds,
        choice.stopped,
    )
    return size


def probe(experiment: Experiment, parallel: bool) -> Choice:
    """Try the clipped sum of `experiment` at growing sizes, on inputs of its shape and a copy of its model.

    Returns:
        The choice in examples; each stands for `train.augment_multiplicity` views.
    """
    config = experiment.config
    device = _device(config, parallel)
    devices.make_deterministic(device, config.engine.deterministic)
    nodes = devices.nodes_at_once(config, device, parallel)
    free = devices.free_memory(device, processes=nodes if parallel else 0)
    limit = devices.memory_limit(config.engine, free, nodes)
    expected = min(config.train.expected_batch_size, experiment.facts.examples)
    most = math.ceil(expected / config.federation.nodes)
    with _threads(experiment, parallel):
        return choose(measure(_Call(experiment, device), device), limit, most)


class _Call:
    """The clipped sum a node takes of one physical batch of so many examples."""

    def __init__(self, experiment: Experiment, device: torch.device) -> None:
        self._config = config = experiment.config
        self._by_holder = experiment.mechanism.method.trust.by_holder
        self._clip = experiment.mechanism.method.at.clip
        self._loss = experiment.task.loss
        self._model = copy.deepcopy(experiment.model).to(device)
        self._flat = get_flat(self._model)
        values = seeds.stream(config.seed, "physical batch size")
        inputs, targets = batches.placeholder(
            experiment.splits.train, config.train.augment_multiplicity, values, self._flat.dtype, device
        )
        self._example = batch.shown(experiment.task.shown, inputs, targets), targets

    def __call__(self, examples: int) -> Tensor:
        config = self._config
        inputs, targets = (batch.take(part, [0] * examples) for part in self._example)
        if not self._by_holder:
            return clipped_gradient_sum(
                self._model,
                inputs,
                targets,
                self._clip,
                loss=self._loss,
                engine=config.engine.gradients,
                physical_batch_size=examples * config.train.augment_multiplicity,
                options=replace(devices.options_of(config.engine), cuda_graphs=False),
            ).sum
        holders = math.ceil(config.federation.holders / config.federation.nodes)
        owners = torch.arange(examples) % holders
        totals = self._flat.new_zeros((holders, len(self._flat)))
        clipped_gradient_sums(self._model, inputs, targets, self._clip, owners, totals, loss=self._loss)
        return totals


def _device(config: Config, parallel: bool) -> torch.device:
    """Where a node will compute: in Flower's simulation on CUDA only if it reserves some of it."""
    if parallel and config.engine.device == "auto" and not config.engine.gpus_per_node:
        return torch.device("cpu")
    return devices.pick_device(config.engine.device)


@contextmanager
def _threads(experiment: Experiment, parallel: bool) -> Iterator[None]:
    """Compute with as many threads as a node will."""
    before = torch.get_num_threads()
    engine = experiment.config.engine
    chosen = devices.threads_of(engine, experiment.model)
    devices.set_threads(chosen or (engine.cpus_per_node if parallel else None))
    try:
        yield
    finally:
        devices.set_threads(before)
