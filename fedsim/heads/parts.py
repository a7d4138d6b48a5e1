"""Several sums in one release: named parts that share one noise multiplier.

A part j with bound D_j on what one example adds, and share a_j of the budget, gets independent noise of
standard deviation sigma D_j / sqrt(a_j) in every entry. Divide it by D_j / sqrt(a_j): what the example
adds to the part is then at most sqrt(a_j) long, to all parts together at most sqrt(sum of a_j) = 1, and all
entries have noise sigma. So the parts are one Gaussian release of sensitivity 1 and noise multiplier sigma,
and the squares of bound / noise add up: sum of a_j / sigma^2 = 1 / sigma^2. Nothing is given away where one
example can reach all bounds at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import validate
from fedsim.validate import InputError


@dataclass(frozen=True)
class Part:
    """One named sum.

    Attributes:
        name: what it is called in `Layout`.
        shape: of the sum.
        bound: largest L2 norm of what one example adds to it, in its own units, > 0.
        share: of the budget, in (0, 1].
    """

    name: str
    shape: tuple[int, ...]
    bound: float
    share: float = 1.0

    def __post_init__(self) -> None:
        validate.positive(self.bound, f"bound of part {self.name}")
        validate.positive(self.share, f"share of part {self.name}")

    @property
    def length(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def unit(self) -> float:
        """What a 1 of the normalised release is in the units of the sum: bound / sqrt(share)."""
        return self.bound / math.sqrt(self.share)

    def noise_std(self, noise_multiplier: float) -> float:
        """Return the standard deviation of the noise in every entry of the sum, in its own units."""
        return noise_multiplier * self.unit


@dataclass(frozen=True)
class Layout:
    """The parts of one release, whose shares add up to 1.

    `flat` makes of named sums the vector that is added up and noised: its sensitivity is 1, so the standard
    deviation of its noise is the noise multiplier. `named` turns it back.

    Raises:
        InputError: no part, two of a name, or shares that do not add up to 1.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise InputError(f"a release must have parts of different names, got {names}.")
        whole = math.fsum(part.share for part in self.parts)
        if abs(whole - 1) > 1e-9:
            raise InputError(f"the shares of {', '.join(names)} must add up to 1, got {whole:.12g}.")

    @property
    def length(self) -> int:
        """Entries of the flat vector."""
        return sum(part.length for part in self.parts)

    @property
    def sensitivity(self) -> float:
        """L2 bound on what one example adds to the flat vector: 1."""
        return 1.0

    def flat(self, sums: Mapping[str, Tensor]) -> Tensor:
        """Return the parts' sums, each divided by its unit, one after the other: (length,) float64.

        Raises:
            InputError: other names or shapes than the parts'.
        """
        got = {name: tuple(value.shape) for name, value in sums.items()}
        if got != {part.name: part.shape for part in self.parts}:
            wanted = ", ".join(f"{part.name} {part.shape}" for part in self.parts)
            raise InputError(f"a release of {wanted} must get just these sums, got {got}.")
        return torch.cat([sums[part.name].double().reshape(-1) / part.unit for part in self.parts])

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the sums in their own units and shapes, float64, from a vector (length,) like `flat`'s.

        Raises:
            InputError: another length.
        """
        if tuple(flat.shape) != (self.length,):
            raise InputError(f"a release must have shape ({self.length},), got {tuple(flat.shape)}.")
        pieces = flat.double().split([part.length for part in self.parts])
        return {
            part.name: (piece * part.unit).reshape(part.shape)
            for part, piece in zip(self.parts, pieces, strict=True)
        }

    def noise_stds(self, noise_multiplier: float) -> dict[str, float]:
        """Return `Part.noise_std` of each part."""
        return {part.name: part.noise_std(noise_multiplier) for part in self.parts}


def split(errors: Sequence[float]) -> tuple[float, ...]:
    """Return the shares a_j that make sum of e_j^2 / a_j smallest: a_j = e_j / sum of e.

    e_j is how much the noise of part j moves the result (root mean square) when it has the whole budget; with
    share a_j its variance is e_j^2 / a_j. By Cauchy and Schwarz the sum is at least (sum of e)^2, which these
    shares reach.

    Raises:
        InputError: an error that is not positive.
    """
    for error in errors:
        validate.positive(error, "the error of a part")
    whole = math.fsum(errors)
    return tuple(error / whole for error in errors)


def over_steps(noise_multiplier: float, shares: Sequence[float]) -> tuple[float, ...]:
    """Return the noise multipliers of releases one after the other that cost together what one costs.

    A release with share a gets noise_multiplier / sqrt(a): adaptively composed Gaussians cost what one of
    noise multiplier (sum of 1 / sigma_t^2)^(-1/2) costs (Dong, Roth and Su 2022, corollary 3.3).

    Raises:
        InputError: shares that are not positive or do not add up to 1.
    """
    layout = Layout(tuple(Part(str(t), (), 1.0, share) for t, share in enumerate(shares)))
    return tuple(part.noise_std(noise_multiplier) for part in layout.parts)
