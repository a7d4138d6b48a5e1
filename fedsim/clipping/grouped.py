"""One bound a group of parameters, named by patterns."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from fedsim import validate
from fedsim.clipping import CLIPPING
from fedsim.clipping.by_group import ClipByGroup
from fedsim.merging import parse_options
from fedsim.validate import InputError

WHERE = "privacy.clipping.options.groups"


@dataclass(frozen=True)
class ClipGroup:
    """Parameters that are clipped together.

    Attributes:
        parameters: shell patterns of their names ("head.*"; a star matches dots too).
        weight: share of the bound, relative to the other groups' weights.
    """

    parameters: list[str] = field(default_factory=list)
    weight: float = 1.0


@CLIPPING.register("grouped")
@dataclass(frozen=True)
class GroupedClip(ClipByGroup):
    """Clip the gradient of each group of parameters to C_g = C * weight_g / sqrt(sum of squared weights).

    Attributes:
        groups: `ClipGroup` by name, or what one is made of, {parameters, weight}. Every trainable parameter
            must be in exactly one.
    """

    groups: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.groups:
            raise InputError(f"{WHERE} must name at least one group of parameters, got none.")
        made = {str(name): _group(given, f"{WHERE}.{name}") for name, given in self.groups.items()}
        object.__setattr__(self, "groups", made)

    def group_of(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return which group has each parameter.

        Raises:
            InputError: a parameter that no group or several groups match, or a group without a parameter.
        """
        patterns = tuple((name, tuple(group.parameters)) for name, group in self.groups.items())
        return _assign(patterns, tuple(names))

    def bounds(self, count: int) -> tuple[float, ...]:
        """C_g of each group; `count` must be their number."""
        if count != len(self.groups):
            raise InputError(f"norms must be of {len(self.groups)} groups, got {count}.")
        weights = [group.weight for group in self.groups.values()]
        whole = math.hypot(*weights)
        return tuple(self.clip_norm * weight / whole for weight in weights)


def _group(given: Any, where: str) -> ClipGroup:
    if not isinstance(given, dict | ClipGroup):
        raise InputError(f"{where} must be a mapping with parameters and weight, got {given!r}.")
    group: ClipGroup = parse_options(given, ClipGroup, where) if isinstance(given, dict) else given
    validate.positive(group.weight, f"{where}.weight")
    if not group.parameters:
        raise InputError(f"{where}.parameters must list patterns of parameter names, got none.")
    return group


@functools.lru_cache(maxsize=32)
def _assign(groups: tuple[tuple[str, tuple[str, ...]], ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """Return which of the groups, by name and patterns, each parameter is in."""
    matches = [
        [i for i, (_, patterns) in enumerate(groups) if any(fnmatchcase(name, p) for p in patterns)]
        for name in names
    ]
    remedy = f"Every trainable parameter must match exactly one group of {WHERE}."
    if missing := [name for name, found in zip(names, matches, strict=True) if not found]:
        raise InputError(f"no clip group matches {_listed(missing)}. {remedy}")
    several = [
        f"{name} ({', '.join(groups[i][0] for i in found)})"
        for name, found in zip(names, matches, strict=True)
        if len(found) > 1
    ]
    if several:
        raise InputError(f"several clip groups match {_listed(several)}. {remedy}")
    used = {found[0] for found in matches}
    if empty := [group for i, (group, _) in enumerate(groups) if i not in used]:
        raise InputError(
            f"clip groups must have parameters, got none for {_listed(empty)}: their part of the bound would "
            f"be wasted. Trainable parameters: {_listed(names)}."
        )
    return tuple(found[0] for found in matches)


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
