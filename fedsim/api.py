"""The front door: what `import fedsim` offers. The command line and Flower's apps come through here too."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedsim import given, loading, rules, validate
from fedsim.config import Config
from fedsim.data.from_python import Data
from fedsim.engine.metrics import Callbacks
from fedsim.engine.run_folder import RunFolder, default_name
from fedsim.merging import Choice
from fedsim.models.check import refuse_uncopied
from fedsim.partitions.base import as_numbers
from fedsim.partitions.given import Owners
from fedsim.run import Run
from fedsim.tasks import TASKS, Task
from fedsim.validate import InputError

if TYPE_CHECKING:
    from fedsim.engine.metrics import Watcher
    from fedsim.privacy.accountant import EpsilonResult
    from fedsim.privacy.search import Calibration

_log = logging.getLogger(__name__)
BACKENDS = ("local", "simulation")
Changes = Mapping[str, Any]


def train(
    config: str | Path | Mapping[str, Any] | Config = "base",
    *,
    model: nn.Module | str | Mapping[str, Any] | Callable[..., nn.Module] | None = None,
    data: Data | str | Mapping[str, Any] | None = None,
    task: Task | str | Mapping[str, Any] | None = None,
    partition: Any = None,
    callbacks: Sequence[Callable[[int, dict[str, float | None]], Any]] = (),
    out: str | Path | None = None,
    resume: bool = False,
    backend: str = "local",
    **overrides: Any,
) -> Run:
    """Train by a configuration and return the finished run.

    Args:
        config: name of a configuration, YAML file, mapping of settings, or a Config.
        model: a module (a copy of it is trained, from its own weights on), a function or class that makes
            one, or what a configuration may say of the model: a name, package.module:Object, or a mapping.
        data: examples from Python (`fedsim.Data`), or what a configuration may say.
        task: a task, or what a configuration may say.
        partition: the holder of each training example, (N,) of any words or numbers (default: the owners that
            `fedsim.Data` has, if any); a function (material, holders, rng) -> (N,) holders 0 .. holders - 1,
            whose material has `examples` (N), `strata` (their labels) and `groups` (their owners), as
            `fedsim.partitions.base.Material`; or what a configuration may say.
        callbacks: functions of (completed steps, numbers by name), called after every step.
        out: folder of the run; default: a new one below runs/, with resume the newest of this configuration.
        resume: continue what the folder holds; a finished run is returned as it is.
        backend: "local", in this process, or "simulation", Flower's, whose processes need every object named
            as package.module:Object.
        **overrides: settings by section, as privacy={"target_epsilon": 3.0}, train={"steps": 100}, seed=1;
            functions and classes may stand where names of objects of your own may.

    Shows a bar in a terminal and one line in a notebook, unless monitor={"progress": False}. The global
    generators of Python, numpy and torch are left as they are: draws follow from `seed` alone.

    Raises:
        InputError: something is wrong; nothing was started.
        RunError: the run stopped and can be resumed.
        KeyboardInterrupt: it was interrupted, and can be resumed; a note says how, as with whatever a
            callback raises.

    Examples:
        Two steps of the main job, whose noise is calibrated so that they reach epsilon 1:

        >>> import fedsim
        >>> run = fedsim.train(
        ...     "quickstart",
        ...     privacy={"target_epsilon": 1.0},
        ...     train={"steps": 2},
        ...     monitor={"tensorboard": False, "progress": False},
        ... )
        >>> run.ledger.steps, run.result["holders"], round(run.epsilon, 2)
        (2, 100, 1.0)
    """
    validate.one_of(resume, (True, False), "resume")
    watchers: list[Watcher] = [Callbacks(callbacks)] if callbacks else []
    chosen = _configured(config, model, data, task, partition, overrides)
    folder = RunFolder(_folder(chosen, resume) if out is None else validate.path(out, "out").expanduser())
    folder.expect(resume)
    try:
        run(chosen, folder, backend, resume, watchers)
    except BaseException as stopped:  # FedsimErrors say themselves what to do
        if folder.config.exists() and not isinstance(stopped, validate.FedsimError):
            stopped.add_note(
                f"fedsim: the run in {folder.root} was interrupted. To go on, call fedsim.train with the "
                f"same arguments, out={str(folder.root)!r} and resume=True."
            )
        raise
    return Run(folder.root)


def run(
    config: Config,
    folder: RunFolder,
    backend: str,
    resume: bool,
    watchers: Sequence[Watcher] = (),
    progress: bool | None = None,
    *,
    searching: bool = False,
) -> dict[str, Any]:
    """Check everything, then train; a finished run's result is returned as it is.

    Args:
        config: what to run.
        folder: where.
        backend: one of BACKENDS.
        resume: continue what the folder holds.
        watchers: fed after every step.
        progress: show a progress bar; None: as monitor.progress says.
        searching: it is a trial of a private search, by `fedsim.study.private_tune`; outside of one a
            configuration that says so is refused.
    """
    import torch

    from fedsim.engine.experiment import prepare
    from fedsim.engine.progress import progress_of
    from fedsim.engine.setup import forget_nodes
    from fedsim.grads.bookkeeping.memory import retain_freed_memory

    validate.one_of(backend, BACKENDS, "backend")
    if local := [name for name in config.references() if given.is_given(name)]:
        forget_nodes()  # their objects may have changed under the same name
    if backend != "local" and local:
        kinds = dict.fromkeys(given.kind_of(name) for name in local)
        raise InputError(
            f"backend must be local for objects handed in from Python ({', '.join(kinds)}): Flower's "
            "processes do not have them. Put them into a module and name them as package.module:Object."
        )
    retain_freed_memory()
    folder.check(config, resume)
    if (done := folder.finished()) is not None:
        folder.check_code(config)
        held = loading.load(folder.config) if folder.config.exists() else config
        if held.data.root != config.data.root:
            _log.warning("%s is a finished run of the data in %s.", folder.root, held.data.root)
        return done
    if not searching:
        rules.refuse_outside_search(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # what is made within a caller's has no gradients
        stack.callback(torch.set_num_threads, torch.get_num_threads())  # engine.threads is for the run alone
        experiment = prepare(config)
        watching = list(watchers)
        if config.monitor.progress if progress is None else progress:
            bar = progress_of(experiment)
            stack.callback(bar.close)
            watching.append(bar)
        if backend == "simulation":
            from fedsim.flower.launch import simulate

            return simulate(config, folder, resume, watching)
        from fedsim.flower.client_app import app
        from fedsim.flower.local_grid import LocalGrid
        from fedsim.flower.server_app import train as train_on

        return train_on(LocalGrid(app, config.federation.nodes), experiment, folder, resume, watching)


def check(
    config: str | Path | Mapping[str, Any] | Config = "base",
    *,
    model: Any = None,
    data: Any = None,
    task: Any = None,
    partition: Any = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Return the dry run of a configuration: plan, noise, epsilon, operations, memory, bytes; trains nothing.

    Arguments as of `train`.

    Examples:
        >>> import fedsim
        >>> plan = fedsim.check("quickstart")
        >>> plan["examples"], plan["holders"]["holders"], round(plan["epsilon"]["example"]["value"], 2)
        (10000, 100, 3.0)
    """
    from fedsim.study import plan

    return plan.describe(_configured(config, model, data, task, partition, overrides))


