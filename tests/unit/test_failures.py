"""What the machine refuses ends in exit code 2 before a run, 3 during one, with its cause, no traceback."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim import loading, programs
from fedsim.engine.run_folder import RunFolder
from fedsim.flower import launch
from fedsim.validate import RunError
from tests.conftest import SMALL, command, final, small, train
from tests.strategies import methods


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("no folder")
    return folder / "file" / "run"


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("no folder")
    return folder / "file"


def link_below_a_file(folder: Path) -> Path:
    (folder / "link").symlink_to(below_a_file(folder))
    return folder / "link"


def link_in_a_circle(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "link")
    return folder / "link"


UNWRITABLE: dict[str, Callable[[Path], Path]] = {
    "below a file": below_a_file,
    "a file": a_file,
    "a link in a circle": link_in_a_circle,
    "a link that cannot be followed": link_below_a_file,
    "a system folder": lambda _: Path("/proc/fedsim/run"),
    "a name too long": lambda folder: folder / ("x" * 300),
    "not UTF-8": lambda folder: folder / os.fsdecode(b"run-\xff"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_a_folder_that_cannot_be_written_is_bad_input(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = UNWRITABLE[case](tmp_path)
    assert command(["run", "base", *SMALL, "--out", str(out)]) == 2
    text = capsys.readouterr().err
    assert "--out must be" in text
    assert "Choose another --out" in text


def test_a_read_only_disk_is_found_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for an administrator, whom permissions do not stop."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.chdir(tmp_path)
    assert command(["run", "base", *SMALL]) == 2  # the default folder, runs/ in the working one
    assert "Read-only file system" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_secrets_folder_that_cannot_be_written_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDSIM_SECRETS", str(below_a_file(tmp_path)))
    out = tmp_path / "run"
    assert command(["run", "base", *SMALL, "privacy.noise_source=secure", "--out", str(out)]) == 2
    assert "FEDSIM_SECRETS" in capsys.readouterr().err
    assert not out.exists()
    assert command(["run", "base", *SMALL, "train.steps=1", "--out", str(out)]) == 0  # seeded needs none


def test_results_that_could_not_be_written_are_refused_before_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in (below_a_file(tmp_path) / "r.json", tmp_path):
        assert (
            command(["repeat", "base", *SMALL, "--results", str(target), "--out", str(tmp_path / "o")]) == 2
        )
        assert "--results" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_working_folder_that_is_gone_is_bad_input(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        "import os, sys; os.rmdir(os.getcwd()); from fedsim.cli import main; sys.exit(main(['run', 'base']))"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: the system refuses the write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_stops_the_run_which_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "base", *SMALL, "--out", str(tmp_path / "a")]
    with full_disk(100_000):  # the first checkpoint is larger
        code = command(arguments)
    text = capsys.readouterr().err
    assert code == 3, text
    assert os.strerror(errno.EFBIG) in text
    assert "--resume" in text
    assert command([*arguments, "--resume"]) == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    out = tmp_path_factory.mktemp("undisturbed")
    train(small(), out)
    return final(out)


@pytest.mark.parametrize("which", [1, 2, 3, 6, 9, 13, 18])
def test_a_disk_that_fills_up_at_any_time_stops_the_run_which_resumes_exactly(
    which: int,
    undisturbed: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is written to stay is synchronised; here the n-th time fails, as on a disk that filled up."""
    arguments = ["run", "base", *SMALL, "--out", str(tmp_path / "a")]
    sync, left = os.fsync, iter(range(which - 1, -1, -1))

    def fails(descriptor: int) -> None:
        if next(left, -1) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        assert command(arguments) == 3
    text = capsys.readouterr().err
    assert os.strerror(errno.ENOSPC) in text
    assert "esume" in text
    assert str(tmp_path / "a") in text
    assert command([*arguments, "--resume"]) == 0
    assert torch.equal(final(tmp_path / "a"), undisturbed)


def test_memory_that_runs_out_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fedsim.engine.server.Server.train", refuse)
    assert command(["run", "base", *SMALL, "--out", str(tmp_path)]) == 3
    assert "MemoryError" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        f"{sys.executable} -m fedsim.cli epsilon --published TAN --json | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_a_damaged_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train(small("train.steps=1"), out)
    (out / "result.json").write_text((out / "result.json").read_text()[:-40])
    assert command(["run", "base", *SMALL, "train.steps=1", "--resume", "--out", str(out)]) == 2
    assert "result.json" in capsys.readouterr().err


