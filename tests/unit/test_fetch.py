"""Getting the full Fashion-MNIST: every way is tried, nothing altered is installed."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedsim.data import fetch
from tests.unit.test_datasets import from_root, idx_folder


@pytest.fixture
def small_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release of four small files whose digests `fetch` takes for the published ones; gzipped."""
    source = tmp_path / "release"
    idx_folder(tmp_path / "plain", "FashionMNIST")
    digests = {}
    source.mkdir()
    for name in fetch.DIGESTS:
        content = (tmp_path / "plain" / "FashionMNIST" / "raw" / name).read_bytes()
        (source / f"{name}.gz").write_bytes(gzip.compress(content))
        digests[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fetch, "DIGESTS", digests)
    return source


def no_way(*_: Any) -> Path:
    raise fetch.FetchFailed("not in this test")


def test_fetch_tries_the_next_way_and_the_result_loads(
    small_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        fetch,
        "WAYS",
        {"already": fetch._already_there, "blocked": no_way, "release": lambda *_: small_release},
    )
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
    monkeypatch.setattr(fetch, "WAYS", {"altered": lambda *_: small_release, "cut": lambda *_: cut})
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
            (cwd / f"{fetch.PACKAGE}_1_all.deb").write_bytes(b"")
        if command[0] == "dpkg-deb":
            target = Path(command[3]) / "usr" / "share"
            target.mkdir(parents=True)
            for path in small_release.iterdir():
                (target / path.name).write_bytes(path.read_bytes())
        failed = len(calls) == 1
        return subprocess.CompletedProcess(command, int(failed), "", "E: no such package\n" if failed else "")

    monkeypatch.setattr(fetch.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setattr(fetch, "WAYS", {"package": fetch._by_debian})
    assert fetch.fetch(tmp_path / "data") == "package"
    assert calls == [
        ["apt-get", "download"],
        ["apt-get", "update"],
        ["apt-get", "download"],
        ["dpkg-deb", "-x"],
    ]
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: None)
    with pytest.raises(fetch.FetchFailed, match="apt-get is not installed"):
        fetch.fetch(tmp_path / "other")
