"""Making the index of a folder of pictures or of tar files: once, by reading every file; nothing is decoded.

Of each picture it keeps where it is, 16 bytes that stand for its content, its class and its owner. Headers of
pictures are looked at, so that a file that is none is counted (`meta["refused"]`); one that is damaged
further in is found when it is decoded, if the decoder finds it: most JPEGs in which a few bytes changed
decode to other pixels without an error. Either keeps its place.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fedsim.data.pictures import index, tar
from fedsim.data.pictures import workers as threads
from fedsim.data.pictures.decode import Encoded
from fedsim.data.pictures.index import Columns, Growing, Index
from fedsim.data.pictures.pictures import SIZE, fingerprint
from fedsim.data.pictures.shown import Undecodable
from fedsim.data.pictures.stores import short_stamp
from fedsim.validate import InputError, PrivateInputError

NAMED = 5  # of the refused files, in meta
READ_AT_ONCE = 256


@dataclass
class _Seen:
    """What is kept of pictures whose bytes were read, in order."""

    sums: Growing = field(default_factory=lambda: Growing(SIZE))
    refused: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, name: str, found: tuple[bytes, bool]) -> None:
        self.sums.put(found[0])
        if not found[1]:
            self.refused += 1
            if len(self.named) < NAMED:
                self.named.append(name)

    def meta(self) -> dict[str, Any]:
        return {"refused": self.refused, "refused_named": self.named}


def _looked_at(content: bytes) -> tuple[bytes, bool]:
    """Return a picture's fingerprint, and whether its header is that of a picture."""
    try:
        if content:
            Encoded(content, None)
        there = bool(content)
    except Undecodable:
        there = False
    return fingerprint(content), there


def of_files(root: Path, groups: Sequence[Callable[[], Sequence[Path]]]) -> Index:
    """Return the index of files of their own, for `fedsim.data.pictures.stores.Files`.

    Args:
        root: where names start.
        groups: functions that list files below `root`, such as those of one class, in their order; called
            twice where the index is to be made, so that the names of one group at a time are in memory.

    Raises:
        InputError: a file that cannot be read; names it.
    """

    def stamped() -> Iterable[str | index.Stamp]:
        yield str(root)
        for group in groups:
            for path in group():
                yield os.path.relpath(path, root)
                yield index.stamp_of(_status(path))

    def make(handle: BinaryIO) -> None:
        index.write(handle, *_files(root, groups))

    return index.opened(f"files-{index.key_of(stamped())}.index", make)


