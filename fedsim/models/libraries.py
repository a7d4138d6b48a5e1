"""What the families that come from libraries have in common: imports where used, names, given arguments."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from fedsim import validate
from fedsim.validate import InputError


def library(name: str, extra: str, setting: str) -> ModuleType:
    """Import an optional package.

    Args:
        name: of the package.
        extra: of ours that installs it.
        setting: what asks for it, for the message.

    Raises:
        InputError: it is not installed, or lacks what it needs itself; names the command that helps.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{setting} needs the package {name}, which cannot be imported: {error}. Run "
            f"pip install 'fedsim[{extra}]'."
        ) from error


def check_architecture(architecture: str | None, known: Collection[str], what: str, full_list: str) -> None:
    """Raise InputError unless `architecture` is `known`; libraries know too many to list all in a message."""
    if architecture not in known:
        near = validate.did_you_mean(str(architecture), known)
        raise InputError(
            f"model.options.architecture must be {what}, got {architecture!r}. "
            f"{near} {full_list} lists them.".replace("  ", " ")
        )


def check_free(given: Mapping[str, Any], taken: Mapping[str, str], where: str) -> None:
    """Raise InputError if arguments are given that something else decides: `taken`, name -> what does."""
    for name in given:
        if name in taken:
            validate.conflicts(f"{where}.{name} is {given[name]!r}, but {taken[name]}.", "Leave it out.")