# --- Flower


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the launcher runs as `flwr`, without running it."""
    calls: list[list[str]] = []

    def flwr(arguments: list[str], environment: dict[str, str], base: Path) -> str:
        calls.append(arguments)
        return '{"run-id": 7}'

    monkeypatch.setattr(launch, "_flwr", flwr)
    return calls


@pytest.mark.parametrize(
    "name",
    ['a "quoted" name', "back\\slash", "it's", "a b=c d", "ü 衣 🙂", "new\nline", "tab\t\x7f", "$HOME `x`"],
)
def test_flower_gets_the_very_folder(name: str, tmp_path: Path, asked: list[list[str]]) -> None:
    from flwr.common.config import parse_config_args

    config, folder = loading.load("base"), RunFolder(tmp_path / name)
    launch._submit(tmp_path, config, folder, True, {}, tmp_path)
    given = parse_config_args([asked[0][asked[0].index("--run-config") + 1]])
    assert given == {"out": str(folder.root), "resume": True}


def test_sockets_lie_in_a_short_folder_whatever_tmpdir_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("scratch" * 9)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with launch._workspace() as base:
        environment = launch._environment(base, loading.load("base"))
        session = "ray/session_2026-11-25_20-04-07_123456_1234567/sockets/plasma_store"
        with socket.socket(socket.AF_UNIX) as probe:
            path = Path(environment["RAY_TMPDIR"]) / session
            path.parent.mkdir(parents=True)
            probe.bind(str(path))
        assert Path(environment["TMPDIR"]).is_relative_to(base)
        assert not base.is_relative_to(long)
    assert not base.exists()
    monkeypatch.setattr(launch, "SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(RunError, match="Set TMPDIR"), launch._workspace():
        pass


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            "INFO: started\nTraceback (most recent call last):\n  File x\n"
            "OSError: AF_UNIX path length cannot exceed 107 bytes: /scratch\nINFO: ended\n",
            "OSError: AF_UNIX path length cannot exceed 107 bytes: /scratch",
        ),
        (
            "fedsim.validate.RunError: node 1 failed: no memory\nray.exceptions.RayError: gone\n",
            "node 1 failed: no memory",
        ),
        ("ERROR :     [Errno 98] error while attempting to bind on address\n", ""),
        (
            "2026 ValueError: first\n2026 flwr.app.AppExitException: second\n",
            "flwr.app.AppExitException: second",
        ),
        ("nothing wrong\n", ""),
    ],
)
def test_the_cause_is_the_last_error_of_the_log(log: str, cause: str) -> None:
    assert launch._cause(log) == cause


def test_a_superlink_that_ends_at_once_gives_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    program = binaries / "flower-superlink"
    program.write_text("#!/bin/sh\necho 'OSError: [Errno 98] Address already in use'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(binaries / "python"))
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "run"
    assert command(["run", "base", *SMALL, "--backend", "simulation", "--out", str(out)]) == 3
    text = capsys.readouterr().err
    assert "Address already in use" in text
    assert str(out / "flower.log") in text


@pytest.mark.parametrize("beside_python", [True, False])
def test_flowers_programs_are_found_in_an_environment_that_is_not_activated(
    beside_python: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside Python, or where pip puts them; also by those that it starts itself, by their names."""
    (own := tmp_path / "own").mkdir()
    for name in ("flwr", "flower-superlink", "flower-superexec"):
        (own / name).write_text("#!/bin/sh\n")
        (own / name).chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str((own if beside_python else tmp_path) / "python"))
    if not beside_python:
        monkeypatch.setattr(programs.sysconfig, "get_path", lambda *_: str(own))
    with launch._workspace() as base:
        environment = launch._environment(base, loading.load("base"))
    for name in ("flwr", "flower-superlink", "flower-superexec"):
        assert shutil.which(name, path=environment["PATH"]) == str(own / name)
        assert programs.find(name) == own / name
    assert programs.find("flower-supernothing") is None


