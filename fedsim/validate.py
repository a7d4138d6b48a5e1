"""Errors a person can act on, and the small checks that raise them.

Every message says what was expected, the name, the value that came, and what to change.
"""

from __future__ import annotations

import difflib
import math
import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any


def printable(text: str, kept: str = "") -> str:
    """Return a text with what a terminal takes as an order (control characters, changes of direction, bytes
    that are no text) written as an escape, such as "\\x1b"; names of files may hold them.

    Args:
        text: any.
        kept: signs that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        sign.encode("unicode_escape").decode()
        if sign not in kept and (unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or sign in _TURNING)
        else sign
        for sign in text
    )


_TURNING = "\u061c\u200e\u200f" + "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))


class FedsimError(Exception):
    """Base of all errors fedsim raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message), "\n\t"))


class InputError(FedsimError, ValueError):
    """The configuration, a file or a command-line value is wrong; nothing was started or changed."""

    exit_code = 2


class PrivateInputError(InputError):
    """Examples are wrong, and the message says how; `public` says what is expected, and nothing they hold."""

    def __init__(self, message: str, public: str) -> None:
        super().__init__(message)
        self.public = printable(public, "\n\t")


def with_place(error: InputError, before: str = "", after: str = "") -> InputError:
    """Return the same error with where it was found, before or after its message."""
    if isinstance(error, PrivateInputError):
        return PrivateInputError(f"{before}{error}{after}", f"{before}{error.public}{after}")
    return InputError(f"{before}{error}{after}")


class RunError(FedsimError, RuntimeError):
    """A run that had started could not go on; what it wrote is intact and can be resumed."""

    exit_code = 3


class Diverged(RunError):
    """The parameters of a run are no finite numbers any more: other settings are needed."""


@contextmanager
def failures_as(kind: type[FedsimError], what: str, remedy: str) -> Iterator[None]:
    """Turn what the machine refuses within the block (disk, permissions, ports, memory) into `kind`.

    The message says `what` happened, the machine's own words, and the `remedy`; our own errors pass.
    """
    try:
        yield
    except FedsimError:
        raise
    except (OSError, MemoryError) as error:
        raise kind(f"{what}: {str(error) or type(error).__name__}. {remedy}") from error


def _fail(expected: str, name: str, value: Any, remedy: str) -> None:
    hint = f" {remedy}" if remedy else ""
    raise InputError(f"{name} must be {expected}, got {value!r}.{hint}")


def positive(value: float, name: str, remedy: str = "") -> None:
    """Raise InputError unless `value` is a finite number above zero."""
    if not (isinstance(value, Real) and math.isfinite(value) and value > 0):
        _fail("a positive finite number", name, value, remedy)


def in_range(value: float, low: float, high: float, name: str, remedy: str = "") -> None:
    """Raise InputError unless low <= value <= high."""
    if not (isinstance(value, Real) and low <= value <= high):
        _fail(f"between {low:g} and {high:g}", name, value, remedy)


def one_of(value: Any, allowed: Iterable[Any], name: str) -> None:
    """Raise InputError unless `value` is among `allowed`; the nearest allowed value is suggested."""
    choices = list(allowed)
    if value not in choices:
        _fail(f"one of {', '.join(map(str, choices))}", name, value, did_you_mean(str(value), choices))


def path(value: Any, name: str) -> Path:
    """Return a path; raise InputError where `value` is none."""
    if not isinstance(value, str | os.PathLike):
        _fail("a path", name, value, "")
    return Path(value)


def conflicts(problem: str, remedy: str) -> None:
    """Raise InputError for settings that are each valid but not together."""
    raise InputError(f"{problem} {remedy}")


def did_you_mean(word: str, candidates: Collection[Any]) -> str:
    """Return "Did you mean 'x'?" for the candidate nearest to `word`, or an empty string."""
    names = [str(c) for c in candidates]
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if not near:  # a dotted path whose last part is right, or a part of one
        tails = {n.rsplit(".", 1)[-1]: n for n in names}
        near = [tails[t] for t in difflib.get_close_matches(word.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)]
    return f"Did you mean '{near[0]}'?" if near else ""


def near(word: str, candidates: Collection[str], most: int = 4) -> str:
    """Return "Did you mean 'x'?" of a candidate that is nearly `word`, else "Near names: x, y." of the
    nearest, whole or by the last part of a path; an empty string where none is."""
    if sure := difflib.get_close_matches(word, candidates, n=1, cutoff=0.8):
        return f"Did you mean '{sure[0]}'?"
    found = difflib.get_close_matches(word, candidates, n=most, cutoff=0.6)
    last = word.rsplit("/", 1)[-1]
    by_tail = {
        name: difflib.SequenceMatcher(None, last, name.rsplit("/", 1)[-1]).ratio() for name in candidates
    }
    found += [name for name in sorted(by_tail, key=lambda name: -by_tail[name]) if by_tail[name] >= 0.75]
    names = list(dict.fromkeys(found))[:most]
    return f"Near names: {', '.join(names)}." if names else ""
