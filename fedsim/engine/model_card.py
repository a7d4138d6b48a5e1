"""model.json: what a released model is, what it takes and what its outputs mean; all of it public.

With the weights beside it, prediction, export and audits need neither the private data nor the run's
configuration.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fedsim import __version__, given, merging, models, provenance, references
from fedsim.config import ModelConfig
from fedsim.data.examples import ArrayDataset
from fedsim.data.sources import SOURCES, Source
from fedsim.data.targets import Targets
from fedsim.merging import Choice
from fedsim.tasks import TASKS, Task
from fedsim.validate import InputError

FORMAT = 1


@dataclass(frozen=True)
class Card:
    """What model.json says.

    Attributes:
        model: name, options and dtype, as the configuration had them.
        task: of the run.
        targets: kind, size and names of what it predicts.
        example_shape: of one example as the model sees it.
        mean, std: of image channels, on the [0, 1] scale; empty for other inputs.
        vocabulary: of token inputs, or None.
        places: of token targets, or None.
        features: the map between images and what the model sees, or None.
        outputs: width of the model's output.
        fixed: what model.fix replaced, a line a layer.
        structure: digest of the layers and the code of a model from outside (`given.structure_of`), or empty.
        code: digest of the source of what is from outside among model, features, task and source, and of what
            it imports beside it (`provenance.reference_hash`), or empty.
        source: data.name and options, where `predict` can read inputs as the run read them; else None.
        weights_sha256: of the file beside it.
        epsilon: what the ledger spent, by unit, as in result.json.
        format, version: of this file, and of fedsim.
    """

    model: ModelConfig
    task: Choice
    targets: Targets
    example_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    vocabulary: int | None
    features: Choice | None
    outputs: int
    fixed: list[str] = field(default_factory=list)
    structure: str = ""
    places: int | None = None
    code: str = ""
    source: Choice | None = None
    weights_sha256: str = ""
    epsilon: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    version: str = __version__

    def to_json(self) -> str:
        """Return the content of model.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def made_task(self) -> Task:
        """The task."""
        return TASKS.make(self.task)

    def blank(self) -> ArrayDataset:
        """Return a data set of one blank example of the form that the model was trained on."""
        import numpy as np

        if self.vocabulary is not None:
            inputs = np.zeros((1, *self.example_shape), np.int64)
        elif self.mean:
            channels, height, width = self.example_shape
            inputs = np.zeros((1, height, width, channels), np.uint8)
        else:
            inputs = np.zeros((1, *self.example_shape), np.float32)
        places = self.example_shape if self.places is None else (self.places,)
        kinds = {"class": (1,), "tokens": (1, *places)}
        shape = kinds.get(self.targets.kind, (1, self.targets.size))
        targets = np.zeros(shape, np.float32 if self.targets.kind == "values" else np.int64)
        return ArrayDataset(
            "blank", inputs, targets, None, self.targets, self.mean, self.std, vocabulary=self.vocabulary
        )


def card_of(
    model: ModelConfig,
    trained: nn.Module,
    task: Choice,
    made: Task,
    train: ArrayDataset,
    features: Choice | None,
    source: Choice,
) -> Card:
    """Return the card of a run's model."""
    outside = references.is_reference(model.name)
    kept = {name: value for name, value in task.options.items() if name not in ("metrics", "headline")}
    read = source if _reads_inputs(source.name) else None
    return Card(
        model=dataclasses.replace(model, init_from=None, init_sha256=None, reset=[]),
        task=Choice(task.name, kept),
        targets=train.declared,
        example_shape=train.example_shape,
        mean=train.mean,
        std=train.std,
        vocabulary=train.vocabulary,
        places=train.targets.shape[1] if train.declared.kind == "tokens" else None,
        features=features,
        outputs=made.outputs(train.declared),
        fixed=list(models.fixed(trained)),
        structure=given.structure_of(trained) if outside else "",
        code=_code(model, features, task, read),
        source=read,
    )


def _code(*chosen: ModelConfig | Choice | None) -> str:
    """What is from outside of these, as it is now."""
    return provenance.reference_hash(*_outside(*chosen))


def _outside(*chosen: ModelConfig | Choice | None) -> list[str]:
    return [one.name for one in chosen if one is not None and references.is_reference(one.name)]


def _reads_inputs(source: str) -> bool:
    """Whether a source is a class that other processes have; a function from outside reads data at once."""
    found = None if given.is_given(source) else SOURCES.find(source)
    return isinstance(found, type) and issubclass(found, Source)


def read(path: Path) -> Card:
    """Return what a model.json says.

    Raises:
        InputError: no such file, or one that is not in this form.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise ValueError(f"format {held['format']}, this fedsim reads {FORMAT}")
        shape, mean, std = (tuple(held[name]) for name in ("example_shape", "mean", "std"))
        targets = Targets(held["targets"]["kind"], held["targets"]["size"], tuple(held["targets"]["names"]))
        chosen = {
            name: None if held[name] is None else Choice(held[name]["name"], held[name]["options"])
            for name in ("task", "features", "source")
        }
        model = merging.parse_options(held["model"], ModelConfig, "model")
        rest = {**chosen, "model": model, "targets": targets}
        return Card(**{**held, **rest, "example_shape": shape, "mean": mean, "std": std})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: expected the model.json of a finished run, got {type(error).__name__}: {error}."
        ) from error


def load_model(card: Card, weights: Path, model: nn.Module | None = None) -> nn.Module:
    """Return the released model in eval mode, on the CPU.

    Args:
        card: what model.json says.
        weights: the file beside it.
        model: the module to load into, where it was handed in from Python and cannot be made anew.

    Raises:
        InputError: weights that are not those of the card, or a model that cannot be made or does not fit.
    """
    content = weights.read_bytes() if weights.is_file() else b""
    if hashlib.sha256(content).hexdigest() != card.weights_sha256:
        raise InputError(f"{weights} must be the weights that model.json names, and is another file or gone.")
    if model is None:
        if given.is_given(card.model.name):
            try:
                given.get(card.model.name, "model.name")
            except InputError as error:
                raise InputError(
                    f"{weights.parent}: its model was handed in from Python. Hand it in again, as model=..."
                ) from error
        model = models.build(card.model, card.example_shape, card.outputs, 0, card.vocabulary)
    chosen = (card.model, card.features, card.task, card.source)
    if card.code != (now := _code(*chosen)):
        names = ", ".join(_outside(*chosen))
        raise InputError(
            f"{weights.parent}: the source of {names}, or of what it imports beside it, must be as it was "
            f"for the run: digest {card.code or 'none'}, and is {now or 'none'} now. Restore it."
        )
    if card.structure and given.structure_of(model) != card.structure:
        raise InputError(
            f"{weights.parent}: {card.model.name} must be the model that was trained, and its layers, its "
            "code, its hooks or what it keeps in attributes are others now. Restore its source, or hand in "
            "the same model as it was before it was called, as model=..."
        )
    try:
        model.load_state_dict(load_file(weights))
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{weights} does not fit the model: {error}") from error
    return model.eval().to(torch.device("cpu"))
