"""Examples without targets, read from files as a run read its data: what a finished model is asked about."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from fedsim import validate
from fedsim.data.sources import SOURCES, folders
from fedsim.engine.model_card import Card
from fedsim.validate import InputError

_log = logging.getLogger(__name__)


def read(card: Card, path: Path) -> tuple[list[str], Any]:
    """Return names and inputs (n, ...) of the examples in a file or folder.

    Args:
        card: what the model takes.
        path: a .npy array of examples; an image, or a folder of images, which get the shape that the model
            takes, where files that are no images are left out with a warning; or what the run's own source
            reads: a table, texts.

    Returns:
        Names are files, relative to a folder, or numbers of rows.

    Raises:
        InputError: nothing there, or what the model's data are not.
    """
    if not path.exists():
        raise InputError(f"examples to predict must be a file or folder, and {path} is not there.")
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} must be a .npy array of examples: {error}") from error
        return rows(array), array
    if not card.mean:
        if card.source is None:
            raise InputError(
                f"examples to predict must be a .npy array for a model of these data, got {path}: they came "
                "from Python or a function, and nothing tells how to read others."
            )
        return SOURCES.make(card.source).inputs(path)
    from fedsim.data.sources.image_files import pixels

    files = folders.files(path, "INPUT") if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} must hold images, and is empty.")
    options = {} if card.source is None else card.source.options
    fit, short = str(options.get("fit", "crop")), options.get("short_side")
    names: list[str] = []
    found: list[Any] = []
    for file in files:
        name = validate.printable(file.relative_to(path).as_posix() if path.is_dir() else file.name)
        try:
            found.append(pixels(file, card.example_shape, fit, short))
        except InputError as error:
            if not path.is_dir():
                raise
            _log.warning("left out: %s", error)
        else:
            names.append(name)
    if not found:
        raise InputError(f"{path} must hold images, and none of its {len(files)} files is one.")
    return names, np.stack(found)


def rows(array: Any) -> list[str]:
    """Return the names of examples that have none: their numbers, from 0."""
    return [str(row) for row in range(len(array))]