def compare(
    source: str | Path, *, out: str | Path, overrides: Sequence[str] = (), backend: str = "local"
) -> Any:
    """Run the missing cells of a comparison, write its report into `out`, and return the cells.

    Args:
        source: YAML file of a comparison, or its name under configs/.
        out: folder of the comparison: runs/, report.html, table.md, table.csv, cells.json.
        overrides: "key=value" strings for all cells.
        backend: as of `train`.
    """
    import sys

    from fedsim.study import compare as study

    def runner(config: Config, folder: RunFolder) -> dict[str, Any]:
        return run(config, folder, backend, resume=True, progress=False)

    def typed(given: Sequence[str]) -> str:
        return f"fedsim.compare({str(source)!r}, out=..., overrides={list(given)!r})"

    return study.run(
        study.load(source), list(overrides), validate.path(out, "out"), runner, sys.stderr, typed
    )


def load_run(folder: str | Path, model: nn.Module | None = None, task: Task | None = None) -> Run:
    """Return the finished run in a folder; `model` and `task` as of `fedsim.run.Run`."""
    return Run(folder, model, task)


def epsilon(
    noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: str = "pld"
) -> EpsilonResult:
    """Return what so many steps of the Poisson-sampled Gaussian mechanism spend, an example added or removed.

    Args:
        noise_multiplier: noise standard deviation over the L2 bound of one example.
        sampling_rate: chance of an example to be in a step, in (0, 1].
        steps: number of steps.
        delta: of the guarantee.
        accountant: "pld" or "rdp".

    Raises:
        InputError: a number out of range, or no such accountant.

    Examples:
        Ten epochs of batches of 600 of 60,000 examples:

        >>> import fedsim
        >>> spent = fedsim.epsilon(noise_multiplier=1.1, sampling_rate=0.01, steps=1000, delta=1e-5)
        >>> round(spent.value, 2), spent.relation, spent.accountant
        (1.52, 'add/remove one', 'pld')
    """
    from fedsim.privacy import accountant as accountants
    from fedsim.privacy import events

    total = events.composed(events.gaussian_step(noise_multiplier, sampling_rate), steps)
    return accountants.epsilon(total, delta, accountant, "example")


def calibrate(
    target_epsilon: float, sampling_rate: float, steps: int, delta: float, accountant: str = "pld"
) -> Calibration:
    """Return the smallest noise multiplier found for a target epsilon; arguments as of `epsilon`.

    Raises:
        InputError: as of `epsilon`, or the target cannot be reached; names the nearest that can.

    Examples:
        >>> import fedsim
        >>> found = fedsim.calibrate(target_epsilon=3.0, sampling_rate=0.01, steps=1000, delta=1e-5)
        >>> round(found.noise_multiplier, 2), found.achieved.value <= 3.0, found.verified.accountant
        (0.81, True, 'rdp')
    """
    from fedsim.privacy import search
    from fedsim.privacy.family import EventFamily

    family = EventFamily.gaussian(sampling_rate)
    return search.noise_multiplier_for(target_epsilon, delta, family, steps, accountant)


