"""The notebooks of examples/notebooks/: every claim holds when the code runs, outputs are of this code,
the site has them; and what a real kernel shows of a run, interrupted or not (budget: 60 s).
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from benchmarks import notebooks, site_links, site_notebooks
from tests.unit.test_pages import anchors

NAMES = notebooks.names()
CLAIMS = {"images": 18, "tabular": 15, "text_lora": 12}
"""Assertions at least, so that none is dropped unseen."""


def test_there_are_three() -> None:
    assert set(NAMES) == set(CLAIMS)


@pytest.mark.exact
@pytest.mark.parametrize("name", NAMES)
def test_every_claim_of_a_notebook_holds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its code as it stands, cell by cell, in an empty folder, without downloads. Generators stay as the code
    alone leaves them: torch's is set by it, numpy's is not touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    held = np.random.get_state()[1].tobytes()  # noqa: NPY002
    drawn, backend = torch.get_rng_state(), matplotlib.get_backend()
    matplotlib.use("Agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for number, cell in enumerate(notebooks.code(notebooks.read(name))):
            exec(compile(cell, f"{name} cell {number + 1}", "exec"), names)
    finally:
        plt.close("all")
        matplotlib.use(backend)
        torch.set_rng_state(drawn)
    assert np.random.get_state()[1].tobytes() == held  # noqa: NPY002
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_of_this_code(name: str) -> None:
    notebook = notebooks.read(name)
    assert notebooks.belongs(notebook), f"run python -m benchmarks.notebooks {name}"
    edited = json.loads(json.dumps(notebook))
    cell = next(cell for cell in edited["cells"] if cell["cell_type"] == "code")
    cell["source"] = notebooks.text_of(cell["source"]) + "\n# one word more"
    assert not notebooks.belongs(edited)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_clean(name: str) -> None:
    """Small, run in order from the first cell on, without warnings, errors, times, or paths of a machine."""
    path = notebooks.FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < notebooks.LARGEST
    notebook = notebooks.read(name)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info", "fedsim"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = json.dumps([cell["outputs"] for cell in cells])
    said = re.sub(r'"image/png": "[^"]*"|"image/png": \[[^\]]*\]', "", shown)
    assert not re.search(r"stderr|Warning|Traceback|/tmp/|/home/|/root/|0x[0-9a-f]{6}| s left|min left", said)
    assert all(cell["metadata"] == {} for cell in notebook["cells"])


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_teaches(name: str) -> None:
    """Words before code, short cells, claims that are checked, and no number of an output in the text."""
    notebook = notebooks.read(name)
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[0] == kinds[-1] == "markdown"
    trees = [ast.parse(cell) for cell in notebooks.code(notebook)]
    asserted = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert len(asserted) >= CLAIMS[name]
    assert all(len(cell.splitlines()) <= 45 for cell in notebooks.code(notebook))
    text = " ".join(
        notebooks.text_of(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"
    )
    assert not re.search(r"\d\d\.\d|\d ?%", text), "percentages and measured numbers come from the code"


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_somewhere(name: str) -> None:
    text = json.dumps(notebooks.read(name)["cells"])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, part = target.partition("#")
        file = notebooks.FOLDER / path
        assert file.exists(), target
        assert not part or part in anchors(file.resolve().relative_to(notebooks.ROOT).as_posix()), target


@pytest.mark.parametrize("name", NAMES)
def test_the_site_shows_a_notebook(name: str) -> None:
    notebook = notebooks.read(name)
    made, pictures = site_notebooks.page(name, notebook)
    assert all(f"```python\n{cell}\n```" in made for cell in notebooks.code(notebook))
    assert len(pictures) == json.dumps(notebook).count('"image/png"') > 0
    assert all(content.startswith(b"\x89PNG") and f"({file})" in made for file, content in pictures.items())
    assert "training  step" in made
    page = SimpleNamespace(file=SimpleNamespace(src_uri=f"notebooks/{name}.md"))
    shown = site_links.on_page_markdown(site_notebooks.on_page_markdown(made, page), page)
    for target in re.findall(r"\]\(([^)\s]+)\)", shown):
        path = os.path.normpath(f"notebooks/{target.partition('#')[0]}")
        there = (notebooks.ROOT / "docs" / path).exists()
        assert there or path in site_notebooks.pages() or target in pictures, target


def test_links_to_notebooks_lead_to_their_pages() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="use.md"))
    deep = SimpleNamespace(file=SimpleNamespace(src_uri="api/index.md"))
    link = "[a](../examples/notebooks/images.ipynb), [b](other.md)"
    assert site_notebooks.on_page_markdown(link, page) == "[a](notebooks/images.md), [b](other.md)"
    link = "[a](../../examples/notebooks/images.ipynb)"
    assert site_notebooks.on_page_markdown(link, deep) == "[a](../notebooks/images.md)"


def notebook_of(code: str) -> notebooks.Notebook:
    cell = {"cell_type": "code", "id": "c", "metadata": {}, "source": code, "outputs": []}
    return {
        "cells": [cell | {"execution_count": None}],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def test_the_command_refuses_what_readers_must_not_see(tmp_path: Path) -> None:
    (good := tmp_path / "good").mkdir()
    code = "import os, time\nprint('one')\ntime.sleep(0.3)\nprint(os.path.abspath('two'))"
    made = notebooks.executed(notebook_of(code), good)
    assert notebooks.belongs(made)
    assert [notebooks.text_of(output["text"]) for output in made["cells"][0]["outputs"]] == ["one\ntwo\n"]
    (bad := tmp_path / "bad").mkdir()
    with pytest.raises(notebooks.Failed, match="division by zero"):
        notebooks.executed(notebook_of("1 / 0"), bad)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("stderr", "careful", "cell 3 writes to standard error"),
        ("stdout", f"in {notebooks.ROOT}/x", "cell 3 shows the path"),
        ("stdout", f"in {sys.prefix}/lib", "cell 3 shows the path"),
    ],
)
def test_warnings_and_paths_are_refused(name: str, text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(notebooks.Failed, match=why):
        notebooks._plain({"output_type": "stream", "name": name, "text": text}, tmp_path, 3)


class Kernel:
    """A kernel of Jupyter, what its cells show, and a way to interrupt it as a reader does."""

    def __init__(self, folder: Path) -> None:
        from jupyter_client.manager import start_new_kernel

        (folder / "work").mkdir()
        self._manager, self._client = start_new_kernel(
            kernel_name="python3",
            cwd=str(folder / "work"),
            env=notebooks.environment(folder),
            extra_arguments=["--log-level=ERROR"],
        )

    def run(self, code: str, interrupt_at: str | None = None) -> list[dict[str, Any]]:
        """Run a cell and return its messages; interrupt once something shown contains `interrupt_at`."""
        asked = self._client.execute(code)
        found: list[dict[str, Any]] = []
        until = time.monotonic() + 200
        while time.monotonic() < until:
            message = self._client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return found
            if kind not in ("status", "execute_input"):
                found.append({"kind": kind, **content})
            if interrupt_at is not None and interrupt_at in json.dumps(content.get("data", "")):
                interrupt_at = None
                self._manager.interrupt_kernel()
        raise AssertionError(f"no end of {code}")

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    made = Kernel(tmp_path)
    yield made
    made.close()


SETUP = """
import fedsim
S = {"data": {"train_examples": 2000, "test_examples": 200}, "model": "mlp", "federation": {"holders": 10},
     "privacy": {"target_epsilon": 3.0}, "monitor": {"tensorboard": False},
     "train": {"steps": 60, "expected_batch_size": 400, "eval_every": 5, "checkpoint_every": 5}}
