"""Shared by all tests: one thread, isolated folders, and a short way to run a small configuration."""

from __future__ import annotations

import os

# Before numpy and torch are imported: their pools of threads would wait for each other's work on full cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["FEDSIM_CALIBRATIONS"] = "off"  # a test that passes must not owe it to an earlier run

import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedsim import loading
from fedsim.accountants import renyi
from fedsim.config import Config
from fedsim.privacy import accountant, loss_distribution
from fedsim.privacy.accountant import EpsilonResult
from fedsim.privacy.ledger_view import LedgerView

SMALL = (
    "data.train_examples=400",
    "data.test_examples=100",
    # Smooth: where rounding decides the argmax of a max-pool, float32 runs part by more than rounding.
    "model.name=mlp",
    "federation.holders=10",
    "federation.nodes=2",
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=1.0",
    "privacy.clip_norm=0.5",
    "train.steps=6",
    "train.expected_batch_size=60",
    "train.eval_every=6",
    "train.checkpoint_every=2",
    "optimizer.name=momentum",
    "optimizer.options.momentum=0.9",
    "optimizer.learning_rate=0.1",
    "engine.physical_batch_size=64",
    "monitor.tensorboard=false",
    "monitor.progress=false",
)


FULL_GRID = loss_distribution._MAX_SINGLE_MIXTURE
FULL_ORDERS = {kind: kind.orders for kind in (renyi.Rdp, renyi.RdpInteger)}
_numbers = itertools.count()
_of_the_last_test = [False]  # whether it was marked `exact`


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _disks_that_do_not_wait() -> Iterator[None]:
    """To synchronise what a small run writes takes longer than the run, and no test pulls a plug: descriptors
    are looked at, and not waited for. Commands in processes of their own do wait."""

    def looked_at(descriptor: int) -> None:
        os.fstat(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", looked_at)
        yield


@pytest.fixture(autouse=True, scope="session")
def _epsilon_on_coarse_grids() -> Iterator[None]:
    """The grids of whole holders take seconds each, and Renyi DP at all orders a tenth of one; coarse ones
    bound epsilon too. For the whole session: also for the runs that fixtures of a module make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_distribution, "_MAX_SINGLE_MIXTURE", 250)
        for kind, orders in FULL_ORDERS.items():
            patch.setattr(kind, "orders", (*orders[:-1:8], orders[-1]))
        yield


@pytest.fixture(autouse=True)
def _epsilon_on_its_own_grids(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of epsilon itself are marked `exact`."""
    exact = request.node.get_closest_marker("exact") is not None
    if exact:
        monkeypatch.setattr(loss_distribution, "_MAX_SINGLE_MIXTURE", FULL_GRID)
        for kind, orders in FULL_ORDERS.items():
            monkeypatch.setattr(kind, "orders", orders)
    if exact is not _of_the_last_test[0]:
        _of_the_last_test[0] = exact
        accountant.epsilon_of_parts.cache_clear()  # does not ask for the grid of what it holds


def without_epsilon(patch: pytest.MonkeyPatch) -> None:
    """Let ledgers answer at once, always the same: for tests of runs that look at no epsilon."""
    nothing = EpsilonResult(1.0, 1e-5, "", "", "example", "")
    for name in ("epsilon", "holder_epsilon"):
        patch.setattr(LedgerView, name, lambda self, *_: nothing)
    patch.setattr(
        LedgerView,
        "example_epsilon",
        lambda self: None if self.header.example_noise_factor is None else nothing,
    )


@pytest.fixture
def epsilon_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    without_epsilon(monkeypatch)


@pytest.fixture(autouse=True)
def _private_secrets(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every test has a place for secrets of its own: in its folder, if it asks for one."""
    if "tmp_path" in request.fixturenames:
        folder = request.getfixturevalue("tmp_path") / "secrets"
    else:
        folder = tmp_path_factory.getbasetemp() / f"secrets {next(_numbers)}"
    monkeypatch.setenv("FEDSIM_SECRETS", str(folder))


def small(*overrides: str) -> Config:
    """Return a configuration that trains in about a second."""
    return copy.deepcopy(_small(os.getcwd(), overrides))


@functools.lru_cache(maxsize=512)  # many tests ask for the same ones
def _small(folder: str, overrides: tuple[str, ...]) -> Config:
    return loading.load("base", [*SMALL, *overrides], Path(folder))


def train(
    config: Config, out: Path, *, resume: bool = False, client: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Train with the local engine, through Flower messages, and return the result."""
    from fedsim.engine.experiment import prepare
    from fedsim.engine.run_folder import RunFolder
    from fedsim.flower.client_app import app
    from fedsim.flower.local_grid import LocalGrid
    from fedsim.flower.server_app import train as train_on

    folder = RunFolder(out)
    folder.check(config, resume)
    return train_on(LocalGrid(client or app, config.federation.nodes), prepare(config), folder, resume)


def final(out: Path) -> Tensor:
    """Return the released parameters of a run as one flat vector, sorted by name."""
    held = load_file(out / "final.safetensors")
    return torch.cat([held[name].flatten() for name in sorted(held)])


def command(arguments: Sequence[str]) -> int:
    """Run the `fedsim` command in this process and return its exit code."""
    from fedsim.cli import main

    return main(list(arguments))


def forked(arguments: Sequence[str], output: Path) -> int:
    """Run the `fedsim` command in a process of its own, what it prints into a file; return its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            code = command(arguments)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def child_that(works: Callable[[], Any]) -> int:
    """Start a process that does something, and return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            works()
            code = 0
        finally:
            os._exit(code)
    return child


def end_of(child: int) -> int:
    """Wait for a process, and return how it ended: 0, or less for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
