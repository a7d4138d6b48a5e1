"""The folder of one run: what is in it, whose it is, and whether it can be continued."""

from __future__ import annotations

import fcntl
import glob
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim import loading, provenance
from fedsim.config import Config
from fedsim.engine import places
from fedsim.engine.checkpoint import write_atomic
from fedsim.privacy import ledger, secret
from fedsim.report.plain import as_json
from fedsim.validate import InputError, RunError

_log = logging.getLogger(__name__)


def default_name(config: Config, overrides: Sequence[str] = ()) -> str:
    """Return the name of a folder for a run that was told none: its title, what was set on top of it
    ("key=value" strings, without their sections), and its hash."""
    differs = [re.sub(r"^[^=]*\.", "", item) for item in overrides]
    return f"{'-'.join([_title(config), file_name('-'.join(differs), '')[:60]]).rstrip('-')}{_hash(config)}"


def default_folder(base: Path, config: Config, overrides: Sequence[str] = ()) -> Path:
    """Return the folder below `base` of a run that was told none: one of its title and hash that is there,
    however its settings were written then, so that a run is continued and not made twice; else a new one."""
    there = sorted(base.glob(f"{glob.escape(_title(config))}*{_hash(config)}"))
    return there[0] if there else base / default_name(config, overrides)


def _title(config: Config) -> str:
    return file_name(config.title, "run")


def _hash(config: Config) -> str:
    return f"-{config.digest()[:8]}"


def file_name(title: str, otherwise: str) -> str:
    """Return a title as one part of a path; `otherwise` where it is empty."""
    return re.sub(r"[^\w.=-]+", "_", title).lstrip(".")[:100] or otherwise


class RunFolder:
    """Paths of a run: configuration, ledger, metrics, checkpoints, event files, model and result.

    Links are followed once, here: a link that is turned elsewhere while a run goes on does not move it.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self.config = self.root / "config.yaml"
        self.ledger = self.root / "ledger.jsonl"
        self.metrics = self.root / "metrics.jsonl"
        self.result = self.root / "result.json"
        self.final = self.root / "final.safetensors"
        self.card = self.root / "model.json"
        self.checkpoints = self.root / "checkpoints"
        self.tensorboard = self.root / "tensorboard"
        self.samples = self.root / "samples.html"
        self.flower_log = self.root / "flower.log"
        self.lock = self.root / "lock"

    def expect(self, resume: bool) -> None:
        """Say so where somebody wants to resume a run that is not there: it may be in another folder."""
        if resume and not self.config.exists():
            _log.warning("%s holds no run to resume: a new one starts there.", self.root)

    def check(self, config: Config, resume: bool) -> None:
        """Refuse a folder of another configuration, or of a run that should be resumed; write nothing.

        Raises:
            InputError: says what the folder holds and how to go on.
        """
        if os.path.isfile(self.root):
            raise InputError(f"--out must be a folder, got the file {self.root}. Choose another --out.")
        if not os.path.isfile(self.result):  # a finished run writes nothing more
            remedy = "Choose another --out, or change its permissions or its disk"
            places.writable(self.root, "--out", remedy)
        if not self.config.exists():
            if self.root.is_dir() and any(self.ledger.parent.glob("*.jsonl")):
                raise InputError(f"{self.root} holds run files but no config.yaml. Choose another --out.")
            return
        held = loading.load(self.config)
        if held.digest() != config.digest():
            raise InputError(
                f"{self.root} belongs to another configuration: {_difference(held, config)}. "
                "Choose another --out, or run with the configuration in its config.yaml."
            )
        if config.monitor.public_only and not held.monitor.public_only:
            raise InputError(
                f"{self.root} holds a run that wrote sensitive numbers. Resume it with "
                "monitor.public_only=false, or choose another --out."
            )
        written = [path for path in (self.checkpoints, self.metrics) if path.exists()]
        if written and not self.ledger.exists():
            raise InputError(
                f"{self.root} has the {written[0].name} of a run, but its ledger.jsonl is gone: what was "
                "released is no longer known. Restore the ledger, or start anew in another --out."
            )
        if not resume:
            state = "a finished run" if self.result.exists() else "an unfinished run"
            raise InputError(
                f"{self.root} holds {state} of this configuration. Use --resume (from Python "
                "resume=True) or another --out."
            )

    def claim(self, config: Config, resume: bool) -> FolderLock:
        """Make the folder this process's, check it, and return the lock that keeps others out.

        Raises:
            InputError: as `check`, or another process has it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self)
        try:
            self.check(config, resume)
            if not self.config.exists():
                self.write_config(config)
        except BaseException:
            lock.close()
            raise
        return lock

    def write_config(self, config: Config) -> None:
        """Write config.yaml, unless it says the same already."""
        content = loading.to_yaml(config).encode()
        if not self.config.exists() or self.config.read_bytes() != content:
            write_atomic(self.config, content)

    def finished(self) -> dict[str, Any] | None:
        """Return the result of a finished run, or None. A finished run has no secret: one that was put back
        is destroyed."""
        if not self.result.exists():
            return None
        header = ledger.read_header(self.ledger)
        if header is not None and header.run:
            secret.destroy(header.run)
        try:
            result: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"{self.result} is damaged: {error}. Delete it; with --resume the run writes it again."
            ) from error
        return result

    def check_code(self, config: Config) -> None:
        """Refuse to take up a run, finished or not, that other code of one's own made under the same name.

        Raises:
            InputError: says that it changed.
        """
        header = ledger.read_header(self.ledger)
        if header is not None and header.code != provenance.reference_hash(*config.references()):
            raise InputError(
                f"{self.root} holds a run of other code of your own: {', '.join(config.references())}, or "
                "what it imports, has changed since. Choose another --out, or restore the code."
            )

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json; its presence means the run is finished."""
        write_atomic(self.result, (as_json(result, indent=2) + "\n").encode())


class FolderLock:
    """Keeps a second process out of a run's folder until it is closed, or the process is gone."""

    def __init__(self, folder: RunFolder) -> None:
        """
        Raises:
            InputError: another process has the folder.
        """
        self._folder = folder
        self._descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.check()
        except (OSError, RunError) as error:
            self.close()
            raise InputError(
                f"{folder.root} is in use by another process. Wait for that run, or stop it. ({error})"
            ) from error

    def check(self) -> None:
        """Raise RunError where the folder was removed or replaced since the lock was taken: what is there
        now is no longer this run's to write to."""
        try:
            there = os.path.samestat(os.stat(self._folder.lock), os.fstat(self._descriptor))
        except OSError:
            there = False
        if not there:
            raise RunError(
                f"{self._folder.root} was removed, renamed or replaced while its run went on. Nothing more "
                "is written; start a new run, or resume this one where it is now."
            )

    def close(self) -> None:
        """Let others in."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _difference(held: Config, wanted: Config) -> str:
    """Name the first settings in which two configurations differ."""
    a, b = _flat(held.defining()), _flat(wanted.defining())
    found = [
        f"{key} is {a.get(key)!r} there and {b.get(key)!r} here"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]
    return "; ".join(found[:3])


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {k: v for key, child in node.items() for k, v in _flat(child, f"{prefix}{key}.").items()}
