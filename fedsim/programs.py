"""Programs of this environment, whether or not a shell has activated it."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def folders() -> list[Path]:
    """Return where this environment's programs lie: beside its Python, and where pip puts them, which differs
    for installations into a user's home and for some systems' Python."""
    schemes = sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user")
    found = [Path(sys.executable).parent, *(Path(sysconfig.get_path("scripts", one)) for one in schemes)]
    return list(dict.fromkeys(found))


def search_path() -> str:
    """Return $PATH with `folders` in front, for processes whose programs are to be this environment's."""
    return os.pathsep.join([*map(str, folders()), os.environ.get("PATH", "")])


def find(name: str) -> Path | None:
    """Return the program of this environment, or None where it has none of that name."""
    found = shutil.which(name, path=os.pathsep.join(map(str, folders())))
    return None if found is None else Path(found)
