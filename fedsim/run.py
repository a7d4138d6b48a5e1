"""A finished run: its model, what it scored, what it spent; and predictions by its model."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim import loading, validate
from fedsim.config import Config
from fedsim.data import features
from fedsim.data.examples import ArrayDataset, normalise, wanted
from fedsim.data.handed import as_array
from fedsim.data.sources.arrays import finite
from fedsim.engine import inputs as reading
from fedsim.engine import model_card
from fedsim.engine.metrics import numbers_of, read_steps
from fedsim.engine.model_card import Card
from fedsim.engine.run_folder import RunFolder
from fedsim.headline import Metric
from fedsim.privacy import ledger
from fedsim.privacy.ledger_view import LedgerView
from fedsim.tasks import Task
from fedsim.validate import InputError

BATCH = 500


@dataclass(frozen=True)
class Predictions:
    """What a model says of examples.

    Attributes:
        outputs: (n, ...) float32: probabilities of classes; of labels, each for itself; values in their own
            unit; log-probabilities of the next token a place.
        best: (n, ...) the class or token of highest probability; 0 or 1 a label; the values themselves.
        names: of the classes, labels or values; empty where none were declared.
        examples: (n,) names of the examples: files, relative to their folder, or numbers of rows.
    """

    outputs: NDArray[np.float32]
    best: NDArray[Any]
    names: tuple[str, ...]
    examples: tuple[str, ...] = ()


class Run:
    """A finished run in its folder.

    Args:
        folder: as `fedsim run --out`.
        model, task: what was handed in from Python to another process: the module that it trained, and a task
            of one's own.

    Raises:
        InputError: no finished run there, or what is no model or task.
    """

    def __init__(self, folder: str | Path, model: nn.Module | None = None, task: Task | None = None) -> None:
        paths = RunFolder(validate.path(folder, "folder of the run"))
        for what, given, kind in (("model", model, nn.Module), ("task", task, Task)):
            if given is not None and not isinstance(given, kind):
                raise InputError(
                    f"{what} must be the object that the run was given, a {kind.__name__}, got {given!r}. A "
                    "run whose parts have names needs none."
                )
        if not paths.result.exists():
            begun = paths.config.exists()
            found = (
                "has no result.json. Finish it by the same command with --resume, or from Python by the same "
                f"fedsim.train(..., out={str(paths.root)!r}, resume=True)."
                if begun
                else "holds no run."
            )
            where = "" if begun else " Its path is what --out was, or what the run named as its folder."
            raise InputError(f"{paths.root} must be the folder of a finished run, and {found}{where}")
        self.folder = paths.root
        self._paths = paths
        self._given, self._task = model, task

    @functools.cached_property
    def result(self) -> dict[str, Any]:
        """The content of result.json."""
        result: dict[str, Any] = json.loads(self._paths.result.read_text(encoding="utf-8"))
        return result

    @functools.cached_property
    def config(self) -> Config:
        """The configuration, all defaults included."""
        return loading.load(self._paths.config)

    @functools.cached_property
    def card(self) -> Card:
        """What model.json says of the model."""
        return model_card.read(self._paths.card)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The released model, on the CPU, in eval mode."""
        return model_card.load_model(self.card, self._paths.final, self._given)

    @property
    def task(self) -> Task:
        """What the model was trained for."""
        return self.card.made_task if self._task is None else self._task

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The numbers of every step, "step" among them, oldest first."""
        return [{"step": line["step"], **numbers_of(line)} for line in read_steps(self._paths.metrics)]

    def history(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the steps at which a number was written, and its values, to plot for instance.

        Args:
            name: as in `metrics`: the headline's or another metric's of the task, "loss", "epsilon",
                "learning_rate", "train_loss" and so on.

        Returns:
            (steps, values), each (n,), oldest first; NaN where a value is not defined or not finite.

        Raises:
            InputError: the run wrote no number of that name; says which there are.
        """
        lines = self.metrics
        found = [(line["step"], line[name]) for line in lines if name in line]
        if not found or name == "step":
            known = {key for line in lines for key in line if not key.startswith("seconds/")} - {"step"}
            validate.one_of(name, sorted(known), "name")
        steps, values = zip(*found, strict=True)
        return np.array(steps, np.int64), np.array(values, np.float64)

    @property
    def ledger(self) -> LedgerView:
        """What was released, step by step; every epsilon follows from it."""
        return ledger.read(self._paths.ledger)

    @property
    def epsilon(self) -> float | None:
        """Epsilon in the run's own unit, by its accountant, at `delta`; None where none is claimed.

        `result["epsilon"]` has that of the other unit and the check by another accountant too, each with
        delta, relation and accountant.
        """
        spent = self.result["epsilon"].get(self.result["trust"]["unit"])
        return None if spent is None else spent["value"]

    @property
    def delta(self) -> float:
        """The delta of `epsilon`."""
        return self.config.privacy.delta

    @property
    def headline(self) -> Metric:
        """The metric that the task is judged by."""
        return Metric.of(self.result)

    @property
    def score(self) -> float:
        """The headline metric of the released model on the evaluation split.

        Raises:
            InputError: the run did not write it: its evaluation split is private, and monitor.public_only is
                set.
        """
        if (said := self.result.get(self.headline.name)) is None:
            name = self.headline.name
            if name in self.result:
                raise InputError(
                    f"{name} of {self.folder} must be a finite number to be a score, and was none on the "
                    "evaluation split. Choose another task.options.headline, or mend what gives it."
                )
            raise InputError(
                f"{self.folder} must hold {name} for there to be a score, and does not: the run wrote public "
                "numbers only, and what is computed from held-out private examples is none. Evaluate on the "
                "test set (data.holdout_examples=0), or set monitor.public_only=false."
            )
        return float(said)

    def predict(self, inputs: Any) -> Predictions:
        """Return what the model says of inputs; see `fedsim.predict`."""
        return predict(self, inputs)

    def __repr__(self) -> str:
        """Name the folder, the score and what it cost."""
        said = self.result.get(self.headline.name)
        missing = "not finite" if self.headline.name in self.result else "withheld"
        score = missing if said is None else f"{said:.4g}"
        return f"Run({str(self.folder)!r}, {self.headline.name}={score}, epsilon={self.epsilon})"


