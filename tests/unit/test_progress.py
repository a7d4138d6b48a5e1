"""What is shown while a run goes on, in a terminal, a notebook and elsewhere; interrupted and repeated calls.

In a real kernel: `tests/examples/test_notebooks.py`.
"""

from __future__ import annotations

import io
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import fedsim
from fedsim.engine import progress
from fedsim.engine.metrics import Metrics
from fedsim.engine.progress import ConsoleProgress, NotebookProgress
from fedsim.headline import Metric
from fedsim.types import StepRecord
from fedsim.visibility import Public, Sensitive
from tests.conftest import small

ACCURACY = Metric("accuracy", "%")
ROOT = Path(__file__).resolve().parents[2]


class Shown:
    """IPython's display, and the handle it returns: keeps what was drawn."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def __call__(self, line: Any, display_id: bool) -> Shown:
        assert display_id
        self.lines.append(line)
        return self

    def update(self, line: Any) -> None:
        self.lines.append(line)

    @property
    def words(self) -> list[str]:
        return [repr(line) for line in self.lines]


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(step: int, **numbers: Any) -> StepRecord:
    return StepRecord(step, numbers, {})


def test_a_notebook_shows_step_time_left_epsilon_and_score_in_one_line() -> None:
    shown, clock = Shown(), Clock()
    line = NotebookProgress(40, ACCURACY, "demo", display=shown, clock=clock)
    assert shown.words == ["demo  step 0/40  epsilon -  test accuracy -"]
    clock.now = 100.0  # the first step takes longer: it does not count
    line.write(record(1))
    clock.now = 118.0
    score = {"accuracy": Public(0.5), "epsilon": Public(1.25), "n_delta": Public(0.1)}
    line.write(record(10, **score, train_loss=Sensitive(9.0)))
    assert (
        shown.words[-1] == "demo  step 10/40  60 s left  epsilon 1.25 (N x delta 0.1)  test accuracy 50.00%"
    )
    assert 'value="10" max="40"' in shown.lines[-1]._repr_html_()
    line.close()
    assert shown.words[-1] == "demo  step 10/40  epsilon 1.25 (N x delta 0.1)  test accuracy 50.00%"


@pytest.mark.parametrize("timed", [True, False])
def test_nothing_is_drawn_after_the_last_step_but_to_take_times_away(timed: bool) -> None:
    """When a run that writes public numbers only has computed its result is nobody's business."""
    shown, clock = Shown(), Clock()
    line = NotebookProgress(3, ACCURACY, display=shown, clock=clock, timed=timed)
    for step in (1, 2, 3):
        clock.now += 0.01
        line.write(record(step, epsilon=Public(1.0 + step), n_delta=Public(0.1)))
    assert "step 3/3" in shown.words[-1], "the last step is drawn however soon it comes"
    drawn = len(shown.lines)
    for _ in range(3):
        line.close()
    assert len(shown.lines) - drawn == timed
    assert shown.words[-1] == "training  step 3/3  epsilon 4 (N x delta 0.1)  test accuracy -"


def test_a_notebook_is_not_flooded_and_sees_every_evaluation() -> None:
    shown, clock = Shown(), Clock()
    line = NotebookProgress(1000, ACCURACY, display=shown, clock=clock)
    for step in range(1, 1001):
        clock.now += 0.001
        line.write(record(step, **({"accuracy": Public(0.5)} if step % 100 == 0 else {})))
    assert len(shown.lines) < 25
    assert sum(f"step {step}/" in words for words in shown.words for step in range(100, 1001, 100)) == 10


def test_titles_and_words_are_no_html() -> None:
    shown = Shown()
    NotebookProgress(2, Metric("a<b"), "<script>", display=shown)
    made = shown.lines[0]._repr_html_()
    assert "<script>" not in made
    assert "a&lt;b" in made


@pytest.mark.parametrize("timed", [True, False])
def test_public_only_shows_no_times_and_nothing_sensitive(timed: bool) -> None:
    """Scores on held-out private examples are sensitive, and so are seconds: they follow the draw."""
    shown, clock, screen = Shown(), Clock(), io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    views = [
        NotebookProgress(9, ACCURACY, display=shown, clock=clock, timed=timed),
        ConsoleProgress(9, ACCURACY, "t", terminal, timed=timed),
    ]
    with Metrics(views, public_only=not timed) as metrics:
        for step in range(1, 9):
            clock.now += 10.0
            metrics.write(record(step, accuracy=Sensitive(0.5), epsilon=Public(1.0), n_delta=Public(0.1)))
    assert any("s left" in words for words in shown.words) is timed
    assert ("50.00%" in "".join(shown.words)) is timed
    assert ("-:--:--" in screen.getvalue() or "0:00:" in screen.getvalue()) is timed
    assert ("50.00%" in screen.getvalue()) is timed
    assert "epsilon 1" in shown.words[-1]


