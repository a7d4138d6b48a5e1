"""What the console proposes to type, as it works where the user stands."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fedsim import programs


def program(name: str) -> str:
    """Return how a program of this environment is called from here: by its name where the shell finds this
    environment's, else by its path, relative where it is below the working folder."""
    own, found = programs.find(name), shutil.which(name)
    if found is not None and (own is None or os.path.samefile(found, own)):
        return name
    return short(own or programs.folders()[0] / name)


def short(path: Path) -> str:
    """Return a path relative to the working folder where it is below it, quoted if it has blanks."""
    here = Path.cwd()
    shown = str(path.relative_to(here) if path.is_relative_to(here) else path)
    return f"'{shown}'" if " " in shown else shown


def tensorboard(folder: Path) -> str:
    """Return the line that says how to look at the curves of a folder of runs."""
    return f"TensorBoard: {program('tensorboard')} --logdir {short(folder)}"


def comparison(config: str) -> str:
    """Return the command that compares a configuration of configs/ under several trust models, where there is
    one: it writes a page."""
    from fedsim.config import CONFIG_DIR

    if Path(config).name != config or not (CONFIG_DIR / "compare" / f"{config}.yaml").is_file():
        return ""
    return f"{program('fedsim')} compare compare/{config}"
