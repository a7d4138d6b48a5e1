"""The mistakes of mistakes.yaml, made one after the other, and the page of what fedsim says to each.

    python -m benchmarks.mistakes [--only TEXT]

Each is made in a process and a folder of its own, by what a newcomer would type: `fedsim ...`, a Python file,
or `flwr run ...`, whose server part runs here on an in-process grid (tests/flower holds that Flower's own
simulation shows the same). `benchmarks.report` writes what comes out to docs/mistakes.md.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import re
import runpy
import shlex
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedsim.validate import FedsimError

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mistakes.yaml")
SCRIPT = "mistake.py"
WIDTH, PAGE_WIDTH = 100, 118  # of the screen, and of a page's lines
NOT_ON_PURPOSE = 70  # exit code here of what no error of fedsim's ended


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        title: its heading, as one looks for it.
        wants: what the newcomer wants.
        teaches: what to know, after the message.
        shell: command lines; the last one is the mistake, those before it succeed.
        python: in its place, a script that fails at its end.
        files: by name, files that are shown.
        prepare: a script that makes what `wants` says is there; not shown.
        code: the exit code that is expected.
        says: what was expected, what came, and the remedy, as the message has them.
    """

    title: str
    wants: str
    teaches: str
    shell: str = ""
    python: str = ""
    files: dict[str, str] = field(default_factory=dict)
    prepare: str = ""
    code: int = 2
    says: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Said:
    """How a mistake ended: the exit code, and what stood on standard error."""

    code: int
    text: str


@functools.cache
def _list() -> Any:
    """What the file holds, to be read only: to parse it takes a tenth of a second."""
    return OmegaConf.to_container(OmegaConf.load(LIST), resolve=False)


def groups() -> dict[str, list[Mistake]]:
    """Return the mistakes by heading."""
    return {name: [Mistake(**one) for one in mistakes] for name, mistakes in _list()["groups"].items()}


def common() -> dict[str, str]:
    """Return the files that every folder has, by name."""
    return dict(_list()["files"])


def made(mistake: Mistake, folder: Path) -> Said:
    """Make a mistake in an empty folder, in a process of its own.

    Raises:
        RuntimeError: what must succeed before it does not.
    """
    scripts = {"prepare.py": mistake.prepare, SCRIPT: mistake.python}
    for name, content in {**common(), **mistake.files, **scripts}.items():
        (folder / name).write_text(content, encoding="utf-8")
    steps = [["python", "prepare.py"]] if mistake.prepare else []
    steps += [shlex.split(line) for line in mistake.shell.strip().splitlines()]
    steps += [["python", SCRIPT]] if mistake.python else []
    for step in steps[:-1]:
        if (said := _forked(step, folder)).code != 0:
            raise RuntimeError(f"{mistake.title}: {shlex.join(step)} must succeed: {said.text}")
    return _forked(steps[-1], folder)


def _forked(words: Sequence[str], folder: Path) -> Said:
    """Run one command in a child of this process, which has imported everything already."""
    output = folder.with_name(f"{folder.name}.err")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = NOT_ON_PURPOSE
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            secrets = str(folder / "secrets")
            os.environ.update(COLUMNS=str(WIDTH), HOME=str(folder), CUDA_VISIBLE_DEVICES="")
            os.environ.update(FEDSIM_SECRETS=secrets, FEDSIM_CALIBRATIONS="off")
            os.environ.pop("FEDSIM_DATA", None)
            os.chdir(folder)
            logging.getLogger().handlers.clear()  # of whoever called, such as pytest
            code = _run(words)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Said(code, _shown(output.read_text(encoding="utf-8"), folder))


