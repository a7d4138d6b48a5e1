"""The shell completes commands, options, names of configurations, settings and their values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim import axes, loading
from fedsim.cli import proposals
from fedsim.config import CONFIG_DIR
from fedsim.merging import schema_of
from tests.conftest import command

ROOT = Path(__file__).resolve().parents[2]


def proposed(line: str, folder: Path) -> list[str]:
    """What the program answers when the shell asks it about a line whose end is the cursor."""
    answer = folder / "answer"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    asked = [sys.executable, "-c", "import sys; from fedsim.cli import main; sys.exit(main())"]
    done = subprocess.run(asked, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return answer.read_text().split("\n")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("fedsim cali", ["calibrate "]),
        ("fedsim run quick", ["quickstart "]),
        ("fedsim compare compare/lab", ["compare/label_skew "]),
        ("fedsim tune tune/q", ["tune/quickstart "]),
        ("fedsim run mine/", ["mine/own.yaml "]),
        ("fedsim run quickstart privacy.target", ["privacy.target_epsilon="]),
        ("fedsim run quickstart optimizer.name=ad", ["optimizer.name=adam", "optimizer.name=adamw"]),
        ("fedsim run quickstart monitor.tensorboard=f", ["monitor.tensorboard=false "]),
        ("fedsim run quickstart --backend si", ["simulation "]),
    ],
)
def test_what_the_shell_proposes(line: str, answer: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text("extends: quickstart\n")
    (tmp_path / "mine" / "notes.txt").write_text("")
    assert proposed(line, tmp_path) == answer


def test_bash_itself_completes_by_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    program = tmp_path / "fedsim"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom fedsim.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    asked = "COMP_LINE='fedsim epsi'; COMP_POINT=11; COMP_WORDS=(fedsim epsi); COMP_CWORD=1"
    function = "$(complete -p fedsim | sed 's/.*-F //; s/ .*//')"
    code = f"source ./script; {asked}; {function} fedsim epsi; echo $COMPREPLY"
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "epsilon", done.stderr


@pytest.mark.parametrize(("shell", "start"), [("zsh", "compdef"), ("fish", "complete --command fedsim")])
def test_scripts_for_other_shells_register_the_command(
    shell: str, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["completion", shell]) == 0
    assert start in capsys.readouterr().out


def test_an_unknown_shell_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(["completion", "tcsh"])
    assert stop.value.code == 2
    assert "(choose from 'bash', 'zsh', 'fish')" in capsys.readouterr().err


def test_every_setting_is_proposed_and_values_are_those_that_can_be_chosen() -> None:
    held = proposals._settings()
    for section, inner in schema_of(loading.Config).items():
        if hasattr(inner, "keys") and len(inner) and section not in ("reference",):
            for name in inner:
                path = f"{section}.{name}"
                assert path in held or any(known.startswith(f"{path}.") for known in held), path
        else:
            assert str(section) in held
    for setting, variants in axes.described().items():
        values = held.get(f"{setting}.name") or held[setting]
        if values:  # lists, and what is null at first, say theirs in another form
            assert set(values) <= {*variants, "null"}, setting
    assert set(held["optimizer.name"]) == set(axes.described()["optimizer.name"])


def test_recipes_are_proposed_for_run_and_others_are_not() -> None:
    class Run:
        command = "run"

    found = [
        name
        for name in proposals.configurations("", Run())
        if (CONFIG_DIR / f"{name}.yaml").is_file()  # type: ignore[arg-type]
    ]
    assert "quickstart" in found
    assert not any(name.startswith(("compare/", "tune/", "tuned/", "presets/")) for name in found)
    for name in found:
        loading.find(name)
