"""Settings that a search chose, by variant and budget: `fedsim tune` writes the file, comparisons read it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedsim import validate
from fedsim.merging import parse_options, read
from fedsim.validate import InputError


@dataclass(frozen=True)
class Chosen:
    """What was chosen for a variant at a budget, with its score on held-out examples.

    `trials` is null where it had as many as all others.
    """

    variant: str = ""
    epsilon: float | None = None
    settings: list[str] = field(default_factory=list)
    score: float = math.nan
    at_the_edge: list[str] = field(default_factory=list)
    trials: int | None = None


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search.

    Attributes:
        title: of the search.
        trials: for every variant at every budget.
        held_out_examples: that they were judged by.
        seeds: runs of each trial.
        chosen: one entry a variant and budget.
    """

    title: str = ""
    trials: int = 1
    held_out_examples: int = 0
    seeds: list[int] = field(default_factory=list)
    chosen: list[Any] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Tuned:
        """Read a file.

        Raises:
            InputError: it is none of `fedsim tune`.
        """
        content = OmegaConf.to_container(read(path))
        assert isinstance(content, dict)
        found: Tuned = parse_options({str(k): v for k, v in content.items()}, cls, str(path))
        validate.positive(found.trials, f"{path}: trials")
        if not found.chosen or not all(isinstance(entry, dict) for entry in found.chosen):
            raise InputError(f"{path}: chosen must list what was chosen, as `fedsim tune` writes it.")
        entries = [parse_options(dict(entry), Chosen, f"{path}: chosen") for entry in found.chosen]
        return cls(found.title, found.trials, found.held_out_examples, found.seeds, entries)

    def write(self) -> str:
        """Return the text of the file."""
        return str(OmegaConf.to_yaml(OmegaConf.structured(self)))

    def about(self, trials: int | None = None) -> list[str]:
        """Return the overrides that say in a configuration how its settings were chosen."""
        return [
            "tuning.mode=free",
            f"tuning.trials={trials or self.trials}",
            f"tuning.held_out_examples={self.held_out_examples}",
        ]

    def overrides(self, variant: str, epsilon: float | None) -> list[str]:
        """Return the settings of a variant: those of the nearest budget, by ratio, and how they were chosen.

        Raises:
            InputError: nothing was chosen for this variant.
        """
        mine = [entry for entry in self.chosen if entry.variant == variant]
        if not mine:
            known = list(dict.fromkeys(entry.variant for entry in self.chosen))
            raise InputError(
                f"variant '{variant}' has no tuned settings, only {', '.join(map(repr, known))} have. Tune "
                "it too, or leave `tuned` out."
            )
        nearest = min(mine, key=lambda entry: _distance(entry.epsilon, epsilon))
        return [*nearest.settings, *self.about(nearest.trials)]


def _distance(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return abs(math.log(one / other))
