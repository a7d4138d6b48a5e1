"""Pictures of a data set that are decoded when somebody asks: what stands in the place of an array of images.

To everybody else they are (N, edge, edge, 3) uint8, of which rows can be read. A picture that cannot be
decoded keeps its place: whoever reads it is told so (`whole`), and its example contributes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsim.augmentations.base import Part, Words
from fedsim.data.chosen import Chosen, Rows
from fedsim.data.pictures import workers as threads
from fedsim.data.pictures.decode import Encoded, Picture
from fedsim.data.pictures.shown import Undecodable
from fedsim.data.pictures.stores import Store
from fedsim.validate import printable

Read = tuple[NDArray[np.uint8], NDArray[np.bool_]]
Cut = Callable[[Picture], NDArray[np.uint8]]
Result = TypeVar("Result")

TOLD = 100
"""Reasons that are kept why pictures cannot be decoded."""


class Frames(Protocol):
    """Pictures by place, 0 .. N - 1, in whatever form they are kept."""

    def __len__(self) -> int: ...

    def open(self, place: int) -> Picture:
        """Return one.

        Raises:
            Undecodable: its bytes are no picture.
            RunError: they cannot be read.
        """
        ...

    def name(self, place: int) -> str:
        """Return what to call one in a message."""
        ...

    @property
    def fingerprints(self) -> NDArray[np.uint8]:
        """(N, 16) digests of the bytes of every file."""
        ...

    @property
    def how(self) -> str:
        """What pixels follow from beside the files, in words."""
        ...

    @property
    def known(self) -> tuple[int, str]:
        """How many are known to be undecodable before any is drawn, and how that is known."""
        ...


@dataclass(frozen=True, eq=False)
class InFiles:
    """Pictures as they lie in files; at most `most_pixels` each are decoded."""

    store: Store
    most_pixels: int

    def __len__(self) -> int:
        return len(self.store)

    def open(self, place: int) -> Picture:
        """See `Frames.open`."""
        content = self.store.read(place)
        if not content:
            raise Undecodable("must be a readable image, and is empty")
        return Encoded(content, self.most_pixels)

    def name(self, place: int) -> str:
        """See `Frames.name`."""
        return self.store.name(place)

    @property
    def fingerprints(self) -> NDArray[np.uint8]:
        """See `Frames.fingerprints`."""
        return self.store.fingerprints

    @property
    def how(self) -> str:
        """See `Frames.how`."""
        return f"files of at most {self.most_pixels} pixels"

    @property
    def known(self) -> tuple[int, str]:
        """See `Frames.known`."""
        return int(self.store.index.meta["refused"]), "by their first bytes"


@dataclass(frozen=True)
class Fit:
    """How a whole picture becomes (edge, edge, 3).

    Attributes:
        edge: of the square.
        fit: "crop": the shorter side is scaled to `short`, and the middle cut out; "squeeze": both sides are
            scaled to `edge`.
        short: at least `edge`.
    """

    edge: int
    fit: str = "crop"
    short: int = 0

    def of(self, picture: Picture) -> NDArray[np.uint8]:
        """Return the picture so."""
        return picture.fitted(self.edge, self.fit, max(self.short, self.edge))


@dataclass(frozen=True, eq=False)
class Pictures:
    """Rows of pictures that are kept elsewhere.

    Attributes:
        frames: where they are.
        rule: how they become images of one size where no augmentation takes a part of them.
        chosen: which of them; None: all, in order.
        refused: reasons why pictures were not decoded so far, by row, of the first TOLD that were met.
    """

    frames: Frames
    rule: Fit
    chosen: Chosen | None = None
    refused: dict[int, str] = field(default_factory=dict)

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def _chosen(self) -> Chosen:
        return Chosen(len(self.frames)) if self.chosen is None else self.chosen

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, edge, edge, 3), as of an array of images."""
        return (len(self), self.rule.edge, self.rule.edge, 3)

    def places(self, rows: Rows) -> NDArray[np.int64]:
        """Return where rows are among the frames."""
        return self._chosen.places(rows)

    def take(self, rows: Rows) -> Pictures:
        """Return these rows, of the same pictures (`Chosen.take`)."""
        return Pictures(self.frames, self.rule, self._chosen.take(rows))

    @property
    def how(self) -> str:
        """What their pixels follow from beside their files, in words."""
        return f"{self.rule} of {self.frames.how}"

    @property
    def fingerprints(self) -> Fingerprints:
        """What tells these pictures from others: digests of the bytes of their files. Nothing is decoded."""
        return Fingerprints(self)

    def read(self, rows: Rows, workers: int | None = None) -> Read:
        """Return pictures by the rule.

        Args:
            rows: which.
            workers: threads that decode; None: one a core.

        Returns:
            (n, edge, edge, 3), zero where a picture cannot be decoded, and which could be, (n,).

        Raises:
            RunError: a file cannot be read, or changed since it was indexed.
        """

        def whole(which: NDArray[np.int64], found: list[Picture]) -> list[Cut]:
            return [self.rule.of] * len(found)

        return self._each(rows, (), whole, workers)

    def views(self, rows: Rows, part: Part, words: Words, workers: int | None = None) -> Read:
        """Return parts of pictures, cut out of them as they are.

        Args:
            rows: which.
            part: says which parts.
            words: (n, K) one for each view.
            workers: as of `read`.

        Returns:
            (n, K, edge, edge, 3), zero where a picture cannot be decoded, and which could be, (n,).

        Raises:
            RunError: as `read`.
        """
        edge = self.rule.edge

        def parts(which: NDArray[np.int64], found: list[Picture]) -> list[Cut]:
            sizes = np.array([picture.size for picture in found], np.int64)
            return [_cutting(boxes, edge) for boxes in part.boxes(sizes, words[which]).tolist()]

        return self._each(rows, words.shape[1:], parts, workers)

    def _each(
        self,
        rows: Rows,
        shape: tuple[int, ...],
        cuts: Callable[[NDArray[np.int64], list[Picture]], list[Cut]],
        workers: int | None,
    ) -> Read:
        """Return (n, *shape, edge, edge, 3), some pictures at a time: `cuts` says what to take of each."""
        named = np.arange(len(self))[rows] if isinstance(rows, slice) else rows
        places = self.places(rows)
        out = np.zeros((len(places), *shape, *self.shape[1:]), np.uint8)
        whole = np.zeros(len(places), np.bool_)

        def work(which: NDArray[np.int64]) -> None:
            opened = [(i, self._tried(int(named[i]), self._open, int(places[i]))) for i in which]
            there = [(i, picture) for i, picture in opened if picture is not None]
            if not there:
                return
            found = [picture for _, picture in there]
            for (i, picture), cut in zip(there, cuts(np.array([i for i, _ in there]), found), strict=True):
                pixels = self._tried(int(named[i]), cut, picture)
                if pixels is not None:
                    out[i], whole[i] = pixels, True

        threads.by_chunks(work, len(places), threads.cores() if workers is None else workers)
        return out, whole

    def _open(self, place: int) -> Picture:
        return self.frames.open(place)

    def _tried(self, row: int, function: Callable[[Any], Result], argument: Any) -> Result | None:
        """Return what the function gives, or None where the picture of this row cannot be decoded."""
        try:
            return function(argument)
        except Undecodable as error:
            if len(self.refused) < TOLD:
                self.refused[row] = str(error)
            return None

    def said(self, row: int) -> str:
        """Say which picture a row is, and why it was not decoded where that is known."""
        name = printable(self.frames.name(int(self.places(np.array([row]))[0])))
        return f"{name} ({self.refused[row]})" if row in self.refused else name


def _cutting(boxes: list[list[int]], edge: int) -> Cut:
    def cut(picture: Picture) -> NDArray[np.uint8]:
        return np.stack([picture.cut((box[0], box[1], box[2], box[3]), edge) for box in boxes])

    return cut


class Fingerprints:
    """(N, 16) uint8: what stands for pictures where they must be told from others. An array to who reads it.

    Of a picture: its file's bytes, by BLAKE2b. That it has the same pixels then needs the same decoder.
    """

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._held = pictures.frames.fingerprints
        self.dtype, self.shape = np.dtype(np.uint8), (len(pictures), SIZE)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, rows: Rows) -> NDArray[np.uint8]:
        return self._held[self._pictures.places(rows)]


SIZE = 16
"""Bytes of a fingerprint."""


def fingerprint(content: bytes) -> bytes:
    """Return the digest of the bytes of a file."""
    return hashlib.blake2b(content, digest_size=SIZE).digest()
