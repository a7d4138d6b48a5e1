"""The Flower ServerApp: reads the run configuration, hands the Grid to the engine."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim import loading, rules, validate
from fedsim.config import CONFIG_DIR, Config
from fedsim.data import datasets
from fedsim.engine import probe
from fedsim.engine.experiment import Experiment, prepare
from fedsim.engine.metrics import Watcher
from fedsim.engine.progress import progress_of
from fedsim.engine.run_folder import RunFolder, default_folder
from fedsim.engine.server import Server
from fedsim.engine.setup import setup_of
from fedsim.flower import deployment
from fedsim.flower.transport import GridTransport
from fedsim.headline import Metric
from fedsim.models import weights
from fedsim.run import Run
from fedsim.validate import FedsimError, InputError, RunError

app = ServerApp()


class _WithoutWay(logging.Filter):
    """Of an error that fedsim raises on purpose, Flower's log gets the message and not the way to it."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, FedsimError):
            kind = type(error)
            record.msg = f"{record.getMessage()}\n{kind.__module__}.{kind.__qualname__}: {error}"
            record.args, record.exc_info = (), None
        return True


logging.getLogger("flwr").addFilter(_WithoutWay())


@app.main()
def main(grid: Grid, context: Context) -> None:
    """See `run`."""
    run(grid, context)


def run(grid: Grid, context: Context) -> Run:
    """Run `config` with `overrides` into `out` (keys of [tool.flwr.app.config]) and return the finished run.

    What this ServerApp does, for ServerApps of one's own to call.

    Raises:
        InputError: something is wrong; nothing was started.
        RunError: the run stopped and can be resumed.
    """
    wanted = context.run_config
    overrides = _words(str(wanted["overrides"]))
    config = loading.load(_absolute(str(wanted["config"])), overrides, folder=None)
    out = Path(str(wanted["out"]) or default_out(config, overrides))
    if not out.is_absolute():
        raise InputError(f"out must be an absolute path (the runtime changes folders), got {str(out)!r}.")
    config = deployment.settled(config, deployment.backend_of(grid))
    folder, resume = RunFolder(out), bool(wanted["resume"])
    folder.check(config, resume)
    if not folder.result.exists():
        rules.refuse_outside_search(config)
    experiment = prepare(config)
    with contextlib.ExitStack() as stack:
        watching = []
        if config.monitor.progress:  # what `flwr run --stream` shows
            shown = progress_of(experiment)
            stack.callback(shown.close)
            watching.append(shown)
        result = train(grid, experiment, folder, resume, watching)
    headline = Metric.of(result)
    score = f"{headline.name} {headline.shown(result[headline.name])}, " if headline.name in result else ""
    print(f"fedsim: {score}results in {out}", flush=True)
    return Run(folder.root)


def _absolute(config: str) -> str:
    """Refuse a file by a path from here on: here is where the SuperLink was once started."""
    here = Path(config).suffix in (".yaml", ".yml") or Path(f"{config}.yaml").is_file()
    if here and not Path(config).expanduser().is_absolute() and not (CONFIG_DIR / f"{config}.yaml").is_file():
        raise InputError(
            "config must be the name of a configuration of fedsim's, or the absolute path of a file (the "
            f"runtime changes folders), got {config!r}."
        )
    return config


def _words(overrides: str) -> list[str]:
    try:
        return shlex.split(overrides)
    except ValueError as error:
        raise InputError(f"overrides must be words as for a shell, got {overrides!r}: {error}.") from error


def default_out(config: Config, overrides: Sequence[str] = ()) -> Path:
    """Return where a run goes that names no folder: ~/fedsim-runs/TITLE-OVERRIDES-HASH."""
    return default_folder(Path.home() / "fedsim-runs", config, overrides)


def train(
    grid: Grid,
    experiment: Experiment,
    folder: RunFolder,
    resume: bool,
    watchers: Sequence[Watcher] = (),
) -> dict[str, Any]:
    """Run a prepared experiment over a Grid and return its result; that of a finished run as it is.

    Raises:
        InputError: settings that the grid's backend refuses (fedsim.flower.deployment); nothing is started.
        RunError: a node or the machine failed; what is in `folder` can be resumed.
    """
    if (done := folder.finished()) is not None:
        return done
    config = deployment.settled(experiment.config, deployment.backend_of(grid))
    experiment = dataclasses.replace(experiment, config=config)
    remedy = f"Mend that, then continue with --resume --out {folder.root}."
    with validate.failures_as(RunError, f"the run in {folder.root} stopped", remedy):
        return _train(grid, experiment, folder, resume, watchers)


def _train(
    grid: Grid, experiment: Experiment, folder: RunFolder, resume: bool, watchers: Sequence[Watcher]
) -> dict[str, Any]:
    experiment = probe.settle(experiment, folder, parallel=getattr(grid, "parallel", True))
    config = experiment.config
    located = dataclasses.replace(
        config, data=datasets.resolve(config.data), model=weights.pinned(config.model)
    )
    # In a deployment a node may have its own examples only, and no digest of others' is told.
    backend = deployment.backend_of(grid)
    together = backend != deployment.DEPLOYMENT
    train = experiment.splits.train if together else None
    setup = setup_of(located, experiment.partition, train)
    transport = GridTransport(grid, setup, config.federation.nodes)
    return Server(experiment, folder, transport, resume, backend).train(watchers)