def _run(words: Sequence[str]) -> int:
    """Run a command in this process, which then ends, and return its exit code."""
    program, arguments = words[0], list(words[1:])
    if program == "fedsim":
        from fedsim.cli import main as fedsim

        try:
            return fedsim(arguments)
        except SystemExit as stop:  # of argparse
            return int(stop.code or 0)
    if program == "flwr":
        return _flwr(arguments)
    assert program == "python", program
    sys.path.insert(0, "")
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except FedsimError as error:  # Python shows where it was raised above this, its last line
        print(f"{type(error).__module__}.{type(error).__qualname__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _flwr(arguments: Sequence[str]) -> int:
    """What `flwr run APP` does in the ServerApp's process, with as many nodes as Flower has by default."""
    import tomllib

    from flwr.app import Context, RecordDict
    from flwr.common.config import flatten_dict, fuse_dicts, parse_config_args

    from fedsim.flower import client_app, server_app
    from fedsim.flower.local_grid import LocalGrid

    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("app")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--run-config", action="append")
    parser.add_argument("--federation-config", default="num-supernodes=2")
    options = parser.parse_args(arguments)
    app = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    settings = fuse_dicts(flatten_dict(app["config"]), parse_config_args(options.run_config))
    grid = LocalGrid(client_app.app, int(options.federation_config.partition("=")[2]))
    try:
        server_app.app(grid, Context(1, 1, {}, RecordDict(), settings))
    except Exception as error:  # Flower logs it in these words
        log = logging.getLogger("flwr")
        for handler in log.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
        log.error("Simulation raised an exception", exc_info=error)
        return error.exit_code if isinstance(error, FedsimError) else NOT_ON_PURPOSE
    return 0


def _shown(text: str, folder: Path) -> str:
    """What stood on the screen, without colours, and without the folders that it was done in."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    for path in (os.path.realpath(folder), str(folder), str(ROOT)):
        plain = plain.replace(f"{path}/", "").replace(path, ".")
    return "\n".join(line.rstrip() for line in plain.splitlines()).strip() + "\n"


def _import_everything() -> None:
    """Import and read what children would, each for itself; most of it when a run needs it."""
    import torch

    import fedsim.flower.server_app
    import fedsim.study.compare  # noqa: F401
    from fedsim import api

    torch.set_num_threads(1)
    small: Any = OmegaConf.to_container(OmegaConf.create(common()["small.yaml"]))
    with tempfile.TemporaryDirectory() as folder:
        api.train(small, out=folder)


def everything(only: str = "") -> dict[str, Said]:
    """Make all mistakes, or those whose title has `only`, and return how each ended, by title."""
    _import_everything()
    found = {}
    for mistake in (mistake for mistakes in groups().values() for mistake in mistakes):
        if only.lower() in mistake.title.lower():
            with tempfile.TemporaryDirectory() as base:
                (folder := Path(base, "here")).mkdir()
                found[mistake.title] = made(mistake, folder)
    return found


def page(found: dict[str, Said] | None = None) -> str:
    """Return the page: by heading what is wanted, what is typed, what fedsim says, and what to know besides.

    Args:
        found: of `everything`; None: made anew.
    """
    found = everything() if found is None else found
    index, body = [], []
    for heading, mistakes in groups().items():
        index.append(f"* {heading}")
        index += [f"  * [{mistake.title}](#{anchor(mistake.title)})" for mistake in mistakes]
        body.append(f"## {heading}\n")
        body += [_entry(mistake, found[mistake.title]) for mistake in mistakes]
    files = "\n".join(_named(name, content) for name, content in common().items())
    intro = f"{len(found)} mistakes, made in a folder with these two files:\n\n{files}"
    return "\n".join(["", *index, "", intro, *body])


def anchor(title: str) -> str:
    """Return the anchor that GitHub and other readers of Markdown give to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _entry(mistake: Mistake, said: Said) -> str:
    files = "".join(f"{_named(name, content)}\n" for name, content in mistake.files.items())
    typed = _block("sh", mistake.shell) if mistake.shell else _block("python", mistake.python)
    text = "\n".join(_filled(line, WIDTH) for line in said.text.splitlines())
    teaches = mistake.teaches.strip() + ("" if said.code else " The run goes on.")
    return (
        f"### {mistake.title}\n\nWanted: {mistake.wants.strip()}\n\n{files}{typed}\n"
        f"{_block('text', text)}\n{_filled(teaches, PAGE_WIDTH)}\n"
    )


def _filled(line: str, width: int) -> str:
    return textwrap.fill(line, width, break_on_hyphens=False, break_long_words=False)


def _named(name: str, content: str) -> str:
    return f"`{name}`:\n\n{_block({'py': 'python'}.get(name.rpartition('.')[2], 'yaml'), content)}"


def _block(language: str, content: str) -> str:
    return f"```{language}\n{content.strip()}\n```\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the mistakes and print what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="those whose title has this")
    for title, said in everything(parser.parse_args(arguments).only).items():
        print(f"== {title} [{said.code}]\n{said.text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
