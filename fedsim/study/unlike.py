"""What sets the runs of a comparison apart from the trials that chose their settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedsim import loading
from fedsim.config import Config
from fedsim.study.tuned import Tuned, leaves

_TOLD = ("data.holdout_examples", "data.test_examples", "seed", "title", "tuning")
"""What is said elsewhere: what trials are judged by, and their seeds."""
_BUDGET = "privacy.target_epsilon"
"""Of a search at several, said elsewhere too."""


def sentence(tuned: Tuned, recipe: str, runs: Iterable[tuple[str, Config]]) -> str:
    """Return the sentence that names the settings whose value was another one in the trials; "" for none, and
    where the file does not say what the trials had.

    Args:
        tuned: the settings that were chosen.
        recipe: path of the configuration that runs and trials start from.
        runs: variant and configuration of each.

    Raises:
        InputError: nothing was chosen for a variant, or the trials' settings are none today.
    """
    known = {(variant, config.privacy.target_epsilon): config for variant, config in runs}
    every = {variant for variant, _ in known}
    rows: dict[str, dict[str, None]] = {}
    values: dict[str, dict[str, None]] = {}
    for (variant, _), config in known.items():
        for name, there, here in _changes(tuned, recipe, variant, config):
            rows.setdefault(name, {})[variant] = None
            values.setdefault(name, {})[f"{there}, not {here}"] = None
    told = []
    for name, of in rows.items():
        what = next(iter(values[name])) if len(values[name]) == 1 else "another one"
        told.append(f"{name} was {what}{'' if set(of) == every else f' ({_listed(of)})'}")
    return f"In the search {', '.join(told)}." if told else ""


def _listed(names: Iterable[str]) -> str:
    return "; ".join(names)


def _changes(tuned: Tuned, recipe: str, variant: str, config: Config) -> list[tuple[str, str, str]]:
    """(setting, value in the trials, value here) of what differs beside what was chosen."""
    if variant not in tuned.searched:
        return []
    nearest = tuned.nearest(variant, config.privacy.target_epsilon)
    chosen = nearest.settings
    given = [*tuned.searched[variant], *chosen]
    there = leaves(loading.load(recipe, given, where="settings of the search").defining())
    here = leaves(config.defining())
    told = _TOLD if nearest.epsilon is None else (*_TOLD, _BUDGET)
    skipped = [*told, *(item.partition("=")[0].strip() for item in chosen)]
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    asked = [name for name in names if not any(f"{name}.".startswith(f"{key}.") for key in skipped)]
    differ = [name for name in asked if not _below(name, names)]
    return [(name, _text(there, name), _text(here, name)) for name in differ]


def _below(name: str, changed: Iterable[str]) -> bool:
    """Whether it is an option of a choice that is another one."""
    choice, options, _ = name.partition(".options")
    return bool(options) and f"{choice}.name" in changed


def _text(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name)
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
