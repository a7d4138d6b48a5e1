"""Trust models, one file each. The file name is the strategy's name in a configuration."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fedsim import references, rules
from fedsim.config import Config, parse_options
from fedsim.registry import entry_points
from fedsim.strategies.base import Strategy
from fedsim.validate import InputError


def names() -> list[str]:
    """Return the names of all strategies, sorted."""
    here = Path(__file__).parent
    return sorted(p.stem for p in here.glob("*.py") if p.stem not in ("__init__", "base"))


def load(config: Config) -> Strategy[Any]:
    """Return the strategy that `config.strategy` names, with its options checked.

    Raises:
        InputError: unknown strategy or option (with the nearest valid one), or a setting it does not read.
    """
    cls = find(config.strategy.name)
    options = parse_options(config.strategy.options, cls.Options, "strategy.options")
    strategy = cls(config, options)
    rules.refuse_set(config, strategy.unread(), f"strategy.name = {config.strategy.name}")
    return strategy


def find(name: str) -> type[Strategy[Any]]:
    """Return the class that a name means.

    Raises:
        InputError: there is none (with the nearest name), or it is no strategy.
    """
    references.check(name, [*names(), *entry_points("strategies")], "strategy.name")
    if references.is_reference(name):
        found = references.resolve(name, "strategy.name")
        if not (isinstance(found, type) and issubclass(found, Strategy)):
            raise InputError(
                f"strategy.name must name a class derived from fedsim.strategies.base.Strategy, but {name} "
                f"is {found!r}."
            )
        return found
    if name in (offered := entry_points("strategies")):
        return find(offered[name])
    cls: type[Strategy[Any]] = importlib.import_module(f"fedsim.strategies.{name}").STRATEGY
    return cls
