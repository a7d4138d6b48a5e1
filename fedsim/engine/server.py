"""The step loop: ask the nodes, check, add, record the release, add noise once, update.

For every step the event is on disk before the new parameters exist anywhere but in memory. All randomness
of a step derives from (root, step), so a step that is repeated after a crash draws the same examples and
the same noise: the ledger keeps one entry and nothing is released twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.engine import checkpoint, evaluate, model_card, outcome, scoring
from fedsim.engine.board import TensorBoard
from fedsim.engine.collect import Collector
from fedsim.engine.device import evaluation_device
from fedsim.engine.experiment import Experiment, spent
from fedsim.engine.metrics import JsonLines, Metrics, SamplesPage, Watcher, Writer, own_writers
from fedsim.engine.opening import open_run
from fedsim.engine.record import step_record
from fedsim.engine.run_folder import RunFolder
from fedsim.engine.samples import samples_of
from fedsim.grads.flat import set_flat
from fedsim.merging import Choice
from fedsim.types import Sample, StepRecord, Transport
from fedsim.validate import Diverged, RunError
from fedsim.visibility import Numbers, Public, Sensitive, Tagged

_log = logging.getLogger(__name__)


class Server:
    """One run from its first or resumed step to its result."""

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        transport: Transport,
        resume: bool,
        backend: str = "local",
    ) -> None:
        self._backend = backend
        self.experiment = experiment
        self.config = experiment.config
        self.mechanism = experiment.mechanism
        self.folder = folder
        self.transport = transport
        self.run = open_run(experiment, folder, resume)
        self.state = self.run.state
        self._seconds: dict[str, float] = {}
        self._told = False
        self._config_kept = False
        self._collector = Collector(experiment, transport, str(folder.root))

    def train(self, watchers: Sequence[Watcher] = ()) -> dict[str, Any]:
        """Run to the end, or to the budget, and return the content of result.json.

        Raises:
            RunError: a node failed twice, or its process died; the run can be resumed. Or a step cannot be
                released: its parameters are not finite, or it repeats a released one with other bits.
        """
        with contextlib.closing(self.run):
            return self._train(watchers)

    def _train(self, watchers: Sequence[Watcher]) -> dict[str, Any]:
        began = time.perf_counter()
        self.transport.connect()
        self._keep_config()
        completed = self.state.completed
        writers: list[Writer] = [
            JsonLines(self.folder.metrics, completed),
            SamplesPage(self.folder.samples),
        ]
        board = None
        public_only = bool(self.config.monitor.public_only)
        if self.config.monitor.tensorboard:
            headline = self.experiment.task.chosen
            board = TensorBoard(self.folder.tensorboard, completed, headline, timeless=public_only)
            self._draw_partition(board)
            writers.append(board)
        writers += watchers
        writers += own_writers(self.config.monitor.writers, self.folder.root, completed)
        with Metrics(writers, public_only) as metrics:
            if completed == 0:
                self._save()
            final = self._loop(metrics)
            result = self._finish(final, time.perf_counter() - began)
            if board is not None:
                board.hparams(outcome.hparams(self.experiment))
        return result

    def _loop(self, metrics: Metrics) -> Numbers:
        final: Numbers = {}
        while self.state.completed < self.mechanism.steps:
            record, final = self.step()
            metrics.write(record)
            self._warn_of_noise_alone(record)
            done = self.state.completed
            if done % self.config.train.checkpoint_every == 0 or done == self.mechanism.steps:
                self._save()
        return final or self._evaluate()

    def _warn_of_noise_alone(self, record: StepRecord) -> None:
        """Say once that no example adds anything, which no released number shows; in simulation only."""
        if self.config.monitor.public_only or self._told:
            return
        numbers = {name: number.value for name, number in record.numbers.items()}
        realised, mean = numbers["realised_batch_size"], numbers.get("mean_gradient_norm")
        if not realised or mean is None:
            return
        if numbers["non_finite_gradients"] == realised:
            why = "no example's contribution is a finite number, and each counts as zero"
        elif mean == 0.0:
            why = "every example's contribution is zero, as where outputs do not depend on parameters"
        else:
            return
        self._told = True
        _log.warning(
            "step %d: %s: the model learns from noise alone. Check model and loss.", record.step, why
        )

    def step(self) -> tuple[StepRecord, Numbers]:
        """Make the next server update; return its record, and the evaluation where one was due."""
        clock = time.perf_counter
        began = clock()
        state, mechanism, step, root = self.state, self.mechanism, self.state.completed, self.run.root
        assert root is not None, "a run without its secret has no step left"
        release = mechanism.release(step, state.query)
        keys = mechanism.method.keys(root, step)
        self._collector.begin(step, keys, state.parameters.numpy(), release)
        got = mechanism.collect(release, state.query, self._collector.ask)
        timing = self._collector.timing
        combined = clock()
        noise = mechanism.noise(release, got, state.stream, root, step)
        noised = clock()
        main = release.statistic.main.name
        signal = float(np.linalg.norm(got.sums[main]))
        for name, values in got.sums.items():
            if name in noise:
                values += noise[name]
        means = mechanism.means(release, got.sums)
        learnt = mechanism.method.at.query.for_learner(state.query, means)
        parameters = state.parameters
        if all(name in learnt.values for name in mechanism.method.learner.takes):
            parameters = state.learning.update(parameters, learnt, step)
        query = mechanism.method.at.query.updated(state.query, means)
        updated = clock()
        self._record(step, parameters, got.facts)
        recorded = clock()
        state.parameters, state.query, state.completed = parameters, query, step + 1
        due = state.completed % self.config.train.eval_every == 0 or state.completed == self.mechanism.steps
        evaluated = self._evaluate() if due else {}
        samples = self._samples() if due else None
        timing |= {
            "combine": combined - began - timing.pop("ask"),
            "noise": noised - combined,
            "update": updated - noised,
            "ledger": recorded - updated,
            "evaluate": clock() - recorded,
            "total": clock() - began,
        }
        for name, value in timing.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value
        rate = state.learning.learning_rate(step)
        known = {**({} if rate is None else {"learning_rate": Public(rate)}), **evaluated}
        record = step_record(self.experiment, step, release, got.replies, signal, known, timing)
        return dataclasses.replace(record, samples=samples), evaluated

    def _record(self, step: int, parameters: Tensor, facts: Mapping[str, Public[Any]]) -> None:
        """Put the step into the ledger, before anybody sees what it releases.

        Raises:
            Diverged: the parameters are not finite.
            RunError: the step was released before with other bits under noise that is to stay secret.
        """
        book = self.run.ledger
        digest = checkpoint.parameters_sha256(parameters)
        fresh = book.append(
            step,
            self.mechanism.event_at(step),
            facts,
            parameters=digest,
        )
        if not fresh and book.record(step).parameters != digest:
            self._differs(step)
        # That a run stops here follows from the released parameters, so it tells no more than they do.
        for name, values in (("parameters", parameters), ("average", self.state.learning.average())):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise Diverged(
                    f"step {step}: the {name} after the update must be finite numbers and are not. "
                    f"{self._advice(step)} This step is in the ledger."
                )

    def _advice(self, step: int) -> str:
        """Say what to change where parameters leave the numbers."""
        rate = self.state.learning.learning_rate(step)
        largest = float(self.state.parameters.abs().max())
        if rate is None:
            return f"The largest parameter before the update was {largest:.3g}: start a new run."
        return (
            f"The learning rate was {rate:g}, the largest parameter before the update {largest:.3g}: lower "
            "optimizer.learning_rate and start a new run."
        )

    def _differs(self, step: int) -> None:
        """Say that a repeated step gave other bits than when it was first released."""
        why = (
            f"step {step} was released before the run was interrupted, and repeated it has other bits: "
            "nodes, engine settings, fedsim or the machine changed"
        )
        if self.config.privacy.noise_source == "secure":
            raise RunError(
                f"{why}. The two would differ by sums of private data without noise, so it is not released. "
                f"Resume with what the run had ({self.folder.config}); it may change after a checkpoint."
            )
        _log.warning("%s. It equals the first to rounding; result.json lists it.", why)
        self.state.differing.append(step)

    def _evaluate(self) -> Numbers:
        """Return the task's scores (of the averaged parameters when EMA is on) and epsilon so far."""
        set_flat(self.experiment.model, self.state.released())
        splits, dtype = self.experiment.splits, self.state.parameters.dtype
        held_out = bool(self.config.data.holdout_examples)
        with self._on_its_device():
            scores = scoring.scores_of(
                self.experiment.model, self.experiment.task, splits, dtype, held_out=held_out
            )
        if not self.mechanism.method.private:
            return scores
        epsilon = self.run.ledger.view().until(self.state.completed).epsilon()
        return {**scores, "epsilon": Public(epsilon.value), "n_delta": Public(epsilon.n_delta)}

    def _samples(self) -> Tagged[tuple[Sample, ...]] | None:
        """Return what the model that was evaluated last says, where its task says something in words."""
        if not self.experiment.task.speaks:
            return None  # the model stays where it is
        splits, dtype = self.experiment.splits, self.state.parameters.dtype
        held_out = bool(self.config.data.holdout_examples)
        with self._on_its_device():
            return samples_of(
                self.experiment.model, self.experiment.task, splits.test, dtype, held_out=held_out
            )

    def _on_its_device(self) -> contextlib.AbstractContextManager[None]:
        """Have the model where it is evaluated: the rest of the server's work is on the CPU."""
        return evaluate.on(self.experiment.model, evaluation_device(self.config.engine))

    def _save(self) -> None:
        self.run.save()
        self._keep_config()

    def _keep_config(self) -> None:
        """Write what was changed at resume, as soon as no step is left that was released without it."""
        if not self._config_kept and self.run.ledger.steps == self.state.completed:
            self.folder.write_config(self.config)
            self._config_kept = True

    def _draw_partition(self, board: TensorBoard) -> None:
        from fedsim.report import partition_picture  # imports matplotlib: only where a picture is drawn

        if self.config.monitor.public_only or self.state.completed:
            return
        train = self.experiment.splits.train
        strata = self.experiment.task.strata_of(train)
        if strata is None:
            return
        counts = self.experiment.partition.label_counts(strata, int(strata.max()) + 1)
        picture = partition_picture.as_image(partition_picture.figure(counts))
        board.image("labels_by_holder", Sensitive(picture))

    def _write_card(self, result: dict[str, Any]) -> None:
        """Write model.json, which is public, with what the ledger spent as far as that is."""
        sha256 = hashlib.sha256(self.folder.final.read_bytes()).hexdigest()
        card = model_card.card_of(
            self.config.model,
            self.experiment.model,
            self.config.task,
            self.experiment.task,
            self.experiment.splits.train,
            self.config.data.features,
            Choice(self.config.data.name, self.config.data.options),
        )
        hidden = {name.partition(".")[2] for name in result["sensitive"] if name.startswith("epsilon.")}
        spent_in_public = {unit: value for unit, value in result["epsilon"].items() if unit not in hidden}
        card = dataclasses.replace(card, weights_sha256=sha256, epsilon=spent_in_public)
        checkpoint.write_atomic(self.folder.card, card.to_json().encode())

    def _finish(self, final: Numbers, seconds: float) -> dict[str, Any]:
        """Write the model, destroy the secret, and only then write the result: a finished run has none."""
        set_flat(self.experiment.model, self.state.released())
        self.run.lock.check()
        checkpoint.save_model(self.folder.final, self.experiment.model)
        scores = {metric.name: final[metric.name] for metric in self.experiment.task.all_metrics}
        seconds_of = {**self._seconds, "run": seconds}
        so_far = spent(self.run.ledger.view(), self.experiment.facts)
        with self._on_its_device():
            result = outcome.result_of(self.experiment, self.state, scores, so_far, seconds_of, self._backend)
        self._write_card(result)
        self.run.destroy_secret()
        self.folder.write_result(result)
        return result
