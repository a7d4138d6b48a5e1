"""Methods by name: a preset picks one variant an axis, in a file of a few lines (configs/presets).

A preset acts where it is named: what the same file or command line says beside it, and what is said later,
wins. A loaded configuration has none any more, only the variants; `name_of` finds the name again.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedsim import validate
from fedsim.merging import read
from fedsim.validate import InputError

AXES = ("strategy", "query", "sampler", "noise")
FOLDER = "presets"


def names(configs: Path) -> list[str]:
    """Return the presets under the folder of the named configurations."""
    return sorted(path.stem for path in (configs / FOLDER).glob("*.yaml"))


def content(name: str, configs: Path) -> DictConfig:
    """Return what a preset chooses.

    Raises:
        InputError: there is none of that name; suggests the nearest. Or it says more than the axes.
    """
    validate.one_of(name, names(configs), "preset")
    held = read(configs / FOLDER / f"{name}.yaml")
    if more := [str(key) for key in held if key not in AXES]:
        raise InputError(
            f"preset {name} must choose {', '.join(AXES)} and nothing else, got {', '.join(more)}."
        )
    return held


def name_of(chosen: tuple[str, ...], configs: Path) -> str:
    """Return the preset that picks these variants, by AXES; else the variants themselves."""
    return _by_choice(configs).get(chosen, " + ".join(chosen))


@functools.cache
def _by_choice(configs: Path) -> dict[tuple[str, ...], str]:
    return {tuple(_name(content(name, configs)[axis]) for axis in AXES): name for name in names(configs)}


def _name(choice: Any) -> str:
    return str(choice.name) if OmegaConf.is_config(choice) else str(choice)
