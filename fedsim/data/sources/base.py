"""A source of examples, and what others give in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.examples import Splits
from fedsim.data.targets import Targets
from fedsim.validate import InputError


@dataclass(frozen=True)
class Source(ABC):
    """Where examples come from; the fields are what `data.options` may set."""

    @abstractmethod
    def load(self, root: Path) -> Splits:
        """Return the training and the evaluation split.

        Args:
            root: data.root, absolute; files that options name start there.

        Raises:
            InputError: files missing or malformed; what is said of examples' content is a PrivateInputError.
        """

    def inputs(self, path: Path) -> tuple[list[str], Any]:
        """Return names and inputs (n, ...) of examples without targets, as `load` reads them.

        Raises:
            InputError: the source reads no such file, or one that does not fit.
        """
        raise InputError(f"{path} must be a .npy array of examples for a model of this data.")

    def assumed_public(self) -> tuple[str, ...]:
        """Return what the options declare of examples, or name, that is taken as public; the form of the
        targets, and vocabularies, are said by others."""
        return ()


@dataclass(frozen=True)
class Ready(Source):
    """Splits that are there already, as functions from outside return them."""

    splits: Splits

    def load(self, root: Path) -> Splits:
        """See `Source.load`."""
        return self.splits


def adapted(made: Any) -> Source | None:
    """Return what a function from outside gave as a source, where it gave splits."""
    if isinstance(made, Splits):
        return Ready(made)
    return None


def _declare(where: str) -> str:
    """How to declare classes, from Python or in a configuration."""
    return "Give classes=10, for example." if "." in where else "Set data.options.classes, for example."


def declared_one(where: str, **given: int | None) -> Targets:
    """Return the targets that exactly one of several options declares.

    Args:
        where: name of the source, for messages.
        given: options by name: classes, labels, values or tokens.

    Raises:
        InputError: none of them is set, or several.
    """
    kinds = {"classes": "class", "labels": "labels", "values": "values", "tokens": "tokens"}
    said = {name: size for name, size in given.items() if size is not None}
    if len(said) != 1:
        found = ", ".join(said) or "none"
        raise InputError(
            f"{where} must declare its targets by one of {', '.join(given)}, got {found}: classes there can "
            "be, labels an example can have, values it has, or tokens there are. What the targets hold is "
            f"private, and the model's shape is not. {_declare(where)}"
        )
    ((name, size),) = said.items()
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise InputError(
            f"{where}: {name} must be how many there can be, an integer above 0, got {size!r}. Their "
            "names are names=[...]."
        )
    return Targets(kinds[name], size)