def predict(run: Run | str | Path, inputs: Any) -> Predictions:
    """Return what the released model of a run says of inputs.

    Args:
        run: a run, or its folder.
        inputs: (n, ...) as the training inputs were before normalisation and feature maps: uint8 images
            (n, H, W, C), or tensors (n, C, H, W) of bytes; features; tokens. Or the path of a file or folder
            with them, read as the run read its data: an image, a folder of images, a table, texts, a .npy
            array.

    Raises:
        InputError: inputs of another form than the model was trained on; says which.
    """
    run = run if isinstance(run, Run) else Run(run)
    card, model, names = run.card, run.model, None
    if isinstance(inputs, str | Path):
        names, inputs = reading.read(card, Path(inputs))
    data = _as_trained(card, inputs)
    dtype = next(model.parameters()).dtype
    found: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(data), BATCH):
            own = slice(start, start + BATCH)
            some, _ = data.read(own)
            inputs, blank = normalise(some, data, dtype), wanted(data.wanted_of(own), dtype)
            found.append(run.task.answered(model, inputs, blank).float())
    return _said(card, run.task, torch.cat(found), tuple(names or reading.rows(data)))


def _as_trained(card: Card, inputs: Any) -> ArrayDataset:
    """Return inputs in the form that the model was trained on, with blank targets."""
    blank = card.blank()
    array = as_array(inputs, "inputs")
    if not array.ndim:
        raise InputError(
            f"inputs must be examples (n, ...), or the path of a file or folder, got {type(inputs).__name__}."
        )
    shape: tuple[int, ...] | None = blank.inputs.shape[1:]
    if isinstance(inputs, Tensor) and array.dtype == np.uint8 and array.ndim == 4:
        array = np.moveaxis(array, 1, -1)
    if card.features is not None:
        array, shape = features.of_images(card.features, array), None
    kind = blank.inputs.dtype.kind
    if not len(array) or (shape is not None and array.shape[1:] != shape) or not _kinds_fit(array, kind):
        wanted_shape = "images" if shape is None else f"shape (n, {', '.join(map(str, shape))})"
        one = shape is not None and array.shape == shape
        raise InputError(
            f"inputs must be at least one example, {blank.inputs.dtype} of {wanted_shape}, as the model was "
            f"trained on, got {array.dtype} of shape {array.shape}. "
            + ("A single example x is x[None]." if one else "Bring them to that form.")
        )
    if array.dtype.kind == "f":
        finite(array, "inputs")
    rows = np.zeros(len(array), np.int64)
    return ArrayDataset(
        "inputs",
        array,
        blank.targets[rows],
        None,
        card.targets,
        card.mean,
        card.std,
        vocabulary=card.vocabulary,
    )


def _kinds_fit(array: NDArray[Any], kind: str) -> bool:
    return array.dtype == np.uint8 if kind == "u" else array.dtype.kind in ("iu" if kind == "i" else "f")


def _said(card: Card, task: Task, outputs: Tensor, examples: tuple[str, ...]) -> Predictions:
    kind = card.targets.kind
    if kind == "labels":
        shown, best = outputs.sigmoid(), (outputs > 0).to(torch.uint8)
    elif kind == "values":
        shown = task.predicted(outputs)
        best = shown
    elif kind == "tokens":
        shown = outputs.log_softmax(-1)
        best = shown.argmax(-1)
    else:
        shown = outputs.softmax(1)
        best = shown.argmax(1)
    return Predictions(shown.numpy(), best.numpy(), card.targets.names, examples)
