"""All axes of a configuration together: what can be chosen where."""

from __future__ import annotations

from typing import Any

from fedsim.registry import Registry, entry_points, first_line, options_of

Described = dict[str, tuple[str, dict[str, Any]]]


def registries() -> list[Registry[Any]]:
    """Return the registries, in the order of a configuration's sections."""
    from fedsim.accountants import ACCOUNTANTS
    from fedsim.augmentations import AUGMENTATIONS
    from fedsim.clipping import CLIPPING
    from fedsim.data.feature_maps import FEATURES
    from fedsim.data.sources import SOURCES
    from fedsim.learners import LEARNERS
    from fedsim.noise import NOISE
    from fedsim.optimizers import OPTIMIZERS
    from fedsim.partitions import PARTITIONS
    from fedsim.queries import QUERIES
    from fedsim.samplers import SAMPLERS
    from fedsim.schedules import SCHEDULES
    from fedsim.strategies import STRATEGIES
    from fedsim.tasks import TASKS

    return [
        SOURCES,
        FEATURES,
        TASKS,
        PARTITIONS,
        STRATEGIES,
        QUERIES,
        SAMPLERS,
        NOISE,
        LEARNERS,
        ACCOUNTANTS,
        CLIPPING,
        AUGMENTATIONS,
        OPTIMIZERS,
        SCHEDULES,
    ]


def described() -> dict[str, Described]:
    """Return, by setting and name, the first line of a variant's docstring and its options with defaults."""
    from fedsim import models

    found = {registry.setting: registry.described() for registry in registries()}
    found["model.name"] = {
        name: (first_line(family.make), options_of(family.options))
        for name, family in models.FAMILIES.items()
    }
    return found


def offered() -> dict[str, dict[str, str]]:
    """Return what installed packages offer, as references by setting and name."""
    axes = {registry.setting: registry.axis for registry in registries()}
    axes["model.name"] = "models"
    return {setting: entry_points(axis) for setting, axis in axes.items()}
