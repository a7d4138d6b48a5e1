"""Run the console blocks of pages and write what came out into them.

    python -m benchmarks.executed docs/tour.md

A block that begins with ```console holds lines "$ COMMAND", each followed by its output. The commands of a
page run one after another in one scratch folder, by this environment's programs, 80 columns wide.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROOT = Path(__file__).resolve().parents[1]


class Failed(Exception):
    """A command of a page ended with an error."""


def commands(page: str) -> list[str]:
    """Return the commands of a page's console blocks, in order."""
    return [line[2:] for block in BLOCK.findall(page) for line in block.splitlines() if line.startswith("$ ")]


def executed(page: str, folder: Path) -> str:
    """Return the page with the output that its commands have in `folder`.

    Raises:
        Failed: one of them does not end with 0.
    """

    def run(block: re.Match[str]) -> str:
        out = [f"$ {command}\n{output(command, folder)}" for command in commands(block.group(0))]
        return "```console\n" + "\n".join(out) + "```"

    return BLOCK.sub(run, page)


def output(command: str, folder: Path) -> str:
    """Return what a command prints, in `folder`.

    Raises:
        Failed: it does not end with 0.
    """
    programs = str(Path(sys.executable).parent)
    env = os.environ | {
        "COLUMNS": "80",
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
        "PYTHONPATH": str(ROOT),
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise Failed(f"`{command}` ended with {done.returncode}:\n{done.stdout}")
    return "".join(line.rstrip() + "\n" for line in done.stdout.splitlines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pages; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.executed", description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    for path in parser.parse_args(arguments).pages:
        with tempfile.TemporaryDirectory() as folder:
            path.write_text(executed(path.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
