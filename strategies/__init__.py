"""Trust models, one file each. The file name is the strategy's name in a configuration."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fedsim import rules, validate
from fedsim.config import Config, parse_options
from strategies.base import Strategy


def names() -> list[str]:
    """Return the names of all strategies, sorted."""
    here = Path(__file__).parent
    return sorted(p.stem for p in here.glob("*.py") if p.stem not in ("__init__", "base"))


def load(config: Config) -> Strategy[Any]:
    """Return the strategy that `config.strategy` names, with its options checked.

    Raises:
        InputError: unknown strategy or option (with the nearest valid one), or a setting it does not read.
    """
    validate.one_of(config.strategy.name, names(), "strategy.name")
    module = importlib.import_module(f"strategies.{config.strategy.name}")
    cls: type[Strategy[Any]] = module.STRATEGY
    options = parse_options(config.strategy.options, cls.Options, "strategy.options")
    strategy = cls(config, options)
    rules.refuse_set(config, strategy.unread(), f"strategy.name = {config.strategy.name}")
    return strategy
