"""The folder of one run: what is in it, whose it is, and whether it can be continued."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from fedsim import config as configs
from fedsim.config import Config
from fedsim.engine import places
from fedsim.engine.checkpoint import write_atomic
from fedsim.report.plain import as_json
from fedsim.validate import InputError


def default_name(config: Config) -> str:
    """Return the name of a folder for a run that was told none: its title as a file name, and its hash."""
    return f"{file_name(config.title, 'run')}-{config.digest()[:8]}"


def file_name(title: str, otherwise: str) -> str:
    """Return a title as one part of a path; `otherwise` where it is empty."""
    return re.sub(r"[^\w.-]+", "_", title).lstrip(".")[:100] or otherwise


class RunFolder:
    """Paths of a run: configuration, ledger, metrics, checkpoints, event files, weights and result."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.config = self.root / "config.yaml"
        self.ledger = self.root / "ledger.jsonl"
        self.metrics = self.root / "metrics.jsonl"
        self.result = self.root / "result.json"
        self.final = self.root / "final.safetensors"
        self.checkpoints = self.root / "checkpoints"
        self.tensorboard = self.root / "tensorboard"
        self.flower_log = self.root / "flower.log"

    def check(self, config: Config, resume: bool) -> None:
        """Refuse a folder of another configuration, or of a run that should be resumed; write nothing.

        Raises:
            InputError: says what the folder holds and how to go on.
        """
        if not os.path.isfile(self.result):  # a finished run writes nothing more
            places.check(config, self.root)
        if not self.config.exists():
            if self.root.is_dir() and any(self.ledger.parent.glob("*.jsonl")):
                raise InputError(f"{self.root} holds run files but no config.yaml. Choose another --out.")
            if self.root.exists() and not self.root.is_dir():
                raise InputError(f"--out must be a folder, got the file {self.root}.")
            return
        held = configs.load(self.config)
        if held.digest() != config.digest():
            raise InputError(
                f"{self.root} belongs to another configuration: {_difference(held, config)}. "
                "Choose another --out, or run with the configuration in its config.yaml."
            )
        if not resume:
            state = "a finished run" if self.result.exists() else "an unfinished run"
            raise InputError(
                f"{self.root} holds {state} of this configuration. Use --resume or another --out."
            )

    def claim(self, config: Config, resume: bool) -> None:
        """Check the folder and make it this run's."""
        self.check(config, resume)
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            write_atomic(self.config, configs.to_yaml(config).encode())

    def finished(self) -> dict[str, Any] | None:
        """Return the result of a finished run, or None."""
        if not self.result.exists():
            return None
        try:
            result: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"{self.result} is damaged: {error}. Delete it; with --resume the run writes it again."
            ) from error
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json; its presence means the run is finished."""
        write_atomic(self.result, (as_json(result, indent=2) + "\n").encode())


def _difference(held: Config, wanted: Config) -> str:
    """Name the first settings in which two configurations differ."""
    a, b = _flat(json.loads(held.to_json())), _flat(json.loads(wanted.to_json()))
    ignored = ("engine.", "monitor.", "reference", "title", "extends")
    found = [
        f"{key} is {a.get(key)!r} there and {b.get(key)!r} here"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not key.startswith(ignored)
    ]
    return "; ".join(found[:3])


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {k: v for key, child in node.items() for k, v in _flat(child, f"{prefix}{key}.").items()}
