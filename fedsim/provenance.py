"""What produced a result: package code, commit, hardware."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from fedsim import references

PROJECT = Path(__file__).resolve().parents[1]


def sources() -> dict[str, Path]:
    """Return every Python file of fedsim by its path in a checkout, wherever the package is installed."""
    strategies = Path(os.path.realpath(PROJECT / "fedsim" / "strategies"))
    if not strategies.is_dir():  # a copy of a checkout without its links
        strategies = PROJECT / "strategies"
    found = {f"strategies/{p.relative_to(strategies).as_posix()}": p for p in strategies.rglob("*.py")}
    for path in (PROJECT / "fedsim").rglob("*.py"):
        if strategies not in Path(os.path.realpath(path)).parents:
            found[path.relative_to(PROJECT).as_posix()] = path
    return dict(sorted(found.items()))


@functools.cache
def code_hash(*named: str) -> str:
    """Return a digest of every Python file of fedsim, and of what `named` references lead to
    (`fedsim.references`); server and nodes must agree."""
    return _digest([*_named_sources(named), *sources().items()])


def reference_hash(*named: str) -> str:
    """Return a digest of what `named` references lead to, as it is now; empty for none: a run's own code."""
    found = _named_sources(named)
    return _digest(found) if found else ""


def _named_sources(named: Sequence[str]) -> list[tuple[str, Path]]:
    return [item for reference in sorted(set(named)) for item in references.sources(reference).items()]


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def commit() -> str:
    """Return the git commit of the checkout, "-dirty" when it has changes, or "unknown".

    FEDSIM_COMMIT takes precedence: the launcher sets it for processes that run from a packaged copy.
    """
    if stated := os.environ.get("FEDSIM_COMMIT"):
        return stated
    if not (PROJECT / ".git").exists():
        return "unknown"
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> dict[str, str | int]:
    """Return processor, cores, accelerator and library versions, for result files."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "gpu": gpu,
        "python": platform.python_version(),
        **_libraries(),
    }


@functools.cache
def _libraries() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "flwr", "opacus", "dp-accounting", "numpy")}


def peak_memory() -> dict[str, int]:
    """Return the largest memory this process has held so far, and on its GPU, in bytes."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes, except there
    held = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        held["gpu"] = torch.cuda.max_memory_allocated()
    return held


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
