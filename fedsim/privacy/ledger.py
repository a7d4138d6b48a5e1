"""The ledger: an append-only record of what each step released, from which epsilon is always computed.

One JSON object per line. The first line is the header; then one line per step, numbered from 0 without
gaps. Every line carries `chain`, a hash over the previous line's `chain` and its own content, so damage,
loss, insertion or reordering of lines before the last is found. (It is no signature: who can write the file
can rewrite all of it. And lines missing at the very end look like a run that stopped earlier; the
checkpoint's step number finds that.)

A line is on disk (fsync) when `append` returns, and parameters are released only after that. A last line
without its newline is a step that was never released: resuming cuts it off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dp_accounting as dp

from fedsim.privacy import events
from fedsim.privacy.accountant import EpsilonResult
from fedsim.privacy.ledger_view import RESERVED, LedgerHeader, LedgerRecord, LedgerView
from fedsim.validate import InputError, RunError
from fedsim.visibility import Public


def read(path: str | Path) -> LedgerView:
    """Read and check a ledger, also while a run writes it; a torn last line is left out.

    The process that appends should use `Ledger.view`: reading the file there would drop its lock.

    Raises:
        InputError: the file is missing or damaged, with the line number.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"{path} must be a ledger or the folder of a run, which has a ledger.jsonl, and is not there. "
            "Name what --out named; without it, a folder below runs/."
        ) from error
    except OSError as error:
        raise InputError(f"{path}: expected a readable ledger. {error}") from error
    return _parse(Path(path), content)[0]


def digest_of(header: LedgerHeader) -> bytes:
    """Return the SHA-256 of a header, 32 bytes: what secret and checkpoints of the run carry of it."""
    return hashlib.sha256(_canonical(asdict(header)).encode()).digest()


def read_header(path: str | Path) -> LedgerHeader | None:
    """Return the header of a ledger, or None where there is none or its line is not whole.

    Raises:
        InputError: the line is damaged.
    """
    try:
        with open(path, "rb") as handle:
            line = handle.readline()
    except FileNotFoundError:
        return None
    return _parse(Path(path), line)[0].header if line.endswith(b"\n") else None


def draft_path(path: str | Path) -> Path:
    """Return where the header of a ledger lies before the ledger is there."""
    return Path(path).with_name(f"{Path(path).name}.new")


