"""Start Flower's simulation for one run, follow it, and turn its end into an exit code.

Plain `flwr run .` works too; this adds what it lacks: a private SuperLink on a free loopback port, started in
an empty folder (Ray would import a checkout's code from its working directory), the environment switches
that keep the runtime from re-installing dependencies or phoning home, a progress bar, the cause of a
failure, and no process left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from fedsim import loading, programs, provenance, references, validate
from fedsim.config import Config
from fedsim.data import datasets
from fedsim.engine import device
from fedsim.engine.metrics import Watcher, numbers_of, read_steps
from fedsim.engine.run_folder import RunFolder
from fedsim.validate import InputError, RunError

POLL_SECONDS = 0.5
LOOK_SECONDS = 5.0  # between looks at a run's state: every look starts a Python process
SUPERLINK_SECONDS = 60.0
ANSWER_SECONDS = 300.0
PREFIX = "fedsim-"
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
LONGEST_BASE = 35  # bytes: Ray appends /ray/session_..., 68 of the 103 a socket's path may have (macOS)
ADOPTED = "FEDSIM_LAUNCH"  # marks every process of one launch, also those that left the process tree

# The message of an exception at the end of a traceback, with its name in front.
ERROR = re.compile(
    r"((?:[A-Za-z_][\w.]*\.)?[A-Za-z_]\w*(?:Error|Exception|Failure|Interrupt)(?:\([^)]*\))?: .+)$", re.M
)

PYPROJECT = """\
[project]
name = "fedsim-run"
version = "{version}"
[tool.flwr.app]
publisher = "fedsim"
[tool.flwr.app.components]
serverapp = "fedsim.flower.server_app:app"
clientapp = "fedsim.flower.client_app:app"
[tool.flwr.app.config]
config = "launch"
overrides = ""
out = ""
resume = false
"""


def simulate(config: Config, folder: RunFolder, resume: bool, watchers: Sequence[Watcher]) -> dict[str, Any]:
    """Run a checked configuration through Flower's simulation and return its result.

    Args:
        config: already checked by `prepare`, so that nothing is started for bad input.
        folder: where the run writes; Flower's log goes to flower.log in it.
        resume: continue what the folder holds.
        watchers: fed from metrics.jsonl as the run writes it.

    Raises:
        InputError: nodes cannot have the GPUs that are asked for.
        RunError: Flower could not start, or the run failed; says the cause and where the log is.
    """
    device.check_simulation(config)
    for name in ("flwr", "flower-superlink"):
        if shutil.which(name, path=programs.search_path()) is None:
            raise InputError(
                f"backend=simulation needs the program {name}, and it is neither in "
                f"{', '.join(map(str, programs.folders()))} nor on PATH. "
                "Run pip install 'flwr[simulation]' in this environment."
            )
    remedy = f"Mend that, then continue with --resume --out {folder.root}."
    with validate.failures_as(RunError, "Flower's simulation could not go on", remedy):
        return _simulate(config, folder, resume, watchers)


def _simulate(config: Config, folder: RunFolder, resume: bool, watchers: Sequence[Watcher]) -> dict[str, Any]:
    folder.root.mkdir(parents=True, exist_ok=True)
    with _workspace() as base, open(folder.flower_log, "ab") as log:
        logged = log.tell()
        environment = _environment(base, config)
        app = _stage(base, config)
        with _superlink(base, environment, log) as port:
            _connection(base, port)
            run_id = _submit(app, config, folder, resume, environment, base)
            try:
                status = _follow(run_id, folder, environment, base, watchers)
            except RunError as error:  # the SuperLink is gone
                cause = _cause(_tail(folder.flower_log, logged)) or str(error)
                raise RunError(
                    f"Flower stopped answering: {cause}\nLog: {folder.flower_log}. "
                    f"Resume with --resume --out {folder.root}."
                ) from error
            result = folder.finished()
            if status != "finished:completed" or result is None:
                run_log = _flwr(["log", run_id, "--show"], environment, base)
                log.write(run_log.encode())
                log.flush()
                cause = _cause(run_log) or _cause(_tail(folder.flower_log, logged))
                raise RunError(
                    f"{cause or f'Flower reports {status}'}\nLog: {folder.flower_log}. "
                    f"Resume with --resume --out {folder.root}."
                )
    return result


@contextmanager
def _workspace() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_short_folder()))
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _short_folder() -> Path:
    """Return a folder for temporary files whose path leaves room for the names of Ray's sockets.

    Raises:
        RunError: there is none.
    """
    folders = [Path(tempfile.gettempdir()), *map(Path, SHORT_FOLDERS)]
    for folder in folders:
        if len(os.fsencode(folder)) + len(PREFIX) + 9 <= LONGEST_BASE and os.access(
            folder, os.W_OK | os.X_OK
        ):
            return folder
    raise RunError(
        "Flower's simulation needs a writable folder for temporary files whose path has at most "
        f"{LONGEST_BASE - len(PREFIX) - 9} bytes, because sockets lie in it, got "
        f"{', '.join(map(str, folders))}. Set TMPDIR to one; nothing was started."
    )


def _environment(base: Path, config: Config) -> dict[str, str]:
    for name in ("home", "cwd", "tmp"):
        (base / name).mkdir()
    data_root = datasets.resolve(config.data).root
    return {
        **os.environ,
        "PATH": programs.search_path(),  # Flower starts programs of its own by their names
        "FLWR_HOME": str(base / "home"),
        "TMPDIR": str(base / "tmp"),
        "RAY_TMPDIR": str(base),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "FEDSIM_COMMIT": provenance.commit(),
        references.ALLOWED: ",".join(config.references()),
        "FEDSIM_DATA": str(data_root or datasets.default_root()),
        ADOPTED: base.name,
    }


def _stage(base: Path, config: Config) -> Path:
    """Write the app Flower packages: this code, that of references, and the resolved configuration."""
    app = base / "app"
    for name, source in provenance.sources().items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, app / name)
    for reference in config.references():
        if not references.installed(reference):
            for name, source in references.sources(reference).items():
                (app / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, app / name)
    (app / "configs").mkdir()
    (app / "configs" / "launch.yaml").write_text(loading.to_yaml(config), encoding="utf-8")
    (app / "pyproject.toml").write_text(PYPROJECT.format(version="0.1.0"), encoding="utf-8")
    return app


@contextmanager
def _superlink(base: Path, environment: dict[str, str], log: Any) -> Iterator[int]:
    """Run a SuperLink for the duration of the block; afterwards end it and everything it started."""
    port, logged = _free_port(), log.tell()
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    started = subprocess.Popen(
        command,
        cwd=base / "cwd",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    previous = signal.signal(signal.SIGTERM, _raise_exit)
    try:
        _wait_healthy(started, port, Path(log.name), logged)
        yield port
    finally:
        _end_all(started.pid, environment[ADOPTED])
        started.wait()
        signal.signal(signal.SIGTERM, previous)


def _raise_exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_healthy(started: subprocess.Popen[bytes], port: int, log: Path, logged: int) -> None:
    deadline = time.monotonic() + SUPERLINK_SECONDS
    while time.monotonic() < deadline:
        if started.poll() is not None:
            raise RunError(
                f"Flower's SuperLink ended at once with exit code {started.returncode}: "
                f"{_cause(_tail(log, logged)) or 'it said nothing'}\nLog: {log}."
            )
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RunError(f"Flower's SuperLink did not answer within {SUPERLINK_SECONDS:.0f} s.")


def _connection(base: Path, port: int) -> None:
    (base / "home" / "config.toml").write_text(
        '[superlink]\ndefault = "fedsim"\n\n'
        f'[superlink.fedsim]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )


def _flwr(arguments: list[str], environment: dict[str, str], base: Path) -> str:
    try:
        done = subprocess.run(
            ["flwr", *arguments],
            cwd=base / "cwd",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"flwr {arguments[0]} did not answer within {ANSWER_SECONDS:.0f} s.") from error
    if done.returncode != 0:
        raise RunError(f"flwr {arguments[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _submit(
    app: Path, config: Config, folder: RunFolder, resume: bool, environment: dict[str, str], base: Path
) -> str:
    engine, nodes = config.engine, config.federation.nodes
    federation = {
        "num-supernodes": nodes,
        "client-resources-num-cpus": engine.cpus_per_node,
        "client-resources-num-gpus": engine.gpus_per_node,
        # As many slots as nodes: Ray starts one actor a slot, and a node must not wait for a core it only
        # shares; without it Ray counts the machine's cores. Actors beyond Flower's own threads stay idle.
        "init-args-num-cpus": max(min(nodes, _flower_threads()) * engine.cpus_per_node, 1),
    }
    # As a file: what stands on the command line is cut at quotes and spaces. JSON strings are TOML strings.
    settings = base / "run.toml"
    out = json.dumps(str(folder.root), ensure_ascii=False).replace("\x7f", "\\u007f")
    settings.write_text(f"out = {out}\nresume = {str(resume).lower()}\n", encoding="utf-8")
    answer = _flwr(
        [
            "run",
            str(app),
            "fedsim",
            "--run-config",
            str(settings),
            "--federation-config",
            " ".join(f"{k}={v}" for k, v in federation.items()),
            "--format",
            "json",
        ],
        environment,
        base,
    )
    return str(_json(answer)["run-id"])


def _flower_threads() -> int:
    """Messages Flower's simulation handles at a time: the threads of a default ThreadPoolExecutor."""
    return min(32, (os.cpu_count() or 1) + 4)


