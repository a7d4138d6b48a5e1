"""A node's side: the holders it hosts, and its answer to one task.

Pure: the answer depends on the configuration, the node's index, the task and the parameters, never on what
was asked before, so a task can be asked again and any process can serve any node. What was asked before
decides only whether there is an answer (fedsim.engine.asked), and its last bits once a GPU ran out of memory.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import provenance, seeds
from fedsim.clipping.base import ClipRule
from fedsim.config import Config
from fedsim.data import batches, datasets
from fedsim.data.pictures.pictures import Pictures
from fedsim.engine.ahead import ahead
from fedsim.engine.asked import Asked
from fedsim.engine.contributions import Found, statistics
from fedsim.engine.device import make_deterministic, options_of, pick_device, set_threads, threads_of
from fedsim.engine.experiment import build_model, partition_of, task_of
from fedsim.grads import batch
from fedsim.grads.flat import get_flat, set_flat
from fedsim.grads.local_training import LocalTraining, local_update
from fedsim.grads.per_example import clipped_gradient_sum, clipped_gradient_sums
from fedsim.grads.ways import out_of_memory
from fedsim.method import Method
from fedsim.queries.base import Shape
from fedsim.samplers.keyed import HolderAvailability
from fedsim.seeds import stream
from fedsim.types import ClippedSum, HolderReply, StepTask
from fedsim.validate import InputError

_log = logging.getLogger(__name__)
ENOUGH = 64
"""Examples of a holder that go as fast alone as among those of others, on a CPU (measured: 50 to 100)."""
Result = TypeVar("Result")

SECONDS = ("compute", "transfer", "data")
"""Names of a reply's times; "data" is the part of "compute" that waited for examples."""


