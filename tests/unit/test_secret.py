"""The run secret: where it is kept, who may read it, what it belongs to, and when it is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fedsim.privacy import secret
from fedsim.validate import InputError

HEADER = bytes(range(32))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(secret.FOLDER_VARIABLE, str(tmp_path / "secrets"))
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def created(folder: Path) -> tuple[str, bytes, Path]:
    """Make a secret; return the run's name, the secret and its file."""
    name, root = secret.new()
    secret.create(folder, name, root, HEADER)
    return name, root, file_of(name)


def file_of(name: str) -> Path:
    (path,) = secret.secrets_folder().glob(f"*{name}*")
    return path


def held(folder: Path, name: str, root: bytes, header: bytes = HEADER) -> bytes:
    """Read a secret as a resumed run does."""
    opened = secret.Held(folder, name, secret.commitment(root), header)
    opened.close()
    return opened.root


def test_create_hold_destroy(run: Path) -> None:
    name, root, path = created(run)
    assert len(root) == 32
    assert held(run, name, root) == root
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert list(run.iterdir()) == []
    assert secret.destroy(name) is True
    assert list(path.parent.iterdir()) == []
    assert secret.destroy(name) is False


def test_secrets_and_names_are_never_the_same_and_commitments_tell_them_apart() -> None:
    made = [secret.new() for _ in range(100)]
    assert len({name for name, _ in made}) == len({root for _, root in made}) == 100
    commitments = {secret.commitment(root) for _, root in made}
    assert len(commitments) == 100
    assert not any(root.hex() in commitments for _, root in made)


def test_permissions_do_not_depend_on_the_umask(run: Path) -> None:
    before = os.umask(0)
    try:
        _, _, path = created(run)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_destroy_overwrites_everything_before_it_unlinks(run: Path, tmp_path: Path) -> None:
    name, _, path = created(run)
    kept = tmp_path / "second name"
    os.link(path, kept)
    size = path.stat().st_size
    secret.destroy(name)
    assert kept.read_bytes() == bytes(size)


def test_a_secret_that_the_ledger_does_not_commit_to_is_refused(run: Path) -> None:
    name, root, path = created(run)
    other = secret.new()[1]
    with pytest.raises(InputError, match="not the secret that the ledger"):
        held(run, name, other)
    path.write_bytes(other + HEADER)
    with pytest.raises(InputError, match="not the secret that the ledger"):
        held(run, name, root)


def test_a_ledger_that_the_secret_was_not_made_for_is_refused(run: Path) -> None:
    name, root, _ = created(run)
    with pytest.raises(InputError, match="made for a ledger with another header"):
        held(run, name, root, bytes(32))


def test_resume_without_the_secret_says_why_it_cannot(run: Path) -> None:
    name, root = secret.new()
    with pytest.raises(InputError, match="cannot be resumed, because its noise could not be reproduced"):
        held(run, name, root)


def test_a_run_is_found_where_it_is_now(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, root, path = created(run)
    monkeypatch.chdir(run.parent)
    assert held(Path("run"), name, root) == root, "a relative path is the same place"
    link = run.parent / "link"
    link.symlink_to(run)
    assert held(link, name, root) == root
    assert file_of(name) == path
    moved = run.rename(run.parent / "moved")
    assert held(moved, name, root) == root
    secret.create(run, *secret.new(), HEADER)
    assert held(moved, name, root) == root, "a run in its former place leaves it alone"


def test_a_new_run_destroys_what_a_removed_one_left_in_its_place(run: Path, tmp_path: Path) -> None:
    name, root, path = created(run)
    elsewhere = created(tmp_path / "other")
    kept = tmp_path / "second name"
    os.link(path, kept)
    created(run)
    assert kept.read_bytes() == bytes(64)
    with pytest.raises(InputError, match="must be there"):
        held(run, name, root)
    assert held(tmp_path / "other", *elsewhere[:2]) == elsewhere[1], "of another place: left alone"


def test_a_secret_is_for_one_process_at_a_time(run: Path) -> None:
    name, root, path = created(run)
    first = secret.Held(run, name, secret.commitment(root), HEADER)
    with pytest.raises(InputError, match="in use by another process"):
        held(run.parent / "copy", name, root)
    created(run)
    assert path.exists(), "a new run in the same place does not take it from one that goes on"
    first.close()
    assert held(run.parent / "copy", name, root) == root


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_wider_permissions_are_refused(run: Path, mode: int) -> None:
    name, root, path = created(run)
    path.chmod(mode)
    with pytest.raises(InputError, match="0600"):
        held(run, name, root)


@pytest.mark.parametrize("content", [b"", bytes(32), bytes(63), bytes(65)])
def test_a_wrong_size_is_refused(run: Path, content: bytes) -> None:
    name, root, path = created(run)
    path.write_bytes(content)
    with pytest.raises(InputError, match="64 bytes"):
        held(run, name, root)


def test_a_link_in_its_place_is_refused(run: Path, tmp_path: Path) -> None:
    name, root, path = created(run)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    for call in (lambda: held(run, name, root), lambda: secret.destroy(name), lambda: created(run)):
        with pytest.raises(InputError):
            call()
    assert elsewhere.read_bytes() == root + HEADER


@pytest.mark.parametrize("name", ["", "*", "../x", "0" * 31, "G" * 32])
def test_the_name_of_a_run_cannot_reach_other_files(run: Path, name: str) -> None:
    created(run)
    with pytest.raises(InputError, match="32 hexadecimal digits"):
        secret.destroy(name)


def test_an_open_folder_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir(mode=0o755)
    (tmp_path / "secrets").chmod(0o755)
    with pytest.raises(InputError, match="0700"):
        created(run)


def test_a_folder_that_cannot_be_made_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets").write_text("a file")
    with pytest.raises(InputError, match="cannot be made"):
        created(run)


def test_secrets_inside_the_outputs_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = run.parent / "link"
    link.symlink_to(run)
    for folder in (run, run / "deep" / "secrets", link / "secrets"):
        monkeypatch.setenv(secret.FOLDER_VARIABLE, str(folder))
        with pytest.raises(InputError, match="outside the run's outputs"):
            created(run)


def test_the_default_folder_is_in_the_home(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(secret.FOLDER_VARIABLE)
    assert secret.secrets_folder() == Path.home() / ".fedsim" / "secrets"
