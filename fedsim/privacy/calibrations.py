"""Noise multipliers that were calibrated before, in files: a hint where to look, never an answer.

A calibration searches by some twenty epsilons; looking at one tells whether a number found before is still
right. So a number from a file is used only if its epsilon, computed now, is within the target and as near to
it as the search ends (`search.noise_multiplier_for`): whatever a file holds, no run gets less noise than
its target needs. Epsilons that are reported are never kept in files, where nothing could check them: they are
computed in every process.

One JSON file a calibration, under `fedsim.data.cache.folder()`. Its name is the SHA-256 of all that the
number depends on: target, delta, what is released, accountant, the versions of the libraries that compute it,
and the source of this package. Files may be deleted at any time. FEDSIM_CALIBRATIONS=off: none is read or
written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from importlib import metadata
from pathlib import Path

from fedsim.data import cache

VARIABLE = "FEDSIM_CALIBRATIONS"
_LIBRARIES = ("dp-accounting", "numpy", "scipy")


def key(*inputs: object) -> str:
    """Return the name of a calibration: 64 hexadecimal digits that depend on `inputs`, whose `repr` must tell
    them apart, and on the code that computes it."""
    return hashlib.sha256(repr((inputs, _versions(), _code())).encode()).hexdigest()


def recall(key: str) -> float | None:
    """Return the logarithm of the noise multiplier that was kept, or None where none can be read."""
    if not _on():
        return None
    try:
        held = json.loads(_path(key).read_text())["log_noise_multiplier"]
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: it is found again
        return None
    return held if isinstance(held, float) and math.isfinite(held) else None


def keep(key: str, log_noise_multiplier: float) -> None:
    """Write a calibration, whole or not at all; where no file can be written the next one searches again."""
    if not _on():
        return
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with cache.locked(path.parent), cache.written(path) as file:
            file.write(json.dumps({"log_noise_multiplier": log_noise_multiplier}).encode())
    except OSError:
        return


def _on() -> bool:
    return os.environ.get(VARIABLE, "") != "off"


def _path(key: str) -> Path:
    return cache.folder() / "calibrations" / f"{key}.json"


@functools.cache
def _versions() -> tuple[str, ...]:
    return tuple(metadata.version(name) for name in _LIBRARIES)


@functools.cache
def _code() -> str:
    """Return a digest of every Python file of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