def _status(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read: {error}. Mend or remove it.") from error


def _files(root: Path, groups: Sequence[Callable[[], Sequence[Path]]]) -> tuple[Columns, dict[str, Any]]:
    names, ends, stamps, seen = Growing(1), Growing(), Growing(), _Seen()
    counts: list[int] = []

    def read(path: Path) -> tuple[int, tuple[bytes, bool]]:
        try:
            with open(path, "rb") as handle:
                status, content = os.fstat(handle.fileno()), handle.read()
        except OSError as error:
            raise InputError(
                f"{path} must be a file that can be read: {error}. Mend or remove it."
            ) from error
        return short_stamp(status), _looked_at(content)

    for group in groups:
        paths = group()
        counts.append(len(paths))
        for start in range(0, len(paths), READ_AT_ONCE):
            some = paths[start : start + READ_AT_ONCE]
            for path, (stamp, found) in zip(some, threads.each(read, some), strict=True):
                name = os.path.relpath(path, root)
                names.put(os.fsencode(name))
                ends.add(len(names))
                stamps.add(stamp)
                seen.add(name, found)
    columns = {"name_end": ends, "names": names, "stamp": stamps, "sum": seen.sums}
    return columns, {"groups": counts, **seen.meta()}


@dataclass(frozen=True)
class Sample:
    """Files of one key in a tar file: the picture, and by their endings the small ones and their bytes."""

    key: str
    picture: tar.Member | None
    texts: dict[str, bytes]
    members: dict[str, tar.Member]


def of_shards(
    root: Path,
    shards: Sequence[Path],
    endings: Sequence[str],
    texts: Sequence[str],
    labels: Callable[[str, Sample], dict[str, int]],
    told: str,
) -> Index:
    """Return the index of tar files, for `fedsim.data.pictures.stores.Shards`.

    Args:
        root: where names of the tar files start.
        shards: in their order.
        endings: of pictures, in lower case; a sample has one at most.
        texts: endings of other members that `labels` sees, their places and their bytes.
        labels: given the tar file's name and a sample, what its columns hold: name -> number of 0 or above.
        told: what `labels` follows from.

    Raises:
        InputError: a tar file that cannot be read or is none.
        PrivateInputError: samples that are not in the form; names tar file and key.
    """

    def stamped() -> Iterable[str | index.Stamp]:
        yield from (str(root), told, repr(tuple(endings)), repr(tuple(texts)))
        for path in shards:
            yield os.path.relpath(path, root)
            yield index.stamp_of(_status(path))

    def make(handle: BinaryIO) -> None:
        index.write(handle, *_shards(root, shards, endings, texts, labels))

    return index.opened(f"shards-{index.key_of(stamped())}.index", make)


def _shards(
    root: Path,
    shards: Sequence[Path],
    endings: Sequence[str],
    texts: Sequence[str],
    labels: Callable[[str, Sample], dict[str, int]],
) -> tuple[Columns, dict[str, Any]]:
    starts, sizes, seen = Growing(), Growing(), _Seen()
    columns: dict[str, Growing] = {}
    table: list[tuple[str, int, int]] = []
    for path in shards:
        name = os.path.relpath(path, root)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{path} must be a tar file that can be read: {error}.") from error
        try:
            table.append((name, short_stamp(os.fstat(descriptor)), len(starts)))
            for sample in _samples(descriptor, path, endings, texts):
                picture = sample.picture
                starts.add(0 if picture is None else picture.start // tar.BLOCK)
                sizes.add(0 if picture is None else picture.size)
                content = b"" if picture is None else os.pread(descriptor, picture.size, picture.start)
                seen.add(f"{name}: {sample.key}", _looked_at(content))
                for column, value in labels(name, sample).items():
                    if column not in columns:
                        columns[column] = Growing()
                    columns[column].add(value)
        except OSError as error:
            raise InputError(f"{path} must be a tar file that can be read: {error}.") from error
        finally:
            os.close(descriptor)
    found = {"start": starts, "size": sizes, "sum": seen.sums, **columns}
    return found, {"shards": table, **seen.meta()}


def _samples(descriptor: int, path: Path, endings: Sequence[str], texts: Sequence[str]) -> Iterable[Sample]:
    """Yield the samples of one tar file: members of one key, which stand together. A key is what a name has
    before its first dot, and the ending all that follows, as WebDataset has it."""
    done = array("q")  # hashes of the keys, for memory's sake
    key: str | None = None
    picture: tar.Member | None = None
    held: dict[str, bytes] = {}
    where: dict[str, tar.Member] = {}
    others: set[str] = set()

    def whole() -> Sample:
        assert key is not None
        if picture is None:
            _check_endings(path, key, endings, texts, held, others)
        return Sample(key, picture, held, where)

    for member in tar.members(descriptor, path):
        if (found := _key(member)) is None:
            continue
        own, ending = found
        if own != key:
            if key is not None:
                yield whole()
            done.append(hash(own))
            key, picture, held, where, others = own, None, {}, {}, set()
        if ending in endings:
            if picture is not None:
                raise _wrong(path, own, "a sample must have one picture (data.options.picture: its ending)")
            picture = member
        elif ending in texts:
            if ending in held:
                raise _wrong(path, own, "a sample must have one member of an ending")
            held[ending], where[ending] = os.pread(descriptor, member.size, member.start), member
        else:
            others.add(ending)
    if key is not None:
        yield whole()
    if twice := _twice(done, descriptor, path):
        raise _wrong(path, twice, "members of one key must stand together, each key once in a tar file")


def _key(member: tar.Member) -> tuple[str, str] | None:
    """Return key and ending of a member; None: it is a hidden one."""
    folder, base = os.path.split(member.name)
    if base.startswith("."):
        return None
    stem, _, ending = base.partition(".")
    return os.path.join(folder, stem), ending.lower()


def _twice(hashes: Sequence[int], descriptor: int, path: Path) -> str:
    """Return a key of a tar file that comes again after others, or ""; `hashes` of its keys as they came."""
    values, counts = np.unique(np.asarray(hashes, np.int64), return_counts=True)
    again = set(values[counts > 1].tolist())
    seen: set[str] = set()
    before = ""
    for member in tar.members(descriptor, path) if again else ():
        key, _ = _key(member) or (before, "")
        if key != before and hash(key) in again:
            if key in seen:
                return key
            seen.add(key)
        before = key
    return ""


def _check_endings(
    path: Path,
    key: str,
    endings: Sequence[str],
    texts: Sequence[str],
    held: Collection[str],
    others: Collection[str],
) -> None:
    """Refuse a key without a picture that would have one but for a dot in it, by which several samples are
    one, or of whose members none is known."""
    if hidden := sorted(other for other in others if other.rpartition(".")[2] in endings):
        raise _wrong(
            path,
            key,
            "a key must have no dot, since the ending of a member starts at the first one",
            f"members with the endings {', '.join(hidden[:NAMED])}. Write another sign for that dot",
        )
    if not held:
        raise _wrong(
            path,
            key,
            f"every key must have a picture or one of the members {', '.join(texts)}",
            f"members with the endings {', '.join(sorted(others)[:NAMED])}. Convert them, or leave them out",
        )


def _wrong(path: Path, key: str, expected: str, got: str = "") -> PrivateInputError:
    found = f", got {got}. Pack it anew." if got else ". Pack it anew."
    return PrivateInputError(f"{path}, {key}: {expected}{found}", f"{path}: {expected}.")
