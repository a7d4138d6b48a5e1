"""Generated parts of Markdown files: what stands between `<!-- NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.validate import FedsimError, InputError

Parts = Mapping[str, Callable[[], str]]


class OutOfDate(FedsimError):
    """A generated part of a file is not what it would be now; nothing was changed."""


def update(root: Path, files: Mapping[str, Parts], *, check: bool = False) -> list[str]:
    """Bring the generated parts of files up to date and return the names of those that were not.

    Args:
        root: folder the names are relative to.
        files: name -> marker -> what belongs between the markers, ending in a newline.
        check: change nothing.

    Raises:
        InputError: a file is missing, or does not hold exactly one pair of each marker.
        OutOfDate: with `check`, some file is not up to date.
    """
    changed: dict[str, str] = {}
    for name, parts in files.items():
        path = root / name
        if not path.is_file():
            raise InputError(f"{path} must exist and hold the markers {', '.join(parts)}.")
        old = path.read_text(encoding="utf-8")
        new = fill(old, parts, name)
        if new != old:
            changed[name] = new
    if check and changed:
        raise OutOfDate(f"out of date: {', '.join(changed)}. Run the same command without --check.")
    for name, text in changed.items():
        (root / name).write_text(text, encoding="utf-8")
    return list(changed)


def fill(text: str, parts: Parts, name: str = "text") -> str:
    """Return `text` with what stands between the markers of each part replaced.

    Raises:
        InputError: not exactly one pair of markers of a part.
    """
    for part, make in parts.items():
        start, end = f"<!-- {part} -->", f"<!-- end {part} -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise InputError(f"{name}: expected exactly one pair of markers {start} {end}.")
        before, rest = text.split(start)
        text = f"{before}{start}\n{make()}{end}{rest.split(end)[1]}"
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def machine(hardware: Mapping[str, Any]) -> str:
    """Return the accelerator, or the processor and how many of its cores were used."""
    if hardware["gpu"] != "none":
        return str(hardware["gpu"])
    cores = hardware["cores"]
    return f"{hardware['processor']}, {cores} core{'' if cores == 1 else 's'}"


def provenance(held: Mapping[str, Any]) -> str:
    """Return the line that says what produced a table."""
    hardware = held["hardware"]
    return (
        f"\n`{held['command'].strip()}`, commit {held['commit']}, {machine(hardware)}, "
        f"torch {hardware['torch']}.\n"
    )


def missing(command: str, name: str) -> str:
    """Return what stands where no result is."""
    return f"Not measured yet. Run `{command}` and put its JSON into `results/{name}`.\n"
