"""Clip rules: how much of each per-example gradient enters the sum, and what one example can change.

A rule maps the norm of a gradient to a coefficient; the contribution is coefficient * gradient. A rule with
groups of parameters does so for each group's part of the gradient. `sensitivity` is the only place where the
L2 bound of a sum comes from. All bounds are for adding or removing one example, and hold up to the rounding
of the parameters' dtype (relative 1e-6 in float32).
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedsim import config as configs
from fedsim import references, validate
from fedsim.config import PrivacyConfig
from fedsim.grads import constants
from fedsim.grads.arithmetic import off
from fedsim.grads.norms import squared_norms_of
from fedsim.validate import InputError


@runtime_checkable
class ClipRule(Protocol):
    """What the gradient engines ask of a rule."""

    @property
    def sensitivity(self) -> float:
        """L2 bound on the change of the sum when one example is added or removed."""
        ...

    def group_of(self, names: Sequence[str]) -> tuple[int, ...] | None:
        """Return the group, 0 .. G - 1, of each trainable parameter; None where all are clipped together."""
        return None

    def coefficients(self, norms: Tensor) -> Tensor:
        """Map gradient norms to factors of the same shape and dtype.

        Args:
            norms: (n,) of whole gradients; for a rule with groups (n, G) of their parts. Where a norm is not
                finite, all factors of that example are exactly 0.
        """
        ...

    def clipped(self, norms: Tensor) -> Tensor:
        """Say of each example, (n,) bool, whether a norm, as for `coefficients`, is above its bound."""
        return norms > self.sensitivity


@dataclass(frozen=True)
class FlatClip(ClipRule):
    """Scale gradients longer than `clip_norm` down to it (Abadi et al. 2016, algorithm 1).

    Coefficient min(1, C / (norm + 1e-6)), the convention of Opacus, so that sums agree with it to the last
    digits; every contribution has norm at most C.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        validate.positive(self.clip_norm, "clip_norm")

    @property
    def sensitivity(self) -> float:
        """C."""
        return self.clip_norm

    def coefficients(self, norms: Tensor) -> Tensor:
        """Map norms (n,) to min(1, C / (norm + 1e-6)); 0 where a norm is not finite."""
        return _zero_unless_finite((self.clip_norm / (norms + 1e-6)).clamp(max=1.0), norms)


@dataclass(frozen=True)
class NormalisedClip(ClipRule):
    """Scale every gradient to nearly `clip_norm` (Bu et al. 2022, "Automatic clipping", AUTO-S).

    Coefficient C / (norm + gamma); every contribution has norm C * norm / (norm + gamma), below C.
    """

    clip_norm: float
    gamma: float = 0.01

    def __post_init__(self) -> None:
        validate.positive(self.clip_norm, "clip_norm")
        validate.positive(self.gamma, "gamma")

    @property
    def sensitivity(self) -> float:
        """C."""
        return self.clip_norm

    def coefficients(self, norms: Tensor) -> Tensor:
        """Map norms (n,) to C / (norm + gamma); 0 where a norm is not finite."""
        return _zero_unless_finite(self.clip_norm / (norms + self.gamma), norms)


@dataclass(frozen=True)
class NoClip(ClipRule):
    """Take gradients as they are: for non-private training. Non-finite ones still count as zero."""

    @property
    def sensitivity(self) -> float:
        """Infinity: one example can change the sum by any amount."""
        return math.inf

    def coefficients(self, norms: Tensor) -> Tensor:
        """Map norms (n,) to 1; 0 where a norm is not finite."""
        return _zero_unless_finite(torch.ones_like(norms), norms)


@dataclass(frozen=True)
class _ClipByGroup(ClipRule):
    """Scale each group's part of a gradient down to the group's own bound, as `FlatClip` does the whole.

    The bounds C_g satisfy sum of C_g^2 = C^2, so that the contribution of an example, all parts together,
    has norm at most C.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        validate.positive(self.clip_norm, "clip_norm")

    @property
    def sensitivity(self) -> float:
        """C, the root of the sum of squared bounds of the groups."""
        return self.clip_norm

    @abstractmethod
    def bounds(self, count: int) -> tuple[float, ...]:
        """Return the bound C_g of each of the `count` groups."""

    def coefficients(self, norms: Tensor) -> Tensor:
        """Map norms (n, G) to min(1, C_g / (norm + 1e-6)); a row of 0 where one norm is not finite."""
        factors = (self._bounds_like(norms) / (norms + 1e-6)).clamp(max=1.0)
        return torch.where(torch.isfinite(norms).all(1, keepdim=True), factors, torch.zeros_like(norms))

    def clipped(self, norms: Tensor) -> Tensor:
        """Say of each row of `norms` (n, G) whether any group's norm is above its bound."""
        return (norms > self._bounds_like(norms)).any(1)

    def _bounds_like(self, norms: Tensor) -> Tensor:
        count = norms.shape[1]
        return constants.spread(self.bounds(count), (1,) * count, norms.dtype, norms.device)