class Node:
    """The holders that live on node `index` of `config.federation.nodes`, with their data and one model.

    `seed` is the run's, or the keys granted of it: partition and model are all a node makes from it.
    """

    def __init__(self, config: Config, index: int, seed: seeds.Root) -> None:
        self.config = config
        self.index = index
        self.method = Method.of(config)
        splits = datasets.load(config.data, bool(config.monitor.public_only))
        self.train, self.task = splits.train, task_of(config, splits)
        self.partition = partition_of(config, self.train, self.task, seed)
        nodes = config.federation.nodes
        self.holders = self.partition.holders_of_node(index, nodes)
        self._examples = sum(len(some) for some in self.partition.blocks_of_node(index, nodes))
        self.outputs = self.task.outputs(splits.train.declared)
        self.device = pick_device(config.engine.device, index)
        make_deterministic(self.device, config.engine.deterministic)
        if not isinstance(config.engine.physical_batch_size, int):
            raise InputError(
                "engine.physical_batch_size must be a number by the time nodes start, got 'auto'. "
                "Start the run by fedsim.flower.server_app.train, which chooses it, or give a number."
            )
        self.physical_batch_size = config.engine.physical_batch_size
        self._halved, self._said = False, False
        self.waited, self.undecodable = 0.0, 0  # of one answer: seconds, and pictures left out of training
        self._kept: dict[str, tuple[bytes, Any]] = {}
        self.alone = threading.Lock()
        self.options = options_of(config.engine)
        self.model = build_model(config, self.train, self.task, seed).to(self.device)
        self.threads = threads_of(config.engine, self.model)
        self.dtype = get_flat(self.model).dtype

    @property
    def ids(self) -> NDArray[np.int64]:
        """The global ids of the node's examples, ascending. Made when asked for: millions take their
        place."""
        return self.partition.ids_of_node(self.index, self.config.federation.nodes)

    def drawn(self, task: StepTask) -> NDArray[np.int64]:
        """Return the ids in this step's virtual batch, ascending: drawn, and of a holder that is online."""
        parts = self.partition.blocks_of_node(self.index, self.config.federation.nodes)
        drawn = [some[self.method.selected(task, some, self.partition.examples)] for some in parts]
        ids = np.concatenate([*drawn, np.zeros(0, np.int64)])
        owners = self.owners(ids)
        return ids[np.isin(owners, self.online(self.holders, task))] if self._sometimes_offline else ids

    def drawn_holders(self, task: StepTask) -> NDArray[np.int64]:
        """Return the node's holders that are drawn in this step and online, ascending."""
        return self.online(
            self.holders[self.method.selected(task, self.holders, self.config.federation.holders)], task
        )

    @property
    def _sometimes_offline(self) -> bool:
        return self.config.federation.availability < 1.0

    def online(self, holders: NDArray[np.int64], task: StepTask) -> NDArray[np.int64]:
        """Return those of the holders that are online in this step."""
        if not self._sometimes_offline:
            return holders
        model = HolderAvailability(self.config.federation.availability)
        return holders[model.available(holders, task.keys["availability"])]

    def shape(self, phase: int) -> Shape:
        """Return the sizes a statistic follows from, in a phase of the query."""
        features, dtype = math.prod(self.train.example_shape), np.dtype(self.config.model.dtype)
        return Shape(self.parameters().numel(), features, self.outputs, dtype, phase)

    def parameters(self) -> torch.Tensor:
        """Return the task's parameters (P,), on the model's device."""
        return get_flat(self.model)

    def kept(self, name: str, key: bytes, make: Callable[[], Result]) -> Result:
        """Return `make()`, or what it gave when it was last asked for under this name and key."""
        held = self._kept.get(name)
        if held is None or held[0] != key:
            held = self._kept[name] = key, make()
        value: Result = held[1]
        return value

    def zero_sum(self) -> torch.Tensor:
        """Return a zero vector (P,) in the model's dtype, on its device."""
        return torch.zeros_like(get_flat(self.model))

    @contextmanager
    def moved(self, update: torch.Tensor) -> Iterator[None]:
        """Within the block, take gradients at the task's parameters minus `update` (P,)."""
        start = get_flat(self.model)
        set_flat(self.model, start - update)
        try:
            yield
        finally:
            set_flat(self.model, start)

    def local_update(self, holder: int, task: StepTask, how: LocalTraining) -> tuple[torch.Tensor, float]:
        """Train on all examples of one holder; return start minus end (P,) and the mean loss.

        The order of the examples is keyed by (step, holder); the model is left at the task's parameters.
        """
        ids, start = self.partition.ids_of_holder(holder), get_flat(self.model)
        began = time.perf_counter()
        inputs, targets, lost = batches.whole(self.train, ids, self.dtype, self.device)
        self.waited += time.perf_counter() - began
        if lost:
            self._tell(ids)
        self.undecodable += lost
        if not len(targets):
            return torch.zeros_like(start), math.nan
        order = stream(task.keys["augment"], "order", holder)
        update = local_update(
            self.model, self.task.shown(inputs, targets), targets, how, order, self.task.loss
        )
        set_flat(self.model, start)
        return update

    def plain(self, ids: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs (n, ...) and targets (n, ...) of these examples, as the model takes them."""
        inputs, targets = batches.plain(self.train, ids, self.dtype, self.device)
        assert isinstance(inputs, torch.Tensor)
        assert isinstance(targets, torch.Tensor)
        return inputs, targets

    def owners(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the holder of each of these examples."""
        return self.partition.holder_of[ids].astype(np.int64)

    def clipped_sum(self, ids: NDArray[np.int64], task: StepTask, clip: ClipRule) -> ClippedSum:
        """Return the clipped gradient sum of these examples, one physical batch in memory at a time."""
        return self._in_memory(lambda: self._clipped_sum(ids, task, clip))

    def _in_memory(self, compute: Callable[[], Result]) -> Result:
        """Return `compute()`; where the GPU's memory is too small, once more with half the physical batch."""
        try:
            return compute()
        except Exception as problem:
            if not out_of_memory(problem):
                raise
            half = max(self.config.train.augment_multiplicity, self.physical_batch_size // 2)
            if half >= self.physical_batch_size or self._halved:
                raise
            _log.warning(
                "%s has no memory for engine.physical_batch_size=%d; from here on node %d takes %d.",
                self.device,
                self.physical_batch_size,
                self.index,
                half,
            )
            self.physical_batch_size, self._halved = half, True
        torch.cuda.empty_cache()
        return compute()

    def _clipped_sum(self, ids: NDArray[np.int64], task: StepTask, clip: ClipRule) -> ClippedSum:
        found = Found(clip.sensitivity)
        total: torch.Tensor | None = None
        for piece, parts, whole in self._pieces(ids, task):
            part = clipped_gradient_sum(
                self.model,
                *parts,
                clip,
                loss=self.task.loss,
                engine=self.config.engine.gradients,
                physical_batch_size=self._chunk(task) * self.config.train.augment_multiplicity,
                options=self.options,
            )
            total = part.sum if total is None else total.add_(part.sum)  # one sum is kept, not one a batch
            found.add(part.norms, part.losses, part.clipped, self._told(ids[piece], whole))
        assert total is not None
        return found.together(total, len(ids))

    def clipped_sums(
        self, ids: NDArray[np.int64], task: StepTask, clip: ClipRule
    ) -> tuple[torch.Tensor, ClippedSum]:
        """Return one clipped gradient sum a holder of the node, (H, P), and their statistics together.

        The time is that of one sum, not of H: examples of several holders share physical batches, but for
        those of holders that have enough, which need no gradient of an example alone.
        """
        return self._in_memory(lambda: self._clipped_sums(ids, task, clip))

    def _clipped_sums(
        self, ids: NDArray[np.int64], task: StepTask, clip: ClipRule
    ) -> tuple[torch.Tensor, ClippedSum]:
        rows = np.searchsorted(self.holders, self.owners(ids))
        totals = torch.zeros(
            (len(self.holders), self.zero_sum().numel()), dtype=self.dtype, device=self.device
        )
        found = Found(clip.sensitivity)
        chunk = self._chunk(task)
        enough = chunk if self.device.type == "cuda" else min(chunk, ENOUGH)
        alone = np.bincount(rows, minlength=len(self.holders)) >= enough
        places = [np.flatnonzero(rows == row) for row in np.flatnonzero(alone)]
        for here in places:
            own = self._clipped_sum(ids[here], task, clip)
            totals[rows[here[0]]] = own.sum
            found.take(own)
        places.append(np.flatnonzero(~alone[rows]))
        if len(places[-1]) or not len(ids):
            self._add_together(ids[places[-1]], rows[places[-1]], task, clip, totals, found)
        return totals, found.together(totals.new_zeros(0), len(ids), np.concatenate(places))

    def _add_together(
        self,
        ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        task: StepTask,
        clip: ClipRule,
        totals: torch.Tensor,
        found: Found,
    ) -> None:
        """Add to `totals` (H, P) the examples of several holders, whose rows (n,) there are given."""
        for piece, parts, whole in self._pieces(ids, task):
            owners = torch.from_numpy(rows[piece] if whole is None else rows[piece][whole])
            fill = self._chunk(task) if self.device.type == "cuda" else 2
            answer = clipped_gradient_sums(
                self.model, *parts, clip, owners, totals, loss=self.task.loss, fill=fill
            )
            found.add(*answer, self._told(ids[piece], whole))

    def _chunk(self, task: StepTask) -> int:
        """Examples of a physical batch: no more than a draw has in all likelihood.

        A GPU computes physical batches of one size, whoever is in them.
        """
        expected = task.sampling_rate * self._examples
        likely = math.ceil(expected + 6.0 * math.sqrt(expected)) + 1
        return max(1, min(self.physical_batch_size // self.config.train.augment_multiplicity, likely))

    def _pieces(
        self, ids: NDArray[np.int64], task: StepTask
    ) -> Iterator[tuple[slice, tuple[batches.Batch, batches.Batch], NDArray[np.bool_] | None]]:
        """Yield (place in ids, (inputs, targets), which of the ids they are) of one physical batch after the
        other; one at least. All ids are there where nothing is said."""
        train, key = self.config.train, task.keys["augment"]
        chunk = self._chunk(task)
        pieces = [slice(start, start + chunk) for start in range(0, max(1, len(ids)), chunk)]
        on_gpu = self.device.type == "cuda"

        def prepare(piece: slice) -> batches.Prepared:
            return batches.prepared(self.train, ids[piece], train, key, on_gpu, self._decoders)

        # Of arrays on a CPU, the core that prepares the next piece would be taken from this one. Pictures
        # take longer, and their first piece is what a step waits for.
        ahead_of_use = on_gpu or isinstance(self.train.inputs, Pictures)
        with contextlib.closing(ahead(prepare, pieces) if ahead_of_use else _each(prepare, pieces)) as ready:
            for piece in pieces:
                began = time.perf_counter()
                parts = next(ready)
                self.waited += time.perf_counter() - began
                inputs, targets = batches.placed(parts, self.train, self.dtype, self.device)
                yield piece, (batch.shown(self.task.shown, inputs, targets), targets), parts.whole

    @property
    def _decoders(self) -> int | None:
        return self.config.engine.decode_threads

    def _told(self, ids: NDArray[np.int64], whole: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """Say once which picture it was that could not be decoded, where that may be said; return `whole`."""
        if whole is not None:
            self._tell(ids[~whole])
        return whole

    def _tell(self, ids: NDArray[np.int64]) -> None:
        pictures = self.train.inputs
        if self._said or self.config.monitor.public_only or not isinstance(pictures, Pictures):
            return
        lost = next((int(i) for i in ids if int(i) in pictures.refused), None)
        if lost is not None:
            self._said = True
            _log.warning(
                "%s: its example contributes nothing. Others are counted as undecodable.", pictures.said(lost)
            )


def _each(prepare: Callable[[slice], Result], pieces: Sequence[slice]) -> Generator[Result]:
    yield from map(prepare, pieces)


def answer(node: Node, task: StepTask, parameters: NDArray[Any], asked: Asked) -> HolderReply:
    """Answer one task: draw, clip, sum.

    Args:
        node: the node that answers.
        task: the step's keys and rate.
        parameters: (P,) flat parameters of the step, the model's dtype.
        asked: what the node was asked before; this task is added.

    Raises:
        RunError: together with what was asked before, the answer would show what holders hide.
    """
    began = time.perf_counter()
    asked.admit(task, parameters, node.config.digest(), node.method.trust.stages)
    set_threads(node.threads)  # another run of this process may have changed them since the last answer
    set_flat(node.model, torch.tensor(parameters))
    node.waited, node.undecodable = 0.0, 0
    arrays, result = node.method.answer(node, task)
    asked.keep(task, arrays)
    return HolderReply(
        step=task.step,
        wave=task.wave,
        node=node.index,
        holders=node.holders,
        code_hash=provenance.code_hash(*node.config.references()),
        arrays=arrays,
        count=result.count,
        statistics=statistics(result, node.undecodable),
        seconds={"compute": time.perf_counter() - began, "data": node.waited},
        stage=task.stage,
    )