def _configured(
    config: str | Path | Mapping[str, Any] | Config,
    model: Any,
    data: Any,
    task: Any,
    partition: Any,
    overrides: Changes,
) -> Config:
    """Return the configuration with what was handed in, by names under which this process has it."""
    changes: dict[str, Any] = {name: _plain(name, value) for name, value in overrides.items()}
    for section, chosen in (("model", model), ("data", data), ("task", task)):
        if chosen is not None:
            _set(changes, section, _plain(section, _named(section, chosen)))
    if isinstance(model, nn.Module) and {p.dtype for p in model.parameters()} == {torch.float64}:
        changes["model"].setdefault("dtype", "float64")
    said = overrides.get("federation")
    if isinstance(said, Mapping) and isinstance(said.get("partition"), list | tuple | np.ndarray):
        raise InputError("federation.partition must be a scheme. The holder of each example is partition=...")
    if partition is not None:
        scheme = _scheme(partition)
        federation = changes.setdefault("federation", {})
        federation["partition"] = _plain("partition", _named("partition", scheme))
        count = scheme.count if isinstance(scheme, Owners) else None
        if count is not None:
            _holders(changes, count)
    if isinstance(data, Data) and data.holders is not None:
        federation = changes["federation"] = dict(changes.get("federation") or {})
        if "federation.partition" not in changes and not loading.says(config, "federation.partition"):
            federation.setdefault("partition", "natural")
        chosen = changes.get("federation.partition") or federation.get("partition")
        if (chosen.get("name") if isinstance(chosen, Mapping) else chosen) == "natural":
            _holders(changes, data.holders)
    return loading.loaded(config, changes)


def _holders(changes: dict[str, Any], count: int) -> None:
    """Set the number of holders, and of nodes that can host them, where nothing is said of it."""
    federation = changes["federation"] = dict(changes.get("federation") or {})
    federation.setdefault("holders", count)
    federation.setdefault("nodes", min(2, count))


def _plain(name: str, value: Any) -> Any:
    """Return settings with names in place of the objects among them, such as functions that measure."""
    if isinstance(value, Mapping):
        return {key: _plain(str(key), part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, part) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | int | float | Choice):
        return value
    return str(value) if isinstance(value, Path) else given.hold(name, given.digest_of(value), value)


def _set(changes: dict[str, Any], section: str, chosen: Any) -> None:
    """Put a choice into a section, beside what the overrides say of it."""
    said = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    changes[section] = {**changes.get(section, {}), **said}


def _scheme(partition: Any) -> Any:
    if isinstance(partition, Mapping) and not all(isinstance(key, str) for key in partition):
        raise InputError("partition must be the holder of each example, (N,), got examples by holder.")
    if isinstance(partition, str | Mapping | Choice) or callable(partition) or hasattr(partition, "spread"):
        return partition
    return Owners(tuple(as_numbers(partition).tolist()))


def _named(section: str, chosen: Any) -> Any:
    """Return what a configuration says of something: itself, or the name of an object of this process."""
    if isinstance(chosen, Mapping) and any(isinstance(value, torch.Tensor) for value in chosen.values()):
        raise InputError(
            "model must be a module, a name or settings, got weights. Give the module that has them."
        )
    if isinstance(chosen, str | Mapping):
        return chosen
    if section == "model":
        if isinstance(chosen, nn.Module):
            refuse_uncopied(chosen)
            held = copy.deepcopy(chosen)
            return given.hold("model", given.digest_of(held), lambda: copy.deepcopy(held))
    elif section == "data" and isinstance(chosen, Data):
        return given.hold("data", chosen.digest(), lambda: chosen.splits)
    elif section == "data":
        raise InputError(
            "data must be fedsim.Data(train, test, classes=...), a name or a mapping, got "
            f"{type(chosen).__name__}."
        )
    elif section == "task" and type(chosen) in (own := {cls: name for name, cls in TASKS.own().items()}):
        options = {entry.name: getattr(chosen, entry.name) for entry in dataclasses.fields(chosen)}
        return {"name": own[type(chosen)], "options": options}
    elif section == "task" and not isinstance(chosen, Task | type):
        raise InputError(
            f"task must be a fedsim task, a name or a mapping, got {type(chosen).__name__}. A loss of your "
            "own is the method `loss` of a class that derives from fedsim.Task or one of fedsim's tasks "
            "(docs/extend.md)."
        )
    return given.hold(section, given.digest_of(chosen), chosen)


def _folder(config: Config, resume: bool) -> Path:
    """The first folder below runs/ that holds no run of this configuration; to resume, the last that does."""
    base, number = Path("runs") / default_name(config), 1
    last = folder = base
    while folder.exists():
        number += 1
        last, folder = folder, base.with_name(f"{base.name}-{number}")
    return last if resume else folder
