"""What is declared of the targets of a data set: public, while the targets themselves are private."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.validate import InputError, PrivateInputError

KINDS = ("class", "labels", "values", "tokens")
IGNORED = -100
"""Target token that counts neither in a loss nor in a metric, as torch has it."""

PADDING, BEGIN, END = 0, 1, 2
"""Tokens of a caption with a meaning of their own: what stands after it, before it, and where it ends."""


@dataclass(frozen=True)
class Targets:
    """The form of targets.

    Attributes:
        kind: "class": one of `size` classes, int64 (N,); "labels": any of `size` labels, uint8 (N, size) of 0
            and 1; "values": `size` real numbers, float32 (N, size); "tokens": one of `size` tokens a place,
            int64 (N, places), or IGNORED.
        size: declared, never counted: the targets are private, and the model's shape is not.
        names: of the classes, labels or values, or none.
    """

    kind: str
    size: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        validate.one_of(self.kind, KINDS, "kind of targets")
        validate.positive(self.size, f"number of {self.kind}")
        if self.names and len(self.names) != self.size:
            raise InputError(
                f"names of targets must be {self.size}, one for each as declared, got {len(self.names)}: "
                f"{', '.join(self.names)}. Name all of them, or none."
            )
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise InputError(f"names of targets must differ, got {twice[0]!r} twice. Rename one.")

    def checked(
        self, values: NDArray[Any], examples: int, where: str, as_they_are: bool = False
    ) -> NDArray[Any]:
        """Return targets in this form, as a read-only view or copy.

        Args:
            values: one target an example; integers of any width, booleans, floats, as the kind has it.
            examples: number of examples.
            where: name of the data set, for messages.
            as_they_are: classes keep the dtype they have, which may be small and mapped from a file.

        Raises:
            InputError: a wrong shape or dtype, or values that are not declared.
        """
        values = np.asarray(values)
        if self.kind in ("values", "labels") and values.ndim == 1:
            values = values[:, None]
        shape: tuple[int | None, ...] = {
            "class": (examples,),
            "labels": (examples, self.size),
            "values": (examples, self.size),
            "tokens": (examples, None),
        }[self.kind]
        kinds = {"values": "fiu", "labels": "biu"}.get(self.kind, "iu")
        fits = values.ndim == len(shape) and all(
            b in (None, a) for a, b in zip(values.shape, shape, strict=True)
        )
        if not fits or values.dtype.kind not in kinds:
            wanted = "numbers" if self.kind == "values" else "integers"
            raise InputError(
                f"{where}: targets must be {wanted} of shape {_shown(shape)}, got {values.dtype} of shape "
                f"{values.shape}. {self._remedy(values, examples)}"
            )
        if values.dtype.kind == "u" and values.size and int(values.max()) > np.iinfo(np.int64).max:
            raise InputError(f"{where}: targets must be integers below 2**63, got {values.dtype} above.")
        return _read_only(self._declared(values, where, as_they_are and self.kind == "class"))

    @property
    def said(self) -> str:
        """How many of what were declared, in words."""
        word = "class" if self.kind == "class" else self.kind.removesuffix("s")
        return f"{self.size} {word}" if self.size == 1 else f"{self.size} {word}{'e' * (word == 'class')}s"

    def _remedy(self, values: NDArray[Any], examples: int) -> str:
        """What to do about targets of another form, as far as they show what they are."""
        if self.kind == "class" and values.shape == (examples, self.size):
            return "Of one-hot rows take argmax(1); where several labels can hold at once, declare labels."
        if self.kind in ("class", "labels") and values.dtype.kind == "f":
            return "Convert them by astype(int64); numbers to predict are declared by values."
        return "Bring them to that form, or declare what they are: classes, labels, values or tokens."

    def _declared(self, values: NDArray[Any], where: str, as_they_are: bool) -> NDArray[Any]:
        if self.kind == "values":
            if not np.isfinite(values.astype(np.float32)).all():
                expected = f"{where}: targets must be finite in float32"
                raise PrivateInputError(f"{expected}. Mend or leave out such examples.", f"{expected}.")
            return values.astype(np.float32, copy=False)
        top = 1 if self.kind == "labels" else self.size - 1
        present = values[values != IGNORED] if self.kind == "tokens" else values
        if present.size and (present.min() < 0 or present.max() > top):
            word = {"class": "labels", "labels": "labels", "tokens": "target tokens"}[self.kind]
            expected = f"{where}: {word} must lie in 0 .. {top}"
            if self.kind != "labels":
                expected += f" (as many {'classes' if self.kind == 'class' else 'tokens'} are declared)"
            remedy = "Number them from 0, or declare as many as there can be."
            raise PrivateInputError(
                f"{expected}, got {present.min()} .. {present.max()}. {remedy}", f"{expected}. {remedy}"
            )
        if as_they_are:
            return values
        return values.astype(np.uint8 if self.kind == "labels" else np.int64, copy=False)


def class_words(classes: object) -> tuple[str, ...]:
    """Return the words of declared classes: those of a list, or 0 .. n - 1 of a number n; none where the
    declaration is neither, or repeats a word."""
    if isinstance(classes, int) and not isinstance(classes, bool):
        return tuple(map(str, range(classes)))
    found = tuple(map(str, classes)) if isinstance(classes, list) else ()
    return found if len(set(found)) == len(found) else ()


def _shown(shape: tuple[int | None, ...]) -> str:
    return (
        f"({', '.join('places' if size is None else str(size) for size in shape)}{',' * (len(shape) == 1)})"
    )


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()  # the caller's own array keeps its flag
    view.flags.writeable = False
    return view