@dataclass(frozen=True)
class PerLayerClip(_ClipByGroup):
    """Clip each layer's gradient to C / sqrt(number of layers) (McMahan et al. 2018, section 2, per-layer).

    A layer is the parameters that one module owns itself: weight and bias together, and the gain of a
    weight-standardised convolution with them. A tied parameter belongs to the module that names it first.
    """

    def group_of(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return for each parameter which of the modules, in order, owns it."""
        modules = [name.rpartition(".")[0] for name in names]
        order = {module: place for place, module in enumerate(dict.fromkeys(modules))}
        return tuple(order[module] for module in modules)

    def bounds(self, count: int) -> tuple[float, ...]:
        """C / sqrt(count) for each."""
        return (self.clip_norm / math.sqrt(count),) * count


@dataclass(frozen=True)
class ClipGroup:
    """Parameters that are clipped together.

    Attributes:
        name: how messages call the group.
        patterns: shell patterns of parameter names ("head.*"; a star matches dots too).
        weight: share of the bound, relative to the other groups' weights.
    """

    name: str
    patterns: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        validate.positive(self.weight, f"weight of clip group {self.name}")
        if not self.patterns:
            raise InputError(f"clip group {self.name} must have patterns of parameter names, got none.")


@dataclass(frozen=True)
class GroupedClip(_ClipByGroup):
    """Clip the gradient of each group of parameters to C_g = C * weight_g / sqrt(sum of squared weights).

    `clip_norm` is C, the bound on all groups together.
    """

    clip_groups: tuple[ClipGroup, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip_groups:
            raise InputError("grouped clipping must have at least one group, got none.")

    def group_of(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return which group has each parameter.

        Raises:
            InputError: a parameter that no group or several groups match, or a group without a parameter.
        """
        return _assign(self.clip_groups, tuple(names))

    def bounds(self, count: int) -> tuple[float, ...]:
        """C_g of each group; `count` must be their number."""
        if count != len(self.clip_groups):
            raise InputError(f"norms must be of {len(self.clip_groups)} groups, got {count}.")
        whole = math.hypot(*(group.weight for group in self.clip_groups))
        return tuple(self.clip_norm * group.weight / whole for group in self.clip_groups)


@functools.lru_cache(maxsize=32)
def _assign(groups: tuple[ClipGroup, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    matches = [
        [i for i, group in enumerate(groups) if any(fnmatchcase(name, p) for p in group.patterns)]
        for name in names
    ]
    remedy = "Every trainable parameter must match exactly one group of privacy.clip_groups."
    if missing := [name for name, found in zip(names, matches, strict=True) if not found]:
        raise InputError(f"no clip group matches {_listed(missing)}. {remedy}")
    several = [
        f"{name} ({', '.join(groups[i].name for i in found)})"
        for name, found in zip(names, matches, strict=True)
        if len(found) > 1
    ]
    if several:
        raise InputError(f"several clip groups match {_listed(several)}. {remedy}")
    used = {found[0] for found in matches}
    if empty := [group.name for i, group in enumerate(groups) if i not in used]:
        raise InputError(
            f"clip groups must have parameters, got none for {_listed(empty)}: their part of the bound would "
            f"be wasted. Trainable parameters: {_listed(names)}."
        )
    return tuple(found[0] for found in matches)


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _grouped(privacy: PrivacyConfig) -> GroupedClip:
    groups = configs.clip_groups(privacy).items()
    return GroupedClip(
        privacy.clip_norm,
        tuple(ClipGroup(name, tuple(group.parameters), group.weight) for name, group in groups),
    )


CLIP_RULES: dict[str, Callable[[PrivacyConfig], ClipRule]] = {
    "flat": lambda privacy: FlatClip(privacy.clip_norm),
    "normalised": lambda privacy: NormalisedClip(privacy.clip_norm),
    "per_layer": lambda privacy: PerLayerClip(privacy.clip_norm),
    "grouped": _grouped,
}
"""By `privacy.clipping`: the rule of a configuration."""


def clip_rule(privacy: PrivacyConfig) -> ClipRule:
    """Return the rule that `privacy.clipping` names; a class of your own is called with `clip_norm`.

    Raises:
        InputError: no such rule, or what it names makes none.
    """
    if privacy.clipping in CLIP_RULES:
        return CLIP_RULES[privacy.clipping](privacy)
    references.check(privacy.clipping, CLIP_RULES, "privacy.clipping")
    make = references.resolve(privacy.clipping, "privacy.clipping")
    rule = references.called(make, {"clip_norm": privacy.clip_norm}, {}, "privacy.clip_norm")
    if not isinstance(rule, ClipRule):
        raise InputError(
            f"privacy.clipping must name a fedsim.grads.clip.ClipRule, but {privacy.clipping} makes "
            f"{type(rule).__name__}."
        )
    return rule


def overall(norms: Tensor) -> Tensor:
    """Return norms (n,) of whole gradients from themselves, or from those of their parts (n, G)."""
    return norms if norms.dim() == 1 else torch.linalg.vector_norm(norms, dim=1)


def rounded_down(coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers that `dtype` has (at least float32's), in float64, none above `coefficients`.

    Those of very long gradients are subnormal: rounded up, they would lengthen a contribution.
    """
    near = coefficients.to(torch.promote_types(dtype.to_real(), torch.float32))
    below = torch.nextafter(near, torch.zeros_like(near))
    return torch.where(near.double() > coefficients, below, near).double()


def clip_and_sum(
    gradients: Sequence[Tensor], clip: ClipRule, groups: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Clip materialised per-example gradients and add them up.

    Args:
        gradients: one tensor (n, *shape) a parameter, of one dtype and device, in flat order.
        clip: the rule; sees the norm over all parameters of a group together.
        groups: what the rule's `group_of` says of the parameters.

    Returns:
        The sum (P,) in the gradients' dtype, and the norms in float64 before clipping, (n,), or (n, G) for a
        rule with groups. A norm is not finite where an entry is not; such an example adds exactly 0.
    """
    rows, factors, norms, _ = _clipped(gradients, clip, groups)
    with off(rows[0].device.type):  # a model may have left one on
        sums = [factor.to(row.dtype) @ row for row, factor in zip(rows, factors, strict=True)]
    return torch.cat(sums), norms


def clip_and_sum_by_owner(
    gradients: Sequence[Tensor],
    clip: ClipRule,
    owners: Tensor,
    totals: Tensor,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Clip materialised per-example gradients and add each to the total of its owner.

    Args:
        gradients, clip, groups: as in `clip_and_sum`.
        owners: (n,) int64, row of `totals` that each example belongs to.
        totals: (owners, P) in the gradients' dtype, changed in place.

    Returns:
        The norms in float64 before clipping, as `clip_and_sum`.
    """
    rows, factors, norms, finite = _clipped(gradients, clip, groups)
    owners, start = owners if finite is None else owners[finite], 0
    for row, factor in zip(rows, factors, strict=True):
        part = totals[:, start : start + row.shape[1]]
        part.index_add_(0, owners, factor.to(row.dtype)[:, None] * row)
        start += row.shape[1]
    return norms


def _clipped(
    gradients: Sequence[Tensor], clip: ClipRule, groups: Sequence[int] | None
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]:
    """Return rows and coefficients, one of each a parameter, of the finite gradients, the norms of all, and
    which are finite; None if all are."""
    rows = [gradient.reshape(len(gradient), -1) for gradient in gradients]
    places = [0] * len(rows) if groups is None else groups
    squares: list[list[Tensor]] = [[] for _ in range(max(places) + 1)]
    for own, place in zip(squared_norms_of(rows), places, strict=True):
        squares[place].append(own)
    parts = [torch.stack(of_group).sum(0).sqrt() for of_group in squares]
    norms = parts[0] if groups is None else torch.stack(parts, dim=1)
    coefficients = rounded_down(clip.coefficients(norms), rows[0].dtype)
    finite = torch.isfinite(overall(norms))
    whole = bool(finite.all())
    if not whole:  # 0 * nan is nan: a zero coefficient alone would not keep it out of the sum
        rows = [row[finite] for row in rows]
        coefficients = coefficients[finite]
    factors = [coefficients] if groups is None else coefficients.t().contiguous().unbind()
    return rows, [factors[place] for place in places], norms, None if whole else finite


def _zero_unless_finite(coefficients: Tensor, norms: Tensor) -> Tensor:
    return torch.where(torch.isfinite(norms), coefficients, torch.zeros_like(norms))
