"""The step loop: ask the nodes, check, add, record the release, add noise once, update.

For every step the event is on disk before the new parameters exist anywhere but in memory. All randomness
of a step derives from (root, step), so a step that is repeated after a crash draws the same examples and
the same noise: the ledger keeps one entry and nothing is released twice.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import provenance, seeds
from fedsim.data import datasets
from fedsim.engine import checkpoint, evaluate, optim
from fedsim.engine.collect import Collector
from fedsim.engine.experiment import Experiment, epsilons
from fedsim.engine.holder import NORM_EDGES
from fedsim.engine.metrics import ConsoleProgress, JsonLines, Metrics, TensorBoard, Writer
from fedsim.engine.optim import ServerOptimizer
from fedsim.engine.run_folder import RunFolder
from fedsim.grads.flat import get_flat, set_flat, spec
from fedsim.privacy import secret
from fedsim.privacy.ledger import Ledger, LedgerHeader
from fedsim.types import HolderReply, StepRecord, Transport
from fedsim.validate import InputError

EVALUATION_BATCH = 500


class Server:
    """One run from its first or resumed step to its result."""

    def __init__(self, experiment: Experiment, folder: RunFolder, transport: Transport, resume: bool) -> None:
        self.experiment = experiment
        self.config = experiment.config
        self.plan = experiment.plan
        self.folder = folder
        self.transport = transport
        folder.claim(self.config, resume)
        self.ledger = self._open_ledger()
        self.root = self._open_root()
        self.model = experiment.model
        self.parameters = get_flat(self.model).clone()
        rule = optim.resolved(self.config.optimizer, self.config.train, experiment.facts.examples)
        self.optimizer = ServerOptimizer(rule, self.config.train, spec(self.model))
        self.optimizer.init(self.parameters)
        self.completed = 0
        self._restore()
        self._seconds: dict[str, float] = {}
        self._collector = Collector(experiment, transport, self.root, str(folder.root))

    def train(self, progress: ConsoleProgress | None = None) -> dict[str, Any]:
        """Run to the end, or to the budget, and return the content of result.json.

        Raises:
            RunError: a node failed twice, or its process died; the run can be resumed.
        """
        with self.ledger:
            return self._train(progress)

    def _train(self, progress: ConsoleProgress | None) -> dict[str, Any]:
        if (done := self.folder.finished()) is not None:
            return done
        began = time.perf_counter()
        self.transport.connect()
        writers: list[Writer] = [JsonLines(self.folder.metrics, self.completed)]
        board = None
        if self.config.monitor.tensorboard:
            board = TensorBoard(self.folder.tensorboard, self.completed)
            self._draw_partition(board)
            writers.append(board)
        if progress is not None:
            writers.append(progress)
        with Metrics(writers, self.config.monitor.public_only) as metrics:
            if self.completed == 0:
                self._save()
            final = self._loop(metrics)
            result = self._finish(final, time.perf_counter() - began)
            if board is not None:
                board.hparams(_hparams(self.experiment), _final_numbers(result))
        return result

    def _loop(self, metrics: Metrics) -> dict[str, float]:
        final: dict[str, float] = {}
        for step in range(self.completed, self.plan.steps):
            record, final = self._step(step)
            metrics.write(record)
            if self.completed % self.config.train.checkpoint_every == 0 or self.completed == self.plan.steps:
                self._save()
        return final or self._evaluate()

    def _step(self, step: int) -> tuple[StepRecord, dict[str, float]]:
        """Make one server update."""
        clock = time.perf_counter
        began = clock()
        self._collector.begin(step, self.parameters.numpy())
        total, replies = self.experiment.strategy.collect(self.plan, self._collector.ask)
        timing = self._collector.timing
        combined = clock()
        noise = self.experiment.strategy.noise(self.plan, self.root, step, total.size)
        noised = clock()
        self.ledger.append(step, self.plan.event_at(step), self.experiment.strategy.step_facts())
        recorded = clock()
        signal = float(np.linalg.norm(total))
        if noise is not None:
            total += noise
        total /= self.plan.divisor
        gradient = torch.from_numpy(total).to(self.parameters.dtype)
        self.parameters = self.optimizer.step(self.parameters, gradient, step)
        self.completed = step + 1
        updated = clock()
        due = self.completed % self.config.train.eval_every == 0 or self.completed == self.plan.steps
        evaluated = self._evaluate() if due else {}
        timing |= {
            "combine": combined - began - timing.pop("ask"),
            "noise": noised - combined,
            "ledger": recorded - noised,
            "update": updated - recorded,
            "evaluate": clock() - updated,
            "total": clock() - began,
        }
        for name, value in timing.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value
        return self._record(replies, signal, evaluated, timing), evaluated

    def _record(
        self, replies: list[HolderReply], signal: float, evaluated: dict[str, float], timing: dict[str, float]
    ) -> StepRecord:
        sums: dict[str, Any] = {}
        for reply in replies:
            for name, value in reply.statistics.items():
                sums[name] = np.add(sums.get(name, 0.0), value)
        realised = sum(reply.count for reply in replies)
        public = {"learning_rate": self.optimizer.learning_rate(self.completed - 1), **evaluated}
        public |= {f"seconds/{name}": value for name, value in timing.items()}
        sensitive = {"realised_batch_size": float(realised), "sum_norm": signal}
        if self.plan.noise is not None:
            factor = self.plan.noise_factor(self.completed - 1)
            noise_std = self.experiment.strategy.noise_std_of_sum(self.plan) * factor
            public["noise_std_of_mean"] = noise_std / self.plan.divisor
            spread = noise_std * self.parameters.numel() ** 0.5
            sensitive["noise_to_signal"] = spread / signal if signal else float("inf")
        if realised:
            sensitive["train_loss"] = float(sums["loss_sum"]) / realised
            sensitive["clip_fraction"] = float(sums["clipped"]) / realised
            sensitive["mean_gradient_norm"] = float(sums["norm_sum"]) / realised
            sensitive["non_finite_gradients"] = float(sums["non_finite"])
        histogram = (NORM_EDGES, [float(c) for c in sums["norm_histogram"]])
        return StepRecord(self.completed, public, sensitive, {"gradient_norm": histogram})

    def _evaluate(self) -> dict[str, float]:
        """Return test accuracy and loss (of the averaged parameters when EMA is on) and epsilon so far."""
        test = self.experiment.splits.test
        set_flat(self.model, self._released())
        measured = evaluate.evaluate(self.model, _batches(test, self.parameters.dtype))
        out = {"accuracy": measured["accuracy"], "loss": measured["loss"]}
        if self.experiment.strategy.private:
            spent = epsilons(self.plan, self.completed, self.config, self.experiment.facts, whole=False)
            value = spent[self.plan.unit].value
            out["epsilon"] = float("inf") if value is None else value
        return out

    def _released(self) -> Tensor:
        average = self.optimizer.average()
        return self.parameters if average is None else average

    def _save(self) -> None:
        tensors = {"parameters": self.parameters}
        state, numbers = self.optimizer.state_dict()
        tensors |= {f"optimizer.{name}": value for name, value in state.items()}
        tensors |= {f"strategy.{name}": v for name, v in self.experiment.strategy.state_dict().items()}
        meta = {"config": self.config.digest(), "optimizer": numbers}
        checkpoint.save(self.folder.checkpoints, self.completed, tensors, meta)

    def _restore(self) -> None:
        path = checkpoint.latest(self.folder.checkpoints)
        if path is None:
            return
        step, tensors, state = checkpoint.load(path)
        if state["config"] != self.config.digest():
            raise InputError(f"checkpoint {path} belongs to another configuration. Choose another --out.")
        if self.ledger.steps < step:
            raise InputError(
                f"ledger {self.folder.ledger} has {self.ledger.steps} steps, checkpoint {path.name} "
                f"{step}: the ledger was cut. Restore it, or start anew in another --out."
            )
        self.parameters = tensors.pop("parameters")
        parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "strategy": {}}
        for name, value in tensors.items():
            part, key = name.split(".", 1)
            parts[part][key] = value
        self.optimizer.load_state_dict(parts["optimizer"], state["optimizer"])
        self.experiment.strategy.load_state_dict(parts["strategy"])
        self.completed = step

    def _open_ledger(self) -> Ledger:
        if self.folder.ledger.exists():
            return Ledger.open_for_resume(self.folder.ledger, self.config.digest())
        privacy = self.config.privacy
        header = LedgerHeader(
            config_hash=self.config.digest(),
            delta=privacy.delta,
            unit=self.plan.unit,
            accountant=privacy.accountant,
            target_epsilon=privacy.target_epsilon,
            stop_at_epsilon=privacy.stop_at_epsilon,
            largest_holder=self.experiment.facts.largest_holder,
            holder_noise_factor=self.plan.holder_noise_factor,
        )
        return Ledger.create(self.folder.ledger, header)

    def _open_root(self) -> seeds.Root:
        """Return what draws and noise derive from: the seed, or the run's secret."""
        if self.config.privacy.noise_source == "seeded":
            return seeds.derive(self.config.seed, "run")
        if self.ledger.steps == 0 and not secret.secret_path(self.folder.root).exists():
            return secret.create(self.folder.root)
        return secret.load(self.folder.root)

    def _draw_partition(self, board: TensorBoard) -> None:
        from fedsim.report import partition_picture  # imports matplotlib: only where a picture is drawn

        if self.config.monitor.public_only or self.completed:
            return
        train = self.experiment.splits.train
        counts = self.experiment.partition.label_counts(train.labels, train.num_classes)
        board.image(
            "sensitive/labels_by_holder", partition_picture.as_image(partition_picture.figure(counts))
        )

    def _finish(self, final: dict[str, float], seconds: float) -> dict[str, Any]:
        released = self._released()
        set_flat(self.model, released)
        checkpoint.save_model(self.folder.final, self.model)
        spent = epsilons(self.plan, self.completed, self.config, self.experiment.facts)
        result = {
            "title": self.config.title,
            "strategy": self.config.strategy.name,
            "accuracy": final["accuracy"],
            "loss": final["loss"],
            "epsilon": {name: dataclasses.asdict(value) for name, value in spent.items()},
            "noise_multiplier": None if self.plan.noise is None else self.plan.noise.noise_multiplier,
            "noise_source": self.config.privacy.noise_source,
            "steps": self.completed,
            "stopped_by_budget": self.plan.stopped_by_budget,
            "seconds": seconds,
            "seconds_by_part": self._seconds,
            "parameters_sha256": checkpoint.parameters_sha256(released),
            "parameters": self.parameters.numel(),
            "holders": self.config.federation.holders,
            "holder_accuracy": self._holder_accuracy(),
            "trust": self._trust(),
            "nodes": self.config.federation.nodes,
            "seed": self.config.seed,
            "config": self.config.digest(),
            "commit": provenance.commit(),
            "code_hash": provenance.code_hash(),
            "hardware": provenance.hardware(),
            "physical_batch_size": self.config.engine.physical_batch_size,
            "peak_memory_bytes": provenance.peak_memory(),
        }
        self.folder.write_result(result)
        if self.config.privacy.noise_source == "secure":
            secret.destroy(self.folder.root)
        return result

    def _trust(self) -> dict[str, Any]:
        """What a comparison says about the run's trust model."""
        strategy = self.experiment.strategy
        itemsize = self.parameters.element_size()
        bytes_per_holder, messages = strategy.traffic(self.experiment.facts, itemsize)
        return {
            "trusted": strategy.trusted,
            "noise_added": strategy.noise_added,
            "unit": self.plan.unit if strategy.private else "none",
            "bytes_per_holder": bytes_per_holder,
            "messages": messages,
            "survivors_needed": strategy.survivors_needed(),
        }

    def _holder_accuracy(self) -> dict[str, float]:
        """Return the spread over holders of the test accuracy at each holder's own mix of labels.

        Computed from accuracies by class on public test data and the holders' label shares, which are
        private: left out (empty) in public-only mode.
        """
        if self.config.monitor.public_only:
            return {}
        splits = self.experiment.splits
        batches = _batches(splits.test, self.parameters.dtype)
        by_class = evaluate.class_accuracy(self.model, batches, splits.train.num_classes)
        counts = self.experiment.partition.label_counts(splits.train.labels, splits.train.num_classes)
        known = ~np.isnan(by_class)
        mine = counts[:, known] @ np.asarray(by_class)[known] / np.maximum(counts[:, known].sum(1), 1)
        return {f"{q}%": float(np.percentile(mine, q)) for q in (5, 50, 95)}


def _batches(data: datasets.ArrayDataset, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(data), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        yield datasets.normalise(data.inputs[rows], data, dtype), torch.from_numpy(data.labels[rows].copy())


def _hparams(experiment: Experiment) -> dict[str, Any]:
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


def _final_numbers(result: dict[str, Any]) -> dict[str, float]:
    value = result["epsilon"][result["trust"]["unit"]]["value"] if result["noise_multiplier"] else None
    return {
        "accuracy": result["accuracy"],
        "loss": result["loss"],
        "epsilon": float("inf") if value is None else value,
    }
