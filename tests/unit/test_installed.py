"""An installed package: a wheel of this checkout runs in another folder, whatever lies there (30 s)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import contextlib, io, json
import fedsim
from fedsim.cli import main

def command(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([*arguments, "--json"]) == 0
    return json.loads(said.getvalue())

few = ("train.steps=2", "train.eval_every=2", "monitor.tensorboard=false", "monitor.progress=false")
result = command("run", "quickstart", *few)
plan = command("check", "quickstart")["plan"]
cells = command("compare", "two.yaml", *few)
steps = {"steps": 2, "eval_every": 2}
run = fedsim.train("quickstart", out="from_python", train=steps, monitor={"progress": False})
loaded = fedsim.load_run("from_python")
print(json.dumps({
    "file": fedsim.__file__, "steps": result["steps"], "epsilon": result["epsilon"]["example"]["value"],
    "examples": plan["examples"], "variants": [cell["variant"] for cell in cells],
    "of_python": [run.epsilon, run.score, loaded.ledger.steps],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    copy = folder / "checkout"  # building writes beside the sources
    for name in ("fedsim", "strategies", "configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    done = subprocess.run([*command, "-w", str(folder), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with modules of a user's own that have the names of fedsim's folders."""
    for name in ("strategies", "configs", "tests"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n", encoding="utf-8")
    return tmp_path


def run(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment.pop("FEDSIM_DATA", None)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_all_that_commands_need_and_nothing_beside(installed: Path) -> None:
    (about,) = installed.glob("*.dist-info")
    assert {p.name for p in installed.iterdir()} == {"fedsim", about.name}
    for name in (
        "py.typed",
        "configs/base.yaml",
        "configs/compare/trust_models.yaml",
        "configs/presets/central_dpsgd.yaml",
        "strategies/central.py",
        "data/embedded/fashion_mnist_subset.npz",
    ):
        assert (installed / "fedsim" / name).is_file(), name
    checkout = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    shipped = {p.relative_to(installed / "fedsim").as_posix() for p in installed.rglob("configs/**/*.yaml")}
    assert shipped == checkout


def test_commands_and_the_front_door_run_from_any_folder(installed: Path, elsewhere: Path) -> None:
    (elsewhere / "two.yaml").write_text(
        "title: two\nrecipe: quickstart\nseeds: [0]\nvariants: {central: [], local: [preset=local_dpsgd]}\n",
        encoding="utf-8",
    )
    (elsewhere / "script.py").write_text(SCRIPT, encoding="utf-8")
    said = json.loads(run(installed, elsewhere, "script.py").splitlines()[-1])
    assert Path(said["file"]).is_relative_to(installed)
    assert (said["steps"], said["examples"], said["variants"]) == (2, 10_000, ["central", "local"])
    assert 2.9 < said["epsilon"] <= 3.0
    epsilon, score, steps = said["of_python"]
    assert (epsilon, steps) == (said["epsilon"], 2)
    assert 0.1 < score < 1.0
