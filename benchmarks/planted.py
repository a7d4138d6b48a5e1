"""Defects planted one at a time into a copy of the project, each of which a named test must notice.

    python -m benchmarks.planted [--only TEXT ...] [--jobs 2] [--json results/planted.json]

With --json every row is written once it is measured; rows of defects that are not tried again stay, each with
the commit it was measured at.

benchmarks/planted_defects.json is the table: what is wrong, the file, a piece of its text that occurs exactly
once, what stands there instead, and the test that must then fail. All tests pass first without any defect. A
defect is caught by a test that fails: one that cannot be collected, or does not end, has noticed nothing.

The checkout is never touched: tracked and new files are copied to a temporary folder for each job.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsim import provenance

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("planted_defects.json")
TIMEOUT_SECONDS = 900.0
FAILED = 1  # pytest's exit code where tests ran and some failed


@dataclass(frozen=True)
class Defect:
    """One wrong version of the project.

    Attributes:
        name: what is wrong.
        file: where, relative to the project.
        old: text that occurs exactly once there.
        new: what stands in its place.
        test: pytest id that must fail, as narrow as it can be.
    """

    name: str
    file: str
    old: str
    new: str
    test: str

    def planted(self, content: str) -> str:
        """Return the file's content with the defect.

        Raises:
            ValueError: `old` does not occur exactly once, or `new` changes nothing.
        """
        if (found := content.count(self.old)) != 1:
            raise ValueError(f"{self.name}: expected once in {self.file}, found {found} times:\n{self.old}")
        if self.old == self.new:
            raise ValueError(f"{self.name}: the new text is the old one.")
        return content.replace(self.old, self.new)


def defects(table: Path = TABLE) -> list[Defect]:
    """Return the table; names are unique."""
    held = [Defect(**entry) for entry in json.loads(table.read_text(encoding="utf-8"))]
    twice = {one.name for one in held if sum(other.name == one.name for other in held) > 1}
    if twice:
        raise ValueError(f"two defects of the same name: {', '.join(sorted(twice))}")
    return held


class Copy:
    """The project in a folder of its own, where tests import the copied packages."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        for name in _files(source):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target, follow_symlinks=False)

    def check(self, package: str = "fedsim") -> None:
        """Raise ValueError unless Python started here imports the copy, not an installed package."""
        code = f"import {package}; print({package}.__file__)"
        found = self._python("-c", code).stdout.strip()
        if not found.startswith(str(self.folder)):
            raise ValueError(f"{package} would be imported from {found!r}, not from the copy {self.folder}.")

    def run(self, tests: Sequence[str], *more: str) -> tuple[int | None, str, float]:
        """Run tests and return pytest's exit code (None: it did not end), its output and the seconds."""
        began, pytest = (
            time.perf_counter(),
            ("-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-q", "-rfE"),
        )
        try:
            done = self._python(*pytest, *more, *tests, timeout=TIMEOUT_SECONDS * len(tests))
        except subprocess.TimeoutExpired as late:
            return None, str(late), time.perf_counter() - began
        return done.returncode, done.stdout + done.stderr, time.perf_counter() - began

    def try_out(self, defect: Defect) -> dict[str, Any]:
        """Plant a defect, run its test, take it out again; return the row of the result."""
        path = self.folder / defect.file
        content = path.read_text(encoding="utf-8")
        path.write_text(defect.planted(content), encoding="utf-8")
        try:
            code, output, seconds = self.run([defect.test], "-x")
        finally:
            path.write_text(content, encoding="utf-8")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - (.*))?$", output, re.MULTILINE)
        caught = code == FAILED and bool(failed)
        by, message = failed[0] if caught else ("", "" if code == 0 else output[-2000:])
        return {
            **{key: value for key, value in asdict(defect).items() if key not in ("old", "new")},
            "caught": caught,
            "caught_by": by,
            "message": message,
            "seconds": round(seconds, 1),
            "commit": provenance.commit(),
        }

    def _python(self, *arguments: str, timeout: float = TIMEOUT_SECONDS) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


def measure(chosen: Sequence[Defect], source: Path = ROOT, jobs: int = 1) -> Iterator[dict[str, Any]]:
    """Try every defect out and yield its row, in the order of `chosen`.

    Raises:
        ValueError: a piece of text does not occur exactly once, or a test fails without any defect.
    """
    for defect in chosen:
        defect.planted((source / defect.file).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="planted-") as scratch:
        copies: queue.Queue[Copy] = queue.Queue()
        for job in range(jobs):
            copies.put(Copy(source, Path(scratch).resolve() / str(job)))
        _without_any(copies, sorted({defect.test for defect in chosen}), jobs)

        def row(defect: Defect) -> dict[str, Any]:
            copy = copies.get()
            try:
                found = copy.try_out(defect)
            finally:
                copies.put(copy)
            print(
                f"{'caught' if found['caught'] else 'NOT CAUGHT'}  {found['seconds']:6.1f} s  {defect.name}"
            )
            return found

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(row, chosen)


def _without_any(copies: queue.Queue[Copy], tests: list[str], jobs: int) -> None:
    """Run all tests once on the project as it is, shared out over the copies."""

    def share(part: list[str]) -> tuple[int | None, str]:
        copy = copies.get()
        try:
            copy.check()
            code, output, seconds = copy.run(part)
        finally:
            copies.put(copy)
        print(f"passed without any defect: {len(part)} tests or families of tests, {seconds:.0f} s")
        return code, output

    with ThreadPoolExecutor(jobs) as pool:
        for code, output in pool.map(share, filter(None, (tests[job::jobs] for job in range(jobs)))):
            if code != 0:
                raise ValueError(f"a test does not pass without any defect:\n{output[-6000:]}")


def _files(source: Path) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=source,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [
        name
        for name in listed.split("\0")
        if name and ((source / name).is_file() or (source / name).is_symlink())
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the result; exit code 1 where a defect was not caught."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planted", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="defects whose name has TEXT")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the project that are tested at once")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(arguments)
    chosen = [d for d in defects() if not options.only or any(text in d.name for text in options.only)]
    if not chosen:
        parser.error("no defect has such a name")
    given = sys.argv[1:] if arguments is None else list(arguments)
    held = {
        "command": shlex.join(["python", "-m", "benchmarks.planted", *given]),
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
    }
    rows: dict[str, dict[str, Any]] = {}
    for row in measure(chosen, jobs=options.jobs):
        rows[row["name"]] = row
        if options.json is not None:
            write(options.json, held, rows)
    missed = [name for name, row in rows.items() if not row["caught"]]
    print(f"{len(rows) - len(missed)} of {len(rows)} caught" + "".join(f"; NOT {name}" for name in missed))
    return 1 if missed else 0


def write(path: Path, held: dict[str, Any], rows: dict[str, dict[str, Any]], table: Path = TABLE) -> None:
    """Write the result: of every defect of the table the newest row there is, in the table's order."""
    before = json.loads(path.read_text(encoding="utf-8"))["defects"] if path.exists() else []
    known = {row["name"]: row for row in before} | rows
    kept = [known[one.name] for one in defects(table) if one.name in known]
    counts = {"planted": len(kept), "caught": sum(row["caught"] for row in kept)}
    path.write_text(json.dumps({**held, **counts, "defects": kept}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
