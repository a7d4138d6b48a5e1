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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dp_accounting as dp

from fedsim import validate
from fedsim.privacy import accountant, events
from fedsim.privacy.accountant import EpsilonResult
from fedsim.validate import InputError, RunError

VERSION = 1
_RESERVED = ("step", "event", "noise_multiplier", "sampling_rate", "chain")


@dataclass(frozen=True)
class LedgerHeader:
    """What the whole run states before its first step.

    Attributes:
        config_hash: `Config.digest()` of the run.
        delta: the delta its epsilon is stated for.
        unit: unit of the events, "example" or "holder".
        relation: neighbouring relation of the events.
        accountant: the accountant of the run's own reports.
        target_epsilon, stop_at_epsilon: the budget, if one was given.
        examples: number N of training examples used; treated as public.
        holders: number of holders.
        examples_per_holder_at_most: the declared cap, for the epsilon of a whole holder; None: there is none,
            and the size of the largest holder, being sensitive, is not written.
        holder_noise_factor: factor on the noise multipliers for a holder of several examples, where events
            bound single examples only.
        version: format of the file.
    """

    config_hash: str
    delta: float
    unit: str = "example"
    relation: str = accountant.RELATION
    accountant: str = "pld"
    target_epsilon: float | None = None
    stop_at_epsilon: float | None = None
    examples: int | None = None
    holders: int | None = None
    examples_per_holder_at_most: int | None = None
    holder_noise_factor: float = 1.0
    version: int = VERSION

    def __post_init__(self) -> None:
        if not 0.0 < self.delta < 1.0:
            raise InputError(f"delta must be above 0 and below 1, got {self.delta!r}.")
        validate.one_of(self.unit, accountant.UNITS, "unit")
        validate.one_of(self.relation, (accountant.RELATION,), "relation")
        validate.one_of(self.accountant, accountant.ACCOUNTANTS, "accountant")
        for name in ("examples", "holders", "examples_per_holder_at_most"):
            if (number := getattr(self, name)) is not None:
                validate.positive(number, name)
        validate.in_range(self.holder_noise_factor, 1e-6, 1.0, "holder_noise_factor")
        validate.one_of(self.version, (VERSION,), "ledger version")


@dataclass(frozen=True)
class LedgerRecord:
    """One step: its event, the two numbers of the event a reader looks for, and further public facts.

    `noise_multiplier` and `sampling_rate` are None where the event is not a single Gaussian release.
    """

    step: int
    event: dp.DpEvent
    noise_multiplier: float | None
    sampling_rate: float | None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LedgerView:
    """A checked ledger in memory."""

    header: LedgerHeader
    records: tuple[LedgerRecord, ...]

    @property
    def steps(self) -> int:
        """Return the number of recorded steps; the next step has this number."""
        return len(self.records)

    def total_event(self) -> dp.DpEvent:
        """Return the composition of all steps; equal consecutive events are counted, not repeated."""
        return events.sequence(record.event for record in self.records)

    def epsilon(self, accountant_name: str | None = None, delta: float | None = None) -> EpsilonResult:
        """Return the epsilon of everything recorded, in the header's unit."""
        name = self.header.accountant if accountant_name is None else accountant_name
        target = self.header.delta if delta is None else delta
        return self._stated(accountant.epsilon(self.total_event(), target, name, self.header.unit))

    def holder_epsilon(self, examples_of_holder: int, delta: float | None = None) -> EpsilonResult:
        """Return the epsilon of a whole holder with that many examples.

        Under holder-level events the number of examples does not matter and the result is `epsilon`'s.
        """
        target = self.header.delta if delta is None else delta
        if self.header.unit == "holder":
            return self.epsilon("pld", target)
        event = self.total_event()
        if examples_of_holder > 1 and self.header.holder_noise_factor != 1.0:
            event = events.with_noise(event, self.header.holder_noise_factor)
        return self._stated(accountant.holder_epsilon_of_event(event, target, examples_of_holder))

    def _stated(self, spent: EpsilonResult) -> EpsilonResult:
        units = self.header.examples if spent.unit == "example" else self.header.holders
        return spent if units is None else spent.among(units)


def read(path: str | Path) -> LedgerView:
    """Read and check a ledger, also while a run writes it; a torn last line is left out.

    The process that appends should use `Ledger.view`: reading the file there would drop its lock.

    Raises:
        InputError: the file is missing or damaged, with the line number.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a readable ledger. {error}") from error
    return _parse(Path(path), content)[0]


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
    def create(cls, path: str | Path, header: LedgerHeader) -> Ledger:
        """Start the ledger of a new run; the file and its header are on disk on return.

        Raises:
            InputError: the file exists already.
        """
        target = Path(path)
        body = asdict(header)
        chain = _link("", body)
        draft = target.with_name(f"{target.name}.{os.getpid()}.new")
        descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            _write_all(descriptor, _line({**body, "chain": chain}))
            os.fsync(descriptor)
            os.link(draft, target)  # unlike rename, fails if a ledger is there; never leaves half a header
        except FileExistsError as error:
            raise InputError(
                f"{target}: a ledger must not be there yet. Resume that run, or choose another output folder."
            ) from error
        finally:
            os.close(descriptor)
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
    def path(self) -> Path:
        """Return the file."""
        return self._path

    @property
    def steps(self) -> int:
        """Return the number of recorded steps; the next step has this number."""
        return len(self._records)

    def view(self) -> LedgerView:
        """Return what is recorded so far."""
        return LedgerView(self._header, tuple(self._records))

    def append(self, step: int, event: dp.DpEvent, facts: Mapping[str, Any] | None = None) -> bool:
        """Record the event of `step` and return True once it is on disk; only then release the step.

        A step that is already recorded (it was, when a resumed run repeats it) must carry an equal event;
        then nothing is written and False is returned.

        Args:
            facts: further public numbers or strings of the step; JSON values.

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
        record = _record(step, event, dict(facts or {}))
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


def _record(step: int, event: dp.DpEvent, facts: dict[str, Any]) -> LedgerRecord:
    taken = sorted(set(facts) & set(_RESERVED))
    if taken:
        raise InputError(f"facts of a step must not be named {', '.join(taken)}: the event says that.")
    found = events.releases(event)
    if len(found) == 1 and found[0].times == 1 and found[0].noise_multiplier > 0.0:
        return LedgerRecord(step, event, found[0].noise_multiplier, found[0].sampling_rate, facts)
    return LedgerRecord(step, event, None, None, facts)


def _body(record: LedgerRecord) -> dict[str, Any]:
    return {
        "step": record.step,
        "event": events.to_json(record.event),
        "noise_multiplier": record.noise_multiplier,
        "sampling_rate": record.sampling_rate,
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
    facts = {key: value for key, value in body.items() if key not in _RESERVED}
    return LedgerRecord(
        body["step"], events.from_json(body["event"]), body["noise_multiplier"], body["sampling_rate"], facts
    )


def _damaged(path: Path, number: int, reason: str) -> InputError:
    return InputError(
        f"{path}: line {number} of the ledger is damaged: {reason}. What the run released can no longer be "
        "proved from this file: restore it from a copy; do not resume without it."
    )