def _follow(
    run_id: str, folder: RunFolder, environment: dict[str, str], base: Path, watchers: Sequence[Watcher]
) -> str:
    """Wait for the run's end, showing the steps it writes; return Flower's status."""
    shown, written, next_look = -1, 0, time.monotonic() + LOOK_SECONDS
    while True:
        if folder.metrics.exists() and (size := folder.metrics.stat().st_size) > written:
            written, next_look = size, time.monotonic() + LOOK_SECONDS  # a run that takes steps is there
        for line in read_steps(folder.metrics) if watchers else ():
            if line["step"] > shown:
                for watcher in watchers:
                    watcher.update(line["step"], numbers_of(line))
                shown = line["step"]
        if time.monotonic() >= next_look or folder.result.exists():
            status = str(_listed(run_id, environment, base)["status"])
            if status.startswith("finished"):
                return status
            next_look = time.monotonic() + LOOK_SECONDS
        time.sleep(POLL_SECONDS)


def _listed(run_id: str, environment: dict[str, str], base: Path) -> dict[str, Any]:
    answer = _json(_flwr(["ls", "--run-id", run_id, "--format", "json"], environment, base))
    run: dict[str, Any] = answer["runs"][0]
    return run


def _cause(log: str) -> str:
    """Return what the last error in a log says: one of ours if there is any, else the last one raised."""
    found = [line for line in ERROR.findall(log) if line]
    ours = [line for line in found if line.startswith("fedsim.validate.")]
    return ours[-1].split(": ", 1)[-1].strip() if ours else (found or [""])[-1].strip()


def _tail(path: Path, start: int) -> str:
    """Return what stands in a log from byte `start` on, at most its last megabyte."""
    with open(path, "rb") as handle:
        handle.seek(max(start, path.stat().st_size - 2**20))
        return handle.read().decode("utf-8", "replace")


def _json(text: str) -> Any:
    return json.loads(text[text.index("{") :])


def _end_all(pid: int, mark: str) -> None:
    """End a process, its descendants, and every process that carries this launch's mark."""
    family: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(ADOPTED) == mark and process.pid != os.getpid():
                family[process.pid] = process
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    try:
        root = psutil.Process(pid)
        family |= {p.pid: p for p in [root, *root.children(recursive=True)]}
    except psutil.NoSuchProcess:
        pass
    for stop in ("terminate", "kill"):
        for process in family.values():
            try:
                getattr(process, stop)()
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(list(family.values()), timeout=5)
        family = {p.pid: p for p in alive}
        if not family:
            return