class Ledger:
    """The ledger of a running process: open for appending, locked against a second process."""

    def __init__(self, path: Path, view: LedgerView, chain: str, descriptor: int) -> None:
        """Use `create` or `open_for_resume`."""
        self._path = path
        self._header = view.header
        self._records = list(view.records)
        self._chain = chain
        self._descriptor = descriptor

    @classmethod
    def create(
        cls, path: str | Path, header: LedgerHeader, seal: Callable[[bytes], None] | None = None
    ) -> Ledger:
        """Start the ledger of a new run; the file and its header are on disk on return.

        Args:
            seal: called with `digest_of(header)` once the header is on disk as a draft, and before it becomes
                the ledger: makes what the header commits to. Where the process dies in between, the
                header is found at `draft_path`.

        Raises:
            InputError: the file exists already.
        """
        target = Path(path)
        body = asdict(header)
        chain = _link("", body)
        draft = draft_path(target)
        descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            _write_all(descriptor, _line({**body, "chain": chain}))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _sync_folder(target.parent)
        if seal is not None:
            seal(digest_of(header))
        try:
            os.link(draft, target)  # unlike rename, fails if a ledger is there; never leaves half a header
        except FileExistsError as error:
            raise InputError(
                f"{target}: a ledger must not be there yet. Resume that run, or choose another output folder."
            ) from error
        finally:
            os.unlink(draft)
        _sync_folder(target.parent)
        return cls(target, LedgerView(header, ()), chain, _open_locked(target))

    @classmethod
    def open_for_resume(cls, path: str | Path, config_hash: str | None = None) -> Ledger:
        """Open the ledger of an interrupted run; a torn last line is cut off.

        Args:
            config_hash: if given, the header must carry it.

        Raises:
            InputError: the file is missing or damaged (with line number and remedy), belongs to another
                configuration, or is in use by another process.
        """
        target = Path(path)
        if not target.is_file():
            raise InputError(f"{target}: a ledger must be there to resume from, but there is no such file.")
        descriptor = _open_locked(target)
        try:
            size = os.fstat(descriptor).st_size
            view, chain, good_bytes = _parse(target, os.pread(descriptor, size, 0))
            if config_hash is not None and view.header.config_hash != config_hash:
                raise InputError(
                    f"{target}: the ledger belongs to config {view.header.config_hash}, this one is "
                    f"{config_hash}. Resume with the run's own configuration, or start in another folder."
                )
            if size > good_bytes:
                os.ftruncate(descriptor, good_bytes)
                os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(target, view, chain, descriptor)

    @property
    def header(self) -> LedgerHeader:
        """Return the header."""
        return self._header

    @property
    def steps(self) -> int:
        """Return the number of recorded steps; the next step has this number."""
        return len(self._records)

    def view(self) -> LedgerView:
        """Return what is recorded so far."""
        return LedgerView(self._header, tuple(self._records))

    def record(self, step: int) -> LedgerRecord:
        """Return what is recorded of a step."""
        return self._records[step]

    def append(
        self,
        step: int,
        event: dp.DpEvent,
        facts: Mapping[str, Public[Any]] | None = None,
        parameters: str | None = None,
    ) -> bool:
        """Record the event of `step` and return True once it is on disk; only then release the step.

        A step that is already recorded (it was, when a resumed run repeats it) must carry an equal event;
        then nothing is written and False is returned.

        Args:
            facts: further numbers or strings of the step, public; JSON values.
            parameters: see `LedgerRecord`.

        Raises:
            RunError: a gap, a different event for a recorded step, or the line could not be written; the
                file then still ends with the last whole line.
            InputError: an event of an unknown kind or a reserved or non-JSON fact.
        """
        if step < self.steps:
            if self._records[step].event != event:
                raise RunError(
                    f"{self._path}: step {step} was recorded as {events.to_json(self._records[step].event)}, "
                    f"now it would be {events.to_json(event)}. A resumed run must repeat its steps exactly: "
                    "resume with the same configuration and data."
                )
            return False
        if step > self.steps:
            raise RunError(
                f"{self._path}: the next step must be {self.steps}, got {step}; none may be left out."
            )
        record = LedgerRecord.of(step, event, facts, parameters)
        body = _body(record)
        chain = _link(self._chain, body)
        size = os.fstat(self._descriptor).st_size
        try:
            _write_all(self._descriptor, _line({**body, "chain": chain}))
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, size)
            raise RunError(
                f"{self._path}: step {step} could not be recorded and was not released. {error}. "
                "Make room or repair the disk, then resume."
            ) from error
        self._records.append(record)
        self._chain = chain
        return True

    def epsilon(self, accountant_name: str | None = None) -> EpsilonResult:
        """Return the epsilon of everything recorded so far."""
        return self.view().epsilon(accountant_name)

    def close(self) -> None:
        """Release the file; further appends fail."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _body(record: LedgerRecord) -> dict[str, Any]:
    return {
        "step": record.step,
        "event": events.to_json(record.event),
        "noise_multiplier": record.noise_multiplier,
        "sampling_rate": record.sampling_rate,
        "parameters": record.parameters,
        **record.facts,
    }


def _canonical(body: Mapping[str, Any]) -> str:
    try:
        return json.dumps(body, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"a ledger line must hold finite numbers and strings, got {body!r}. {error}"
        ) from error


def _link(previous: str, body: Mapping[str, Any]) -> str:
    text = f"{previous}\n{_canonical(body)}".encode()
    return hashlib.blake2b(text, digest_size=16, person=b"fedsim-ledger-1").hexdigest()


def _line(body: Mapping[str, Any]) -> bytes:
    return (_canonical(body) + "\n").encode()


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # per process: gone with it, not inherited
    except OSError as error:
        os.close(descriptor)
        raise InputError(
            f"{path}: the ledger is in use by another process. Wait for that run, or stop it. ({error})"
        ) from error
    return descriptor


def _parse(path: Path, content: bytes) -> tuple[LedgerView, str, int]:
    """Return (view, chain of the last line, bytes of the whole lines)."""
    good_bytes = content.rfind(b"\n") + 1
    lines = content[:good_bytes].split(b"\n")[:-1]
    if not lines:
        raise InputError(f"{path}: expected a ledger header in line 1, got none. Start the run again.")
    chain = ""
    header: LedgerHeader | None = None
    records: list[LedgerRecord] = []
    for number, line in enumerate(lines, start=1):
        body, chain = _check_line(path, number, line, chain)
        try:
            if header is None:
                header = LedgerHeader(**body)
            else:
                records.append(_to_record(body, len(records)))
        except (TypeError, KeyError, InputError) as error:
            raise _damaged(path, number, str(error)) from error
    assert header is not None
    return LedgerView(header, tuple(records)), chain, good_bytes


def _check_line(path: Path, number: int, line: bytes, previous: str) -> tuple[dict[str, Any], str]:
    try:
        body = json.loads(line)
    except ValueError as error:
        raise _damaged(path, number, f"not JSON ({error})") from error
    if not isinstance(body, dict) or "chain" not in body:
        raise _damaged(path, number, "no chain")
    chain = body.pop("chain")
    if any(isinstance(value, float) and not math.isfinite(value) for value in body.values()):
        raise _damaged(path, number, "a number is not finite")
    if chain != _link(previous, body):
        raise _damaged(path, number, "its content does not fit its chain")
    return body, chain


def _to_record(body: dict[str, Any], expected_step: int) -> LedgerRecord:
    if body["step"] != expected_step:
        raise InputError(f"step must be {expected_step}, got {body['step']!r}.")
    return LedgerRecord(
        body["step"],
        events.from_json(body["event"]),
        body["noise_multiplier"],
        body["sampling_rate"],
        {key: value for key, value in body.items() if key not in RESERVED},
        body["parameters"],
    )


def _damaged(path: Path, number: int, reason: str) -> InputError:
    return InputError(
        f"{path}: line {number} of the ledger is damaged: {reason}. What the run released can no longer be "
        "proved from this file: restore it from a copy; do not resume without it."
    )