"""


def test_in_a_kernel_a_run_is_one_line_that_can_be_interrupted_and_resumed(kernel: Kernel) -> None:
    assert kernel.run(SETUP) == []
    messages = kernel.run("run = fedsim.train(**S)", interrupt_at="step 10/60")
    shown = [message for message in messages if "data" in message]
    assert shown[0]["kind"] == "display_data"
    assert {message["kind"] for message in shown[1:]} == {"update_display_data"}, "one line, drawn anew"
    assert len({message["transient"]["display_id"] for message in shown}) == 1
    lines = [message["data"]["text/plain"] for message in shown]
    assert lines[0].startswith("training  step 0/60")
    assert any(
        re.search(r"step \d+/60  \d+ s left  epsilon [\d.]+ .*accuracy [\d.]+%", line) for line in lines
    )
    assert " left" not in lines[-1], "what is left in the notebook says no time"
    (error,) = [message for message in messages if message["kind"] == "error"]
    assert error["ename"] == "KeyboardInterrupt"
    assert "resume=True" in "\n".join(error["traceback"])
    assert [message for message in messages if message["kind"] == "stream"] == []
    kernel.run("run = fedsim.train(**S, resume=True); folder = run.folder")
    compared = """
again = fedsim.train(**S)
print(again.folder != folder, run.epsilon == again.epsilon, run.ledger.steps,
      all(map(lambda a, b: a.equal(b), run.model.parameters(), again.model.parameters())))
"""
    (printed,) = [m["text"] for m in kernel.run(compared) if m["kind"] == "stream"]
    assert printed == "True True 60 True\n"
