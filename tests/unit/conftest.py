"""What tests of studies share: a small comparison, and the folder it was run in."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedsim.report import comparison
from fedsim.report.cells import Cell
from fedsim.report.page import About
from tests.conftest import SMALL, command

TINY = """
title: tiny
recipe: base
seeds: [0, 1]
epsilons: [2, 20]
overrides: [{overrides}]
variants:
  central: []
  nonprivate: [preset=nonprivate, privacy.target_epsilon=null, privacy.clip_norm=1.0]
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return _write_tiny(tmp_path / "tiny.yaml")


def _write_tiny(path: Path) -> Path:
    given = [s for s in SMALL if not s.startswith("privacy.target") and not s.startswith("privacy.noise")]
    path.write_text(TINY.format(overrides=", ".join([*given, "train.eval_every=2"])))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of six runs, to be read only; `tiny.yaml` lies beside it."""
    folder = tmp_path_factory.mktemp("comparison")
    _write_tiny(folder / "tiny.yaml")
    write = comparison.write

    def at_the_end(cells: Sequence[Cell], about: About, out: Path) -> None:
        if len(cells) == about.runs:  # what it says before is a test of its own
            write(cells, about, out)

    with contextlib.redirect_stderr(io.StringIO()) as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "write", at_the_end)
        assert command(["compare", str(folder / "tiny.yaml"), "--out", str(folder / "out")]) == 0
    (folder / "log").write_text(log.getvalue())
    return folder / "out"


@pytest.fixture
def kept(finished: Path, tmp_path: Path) -> tuple[str, Path]:
    """The comparison, and a folder in which its runs are finished."""
    shutil.copytree(finished, tmp_path / "runs" / "compare" / "tiny")
    source = shutil.copy(finished.parent / "tiny.yaml", tmp_path / "holders.yaml")
    return str(source), tmp_path / "runs"