def test_a_missing_program_of_flower_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs, "folders", lambda: [tmp_path])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    out = tmp_path / "run"
    assert command(["run", "base", *SMALL, "--backend", "simulation", "--out", str(out)]) == 2
    text = capsys.readouterr().err
    assert "needs the program flwr, and it is neither in" in text
    assert "pip install 'flwr[simulation]'" in text
    assert not out.exists()


def test_a_superlink_that_dies_under_a_run_stops_it_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    @contextmanager
    def superlink(base: Path, environment: dict[str, str], log: Any) -> Iterator[int]:
        log.write(b"started\nMemoryError: 12 GiB\n")
        log.flush()
        yield 1

    def flwr(arguments: list[str], environment: dict[str, str], base: Path) -> str:
        if arguments[0] == "run":
            return '{"run-id": 7}'
        raise RunError("flwr ls failed: connection refused")

    monkeypatch.setattr(launch, "_superlink", superlink)
    monkeypatch.setattr(launch, "_flwr", flwr)
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.1)
    assert command(["run", "base", *SMALL, "--backend", "simulation", "--out", str(out)]) == 3
    text = capsys.readouterr().err
    assert "MemoryError: 12 GiB" in text
    assert "--resume" in text


def test_a_flower_that_is_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "flower-superlink")

    monkeypatch.setattr(subprocess, "Popen", absent)
    assert command(["run", "base", *SMALL, "--backend", "simulation", "--out", str(tmp_path / "run")]) == 3
    assert "flower-superlink" in capsys.readouterr().err


# --- the dry run and the budget


def test_the_dry_run_states_what_a_node_really_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the arrays of the messages of one step, for every method."""
    from fedsim.flower.transport import GridTransport
    from fedsim.study.plan import describe

    monkeypatch.setattr("fedsim.study.plan.FLOPS_PER_SECOND", 1.0)
    ask = GridTransport.ask
    for name in methods.ALL:
        seen: list[tuple[int, int]] = []

        def watched(self: Any, tasks: Any, parameters: Any, seen: list[tuple[int, int]] = seen) -> Any:
            replies = ask(self, tasks, parameters)
            along = sum(a.nbytes for a in tasks[0].arrays.values()) + parameters.nbytes
            seen.append((along, sum(a.nbytes for a in replies[0].arrays.values())))  # type: ignore[union-attr]
            return replies

        monkeypatch.setattr(GridTransport, "ask", watched)
        quiet = ["monitor.progress=false", "monitor.tensorboard=false", "train.steps=1"]
        config = loading.load(f"smoke/{name}", quiet if name != "dp_mf" else [*quiet[:2], "train.steps=4"])
        plan = describe(config)
        train(config, tmp_path / name)
        to_node, from_node = (sum(s[i] for s in seen) / (4 if name == "dp_mf" else 1) for i in (0, 1))
        assert plan["bytes_to_largest_node_per_step"] == pytest.approx(to_node, rel=0.02), name
        assert plan["bytes_from_largest_node_per_step"] == pytest.approx(from_node, rel=0.02), name


def test_a_budget_that_pld_cannot_count_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["privacy.stop_at_epsilon=50", "privacy.delta=1e-12"]
    assert command(["run", "base", *SMALL, *budget, "--out", str(tmp_path / "run")]) == 2
    text = capsys.readouterr().err
    assert "PLD in double precision needs delta" in text
    assert "privacy.accountant=rdp" in text
    assert "below the epsilon of a single release" not in text
    rdp = ["privacy.accountant=rdp", "--json", "--out", str(tmp_path / "run")]
    assert command(["run", "base", *SMALL, *budget, *rdp]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6


def test_steps_that_pld_cannot_count_do_not_end_the_count() -> None:
    """At delta 2e-10 PLD is sound up to 20,000 releases: an answer below is one, "20,000" would be none."""
    from fedsim.privacy.family import EventFamily
    from fedsim.privacy.search import max_steps
    from fedsim.validate import InputError

    family = EventFamily.gaussian(0.01)
    assert 0 < max_steps(0.2, 2e-10, family, 20.0, limit=50_000) < 20_000
    with pytest.raises(InputError, match=r"cannot be counted by the pld accountant.*rdp"):
        max_steps(20.0, 2e-10, family, 20.0, limit=50_000)
    assert max_steps(20.0, 2e-10, family, 20.0, limit=15_000) == 15_000
