"""The step loop: ask the nodes, check, add, record the release, add noise once, update.

For every step the event is on disk before the new parameters exist anywhere but in memory. All randomness
of a step derives from (root, step), so a step that is repeated after a crash draws the same examples and
the same noise: the ledger keeps one entry and nothing is released twice.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from fedsim import seeds
from fedsim.engine import checkpoint, outcome, scoring
from fedsim.engine.collect import Collector
from fedsim.engine.experiment import Experiment, epsilons
from fedsim.engine.metrics import ConsoleProgress, JsonLines, Metrics, TensorBoard, Writer
from fedsim.engine.record import step_record
from fedsim.engine.run_folder import RunFolder
from fedsim.engine.state import State
from fedsim.grads.flat import set_flat
from fedsim.privacy import secret
from fedsim.privacy.ledger import Ledger, LedgerHeader
from fedsim.types import StepRecord, Transport
from fedsim.validate import InputError
from fedsim.visibility import Numbers, Public, Sensitive


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
        self.state = State(experiment)
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
        completed = self.state.completed
        writers: list[Writer] = [JsonLines(self.folder.metrics, completed)]
        board = None
        public_only = bool(self.config.monitor.public_only)
        if self.config.monitor.tensorboard:
            board = TensorBoard(self.folder.tensorboard, completed, timeless=public_only)
            self._draw_partition(board)
            writers.append(board)
        if progress is not None:
            writers.append(progress)
        with Metrics(writers, public_only) as metrics:
            if completed == 0:
                self._save()
            final = self._loop(metrics)
            result = self._finish(final, time.perf_counter() - began)
            if board is not None:
                board.hparams(outcome.hparams(self.experiment), outcome.final_numbers(result))
        return result

    def _loop(self, metrics: Metrics) -> Numbers:
        final: Numbers = {}
        while self.state.completed < self.plan.steps:
            record, final = self.step()
            metrics.write(record)
            done = self.state.completed
            if done % self.config.train.checkpoint_every == 0 or done == self.plan.steps:
                self._save()
        return final or self._evaluate()

    def step(self) -> tuple[StepRecord, Numbers]:
        """Make the next server update; return its record, and the evaluation where one was due."""
        clock = time.perf_counter
        began = clock()
        state, strategy, step = self.state, self.experiment.strategy, self.state.completed
        self._collector.begin(step, state.parameters.numpy())
        total, replies = strategy.collect(self.plan, self._collector.ask)
        timing = self._collector.timing
        combined = clock()
        noise = strategy.noise(self.plan, self.root, step, total.size)
        noised = clock()
        self.ledger.append(step, self.plan.event_at(step), strategy.step_facts())
        recorded = clock()
        signal = float(np.linalg.norm(total))
        if noise is not None:
            total += noise
        total /= self.plan.divisor
        gradient = torch.from_numpy(total).to(state.parameters.dtype)
        state.parameters = state.optimizer.step(state.parameters, gradient, step)
        state.completed = step + 1
        updated = clock()
        due = state.completed % self.config.train.eval_every == 0 or state.completed == self.plan.steps
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
        known = {"learning_rate": Public(state.optimizer.learning_rate(step)), **evaluated}
        return step_record(self.experiment, step, replies, signal, known, timing), evaluated

    def _evaluate(self) -> Numbers:
        """Return accuracy and loss (of the averaged parameters when EMA is on) and epsilon so far."""
        set_flat(self.experiment.model, self.state.released())
        splits, dtype = self.experiment.splits, self.state.parameters.dtype
        held_out = bool(self.config.data.holdout_examples)
        scores = scoring.scores_of(self.experiment.model, splits, dtype, held_out=held_out)
        if not self.experiment.strategy.private:
            return scores
        spent = epsilons(self.plan, self.state.completed, self.config, self.experiment.facts, whole=False)
        epsilon = spent[self.plan.unit]
        return {
            **scores,
            "epsilon": epsilon.map(lambda spent: spent.value),
            "n_delta": epsilon.map(lambda spent: spent.n_delta),
        }

    def _bound_to(self) -> dict[str, Any]:
        return {"config": self.config.digest()}

    def _save(self) -> None:
        self.state.save(self.folder, self._bound_to())

    def _restore(self) -> None:
        self.state.restore(self.folder, self._bound_to())
        if self.ledger.steps < self.state.completed:
            raise InputError(
                f"ledger {self.folder.ledger} has {self.ledger.steps} steps, the newest checkpoint "
                f"{self.state.completed}: the ledger was cut. Restore it, or start anew in another --out."
            )

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
            examples=self.experiment.facts.examples,
            holders=self.config.federation.holders,
            examples_per_holder_at_most=self.config.federation.examples_per_holder_at_most,
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

        if self.config.monitor.public_only or self.state.completed:
            return
        train = self.experiment.splits.train
        counts = self.experiment.partition.label_counts(train.labels, train.num_classes)
        picture = partition_picture.as_image(partition_picture.figure(counts))
        board.image("labels_by_holder", Sensitive(picture))

    def _finish(self, final: Numbers, seconds: float) -> dict[str, Any]:
        released, completed = self.state.released(), self.state.completed
        set_flat(self.experiment.model, released)
        checkpoint.save_model(self.folder.final, self.experiment.model)
        spent = epsilons(self.plan, completed, self.config, self.experiment.facts)
        scores = {name: final[name] for name in ("accuracy", "loss")}
        seconds_of = {**self._seconds, "run": seconds}
        result = outcome.result_of(self.experiment, completed, released, scores, spent, seconds_of)
        self.folder.write_result(result)
        if self.config.privacy.noise_source == "secure":
            secret.destroy(self.folder.root)
        return result
