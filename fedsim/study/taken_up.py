"""Runs that were finished before: what they were made with, where a command asks for something else.

Settings that change no result may differ between a finished run and the command that takes it up. A record
then says those of the run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim import loading
from fedsim.config import FREE, Config
from fedsim.engine.run_folder import RunFolder
from fedsim.study.fixed import overlap

Settings = Mapping[str, Any]
NOT_RECORDED = "not recorded"
_OF_THE_TEXT = ("extends", "preset", "title", "reference")


def otherwise(folder: RunFolder, asked: Config) -> dict[str, Any]:
    """Return the settings, by dotted name, that a finished run was made with and `asked` has otherwise.

    What is left to the run (`auto`, or who may see its numbers) is as asked whatever it came to.

    Raises:
        InputError: the folder's configuration cannot be read.
    """
    if not folder.result.exists() or not folder.config.exists():
        return {}
    held, wanted = _free(loading.load(folder.config)), _free(asked)
    left_open = {"monitor.public_only"} if wanted["monitor.public_only"] is None else set()
    if wanted["engine.physical_batch_size"] == "auto":
        left_open |= {"engine.physical_batch_size", "engine.memory_limit"}
    return {name: held[name] for name in held if held[name] != wanted[name] and name not in left_open}


def of_run(given: Sequence[str], other: Settings) -> list[str]:
    """Return "key=value" strings as they hold for a run: those it was made with in place of others."""
    kept = [item for item in given if not any(_overlap(item, name) for name in other)]
    return kept + as_strings(other)


def of_all(given: Sequence[str], others: Sequence[Settings]) -> tuple[list[str], list[str]]:
    """Split "key=value" strings into those that hold for all runs, and those that do not; where all runs were
    made otherwise alike, the first have how."""
    lost = [item for item in given if any(_overlap(item, name) for other in others for name in other)]
    kept = [item for item in given if item not in lost]
    if others and all(other == others[0] for other in others):
        return kept + as_strings(others[0]), []
    return kept, lost


def as_strings(settings: Settings) -> list[str]:
    """Return settings as "key=value" strings."""
    return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items()]


def told(others: Mapping[str, Sequence[str]]) -> str:
    """Return the sentence that says which runs were finished before, and with what else than is asked now.

    Args:
        others: name of a run -> what it was made with, in words; runs made as asked have nothing.
    """
    whose: dict[str, list[str]] = {}
    for name, made in others.items():
        if made:
            whose.setdefault(", ".join(made), []).append(name)
    if not whose:
        return ""
    return (
        f"Finished before, otherwise than is asked now: {'; '.join(_group(*one) for one in whose.items())}."
    )


def _group(made: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{shown} ({made})"


def _overlap(item: str, name: str) -> bool:
    return overlap(item.partition("=")[0], name)


def _free(config: Config) -> dict[str, Any]:
    """The settings that change no result, by dotted name."""
    found: dict[str, Any] = {}
    for path in FREE:
        if path not in _OF_THE_TEXT:
            node: Any = dataclasses.asdict(config)
            for part in path.split("."):
                node = node[part]
            found |= {f"{path}.{k}": v for k, v in node.items()} if isinstance(node, dict) else {path: node}
    return found