@pytest.mark.parametrize("public_only", [False, True])
def test_a_run_in_a_kernel_shows_one_line(
    public_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Shown()
    monkeypatch.setattr(progress, "notebooks_display", lambda: shown)
    monitor = {"tensorboard": False, "progress": True, "public_only": public_only}
    run = fedsim.train(small(), monitor=monitor, out=tmp_path / "run")
    assert shown.words[0].startswith("training  step 0/6  ")
    assert shown.words[-1].startswith("training  step 6/6  epsilon ")
    assert shown.words[-1].endswith(f"test accuracy {run.headline.shown(run.score)}")
    assert not (public_only and "left" in "".join(shown.words))
    monitor["progress"] = False
    count = len(shown.lines)
    fedsim.train(small(), monitor=monitor, out=tmp_path / "silent")
    assert len(shown.lines) == count


def test_a_kernel_is_one_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def display() -> None: ...

    ipython = types.ModuleType("IPython")
    inner = types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: None  # type: ignore[attr-defined]
    inner.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    assert progress.notebooks_display() is None, "imported, and not running"
    monkeypatch.setattr(ipython, "get_ipython", lambda: types.SimpleNamespace())
    assert progress.notebooks_display() is None, "at a terminal"
    monkeypatch.setattr(ipython, "get_ipython", lambda: types.SimpleNamespace(kernel=1))
    assert progress.notebooks_display() is display


def test_nothing_of_ipython_is_imported() -> None:
    code = "import sys, fedsim.engine.progress as p; p.notebooks_display();print('IPython' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("reason", [KeyboardInterrupt, StopIteration, ValueError])
def test_an_interrupted_call_says_how_to_go_on_and_going_on_is_exact(
    reason: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def stop(step: int, numbers: dict[str, Any]) -> None:
        if step == 3:
            raise reason

    with pytest.raises(reason) as caught:
        fedsim.train(small(), callbacks=[stop])
    (folder,) = (tmp_path / "runs").iterdir()
    (note,) = caught.value.__notes__
    assert f"out={str(folder)!r} and resume=True" in note
    with pytest.raises(fedsim.InputError, match=r"unfinished run .* resume=True"):
        fedsim.train(small(), out=folder)
    resumed = fedsim.train(small(), resume=True)
    assert resumed.folder == folder
    anew = fedsim.train(small())
    assert anew.folder != folder
    assert all(map(torch.equal, resumed.model.parameters(), anew.model.parameters()))
    again = fedsim.train(small(), resume=True)
    assert again.folder == anew.folder, "the newest"
    assert again.result == anew.result


def test_calls_are_independent_of_each_other_and_leave_the_process_as_it_was(tmp_path: Path) -> None:
    """The same seed gives the same numbers, whatever ran between; generators and threads stay."""

    def state() -> tuple[Any, ...]:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        own = torch.get_rng_state().numpy().tobytes()
        return own, kind, keys.tobytes(), *rest, torch.get_num_threads(), torch.is_grad_enabled()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        held, threads = state(), set()
        see = [lambda *_: threads.add(torch.get_num_threads())]
        first = fedsim.train(small(), out=tmp_path / "first", engine={"threads": 1})
        fedsim.train(small(), out=tmp_path / "other", seed=5)
        assert state() == held
        np.random.random(3)  # noqa: NPY002
        torch.rand(3)
        second = fedsim.train(small(), out=tmp_path / "second", engine={"threads": 1}, callbacks=see)
    finally:
        torch.set_num_threads(before)
    assert threads == {1}, "its nodes were there already"
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))
    assert first.history("epsilon")[1].tolist() == second.history("epsilon")[1].tolist()


_STATES = """
import random, sys
import numpy as np, torch
from tests.conftest import small
import fedsim

def states():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()

out, images = sys.argv[1], np.zeros((1, 28, 28, 1), np.uint8)
calls = {
    "check": lambda: fedsim.check(small()),
    "train": lambda: fedsim.train(small("monitor.progress=true", "monitor.tensorboard=true"), out=out),
    "load": lambda: fedsim.load_run(out).model,
    "predict": lambda: fedsim.predict(out, images),
    "export": lambda: fedsim.export(out, out + "-exported"),
    "epsilon": lambda: fedsim.epsilon(1.0, 0.1, 10, 1e-5),
    "calibrate": lambda: fedsim.calibrate(3.0, 0.1, 10, 1e-5),
    "server_app": lambda: __import__("fedsim.flower.server_app"),
    "resume": lambda: fedsim.train(small(), out=out, resume=True),
}
for name, call in calls.items():
    before = states()
    call()
    assert states() == before, name

random.seed(7)
drawn = []
fedsim.train(small(), out=out + "-2", callbacks=[lambda *_: drawn.append(random.random())])
random.seed(7)
assert drawn == [random.random() for _ in drawn] and len(drawn) == 6, "what a callback draws stays drawn"
"""


def test_no_call_moves_global_generators_not_even_by_what_it_imports(tmp_path: Path) -> None:
    """In a process of its own, where nothing has been imported before: rich draws when it is."""
    code = [sys.executable, "-c", _STATES, str(tmp_path / "run")]
    done = subprocess.run(code, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_history_has_arrays_by_name(tmp_path: Path) -> None:
    run = fedsim.train(small(), out=tmp_path, train={"eval_every": 2})
    steps, scores = run.history("accuracy")
    assert steps.tolist() == [2, 4, 6]
    assert (steps.dtype, scores.dtype) == (np.int64, np.float64)
    assert scores[-1] == run.score
    assert run.history("epsilon")[1][-1] == pytest.approx(run.epsilon)
    assert run.history("sum_norm")[0].tolist() == [1, 2, 3, 4, 5, 6]
    for name in ("acuracy", "step"):
        with pytest.raises(fedsim.InputError, match=r"name must be one of accuracy, .*loss.*got"):
            run.history(name)


def test_the_history_of_a_public_run_has_public_numbers_alone(tmp_path: Path) -> None:
    run = fedsim.train(small(), out=tmp_path, monitor={"public_only": True, "tensorboard": False})
    with pytest.raises(fedsim.InputError, match="name must be one of"):
        run.history("train_loss")
