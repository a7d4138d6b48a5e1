"""Settings that a search chose, by variant and budget: `fedsim tune` writes the file, comparisons read it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedsim import loading, validate
from fedsim.config import CONFIG_DIR
from fedsim.engine.run_folder import file_name
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
        recipe: that the search started from (`recipe_name`).
        recipe_digest: of what that recipe set when it was searched.
        trials: for every variant at every budget.
        held_out_examples: that they were judged by.
        seeds: runs of each trial.
        searched: variant -> "key=value" strings that its trials had, beside those that were chosen.
        chosen: one entry a variant and budget.
    """

    title: str = ""
    recipe: str = ""
    recipe_digest: str = ""
    trials: int = 1
    held_out_examples: int = 0
    seeds: list[int] = field(default_factory=list)
    searched: dict[str, list[str]] = field(default_factory=dict)
    chosen: list[Any] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Tuned:
        """Read a file.

        Raises:
            InputError: it is none of `fedsim tune`, or has a variant twice at one budget.
        """
        content = OmegaConf.to_container(read(path))
        assert isinstance(content, dict)
        found: Tuned = parse_options({str(k): v for k, v in content.items()}, cls, str(path))
        validate.positive(found.trials, f"{path}: trials")
        if not found.chosen or not all(isinstance(entry, dict) for entry in found.chosen):
            raise InputError(f"{path}: chosen must list what was chosen, as `fedsim tune` writes it.")
        entries = [parse_options(dict(entry), Chosen, f"{path}: chosen") for entry in found.chosen]
        for entry in (entry for entry in entries if entry.epsilon is not None):
            validate.positive(entry.epsilon, f"{path}: chosen: epsilon of '{entry.variant}'")
        places = [(entry.variant, entry.epsilon) for entry in entries]
        if twice := next((place for place in places if places.count(place) > 1), None):
            raise InputError(
                f"{path}: chosen must have one entry for a variant and budget, got several for '{twice[0]}' "
                f"at epsilon {twice[1]}. Leave one."
            )
        return replace(found, chosen=entries)

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

    def of_recipe(self, recipe: str, where: str) -> str:
        """Return the sentence that says that the recipe was changed since the search; "" where it was not.

        Args:
            recipe: path of the configuration that the settings are to be used with.
            where: the file they are from, for the message.

        Raises:
            InputError: they were chosen for another recipe.
        """
        if self.recipe != recipe_name(recipe):
            raise InputError(
                f"{where} must hold settings chosen for {recipe_name(recipe)}, the recipe they are used "
                f"with, got those of {self.recipe or 'an unnamed one'}. Tune this one (`fedsim tune`), or "
                "leave `tuned` out."
            )
        changed = self.recipe_digest != recipe_digest(recipe)
        return f"The recipe, {self.recipe}, was changed since its settings were chosen." if changed else ""

    def overrides(self, variant: str, epsilon: float | None) -> list[str]:
        """Return the settings of a variant: those of the nearest budget, by ratio, and how they were chosen.

        Args:
            variant: as the search called it.
            epsilon: the budget of the run; None: it has none.

        Raises:
            InputError: nothing was chosen for this variant, or at several budgets for one that has none.
        """
        nearest = self.nearest(variant, epsilon)
        return [*nearest.settings, *self.about(nearest.trials)]

    def nearest(self, variant: str, epsilon: float | None) -> Chosen:
        """Return what was chosen for a variant at the budget nearest to this one, by ratio.

        Raises:
            InputError: nothing was chosen for this variant, or at several budgets for one that has none.
        """
        mine = [entry for entry in self.chosen if entry.variant == variant]
        if not mine:
            known = list(dict.fromkeys(entry.variant for entry in self.chosen))
            raise InputError(
                f"variant '{variant}' has no tuned settings, only {', '.join(map(repr, known))} have. Tune "
                "it too, or leave `tuned` out."
            )
        if epsilon is None and len(mine) > 1 and all(entry.epsilon is not None for entry in mine):
            known = [f"{entry.epsilon:g}" for entry in mine]
            raise InputError(
                f"variant '{variant}' was tuned at the budgets {', '.join(known)}, and has none here: no "
                "budget is the nearest to it. Give it privacy.target_epsilon, tune it as it is, or leave "
                "`tuned` out."
            )
        return min(mine, key=lambda entry: _distance(entry.epsilon, epsilon))

    def came_of(self, trials: Iterable[Mapping[str, Any]]) -> bool:
        """Whether all that was chosen is among these trials: mappings with variant, epsilon and settings."""
        tried = [(trial["variant"], trial["epsilon"], trial["settings"]) for trial in trials]
        return all((entry.variant, entry.epsilon, entry.settings) in tried for entry in self.chosen)

    def borrowed(self, asked: Iterable[tuple[str, float | None]]) -> str:
        """Return the sentence that says which budgets have the settings of another one; "" where none has.

        Args:
            asked: variants and budgets that are run.

        Raises:
            InputError: nothing was chosen for a variant.
        """
        found: dict[str, None] = {}
        for variant, epsilon in asked:
            nearest = self.nearest(variant, epsilon).epsilon
            if nearest is None and variant in self.searched:
                continue  # at the recipe's own, which `unlike` compares
            if epsilon is not None and epsilon != nearest:
                of = "those tuned at no budget" if nearest is None else f"those of {nearest:g}"
                found[f"{epsilon:g} has {of}"] = None
        budgets = ", ".join(found)
        return f"Budgets that were not tuned have the settings of the nearest: {budgets}." if found else ""

    def edges(
        self, asked: Iterable[tuple[str, float | None]], replaced: Callable[[str], bool] = lambda _: False
    ) -> str:
        """Return the sentence that names settings at the edge of what was searched; "" where none is.

        Args:
            asked: variants and budgets that are run.
            replaced: whether a setting, by name, is another one there than was chosen.

        Raises:
            InputError: nothing was chosen for a variant.
        """
        found: dict[str, dict[str, dict[str, None]]] = {}
        for variant, epsilon in asked:
            entry = self.nearest(variant, epsilon)
            for setting in (name for name in entry.at_the_edge if not replaced(name)):
                budgets = found.setdefault(setting, {}).setdefault(variant, {})
                budgets.update({} if entry.epsilon is None else {f"{entry.epsilon:g}": None})
        if not found:
            return ""
        told = ", ".join(
            f"{setting} ("
            + "; ".join(f"{who} at epsilon {', '.join(at)}" if at else who for who, at in whose.items())
            + ")"
            for setting, whose in found.items()
        )
        return f"At the edge of what was searched, beyond which better may lie: {told}."


def recipe_name(recipe: str) -> str:
    """Return what a recipe is called: its place under configs/, or the name of a file elsewhere."""
    path = Path(recipe)
    inside = path.is_relative_to(CONFIG_DIR)
    return (path.relative_to(CONFIG_DIR) if inside else Path(path.name)).with_suffix("").as_posix()


def recipe_digest(recipe: str) -> str:
    """Return a digest of what a recipe sets to something else than the base configuration does.

    Raises:
        InputError: as `loading.load`.
    """
    own, base = (leaves(loading.load(source).defining()) for source in (recipe, "base"))
    changed = {name: value for name, value in own.items() if name not in base or value != base[name]}
    return hashlib.sha256(json.dumps(changed, sort_keys=True, default=str).encode()).hexdigest()[:16]


def leaves(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return nested mappings as one, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inside = isinstance(value, Mapping)
        found.update(leaves(value, f"{where}{name}.") if inside else {f"{where}{name}": value})
    return found


def name_of(variant: str, epsilon: float | None) -> str:
    """Return the name of a variant's chosen configuration."""
    return file_name(variant, "chosen") + ("" if epsilon is None else f"-eps{epsilon:g}")


def _distance(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return abs(math.log(one / other))
