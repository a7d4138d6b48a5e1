"""Second moments of features and their products with targets: all that least squares needs.

Mehta et al. 2023 (DP-LS): G = sum of x x^T, b = sum of t x^T, and for the form with class weights
A_l = sum of x x^T over the examples of class l. With |x| <= C one example adds x x^T, of Frobenius norm at
most C^2, to G and, being of one class, to one A_l; and t x^T, of norm |t| |x|, to b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import validate
from fedsim.heads import packing, products
from fedsim.heads import rows as bounded
from fedsim.heads.parts import Layout, Part, split
from fedsim.heads.rows import Rows, Values
from fedsim.validate import InputError

GAIN = math.sqrt(2)
"""Length of a class's weights in units of 1 / C that the default split expects; see `default_shares`."""


@dataclass(frozen=True)
class Moments:
    """The moments of examples with a class each, or with general targets.

    Attributes:
        rows: how features become rows of bounded length.
        features: d0, how many there are.
        outputs: k, classes or targets.
        target_bound: T, largest L2 norm of an example's targets (k,), longer ones are clipped to it; None
            where targets are classes 0 .. k - 1, as one-hot vectors. (Those less 1 / k, as general targets,
            give the same decisions with T = sqrt(1 - 1/k).)
        per_class: whether to sum the A_l too; for classes only.

    Raises:
        InputError: a value out of range, or A_l of general targets.
    """

    rows: Rows
    features: int
    outputs: int
    target_bound: float | None = None
    per_class: bool = False

    def __post_init__(self) -> None:
        validate.in_range(self.features, 1, math.inf, "features")
        validate.in_range(self.outputs, 1, math.inf, "outputs")
        if self.target_bound is not None:
            validate.positive(self.target_bound, "target_bound")
            if self.per_class:
                raise InputError("second moments by class must have classes, got general targets.")

    @property
    def width(self) -> int:
        """d, the length of a row."""
        return self.rows.width(self.features)

    def layout(self, shares: Sequence[float] | None = None) -> Layout:
        """Return the parts: "second" (d (d + 1) / 2,) packed, "first" (k, d), "by_class" (k, d (d + 1) / 2).

        Bounds C^2, C T (T = 1 for classes) and C^2. By default the shares are `default_shares`.

        Raises:
            InputError: shares of another number, or that do not add up to 1.
        """
        bound, packed = self.rows.clip_norm, packing.length(self.width)
        chosen = (
            tuple(shares) if shares is not None else default_shares(self.outputs, per_class=self.per_class)
        )
        parts = [
            ("second", (packed,), bound**2),
            ("first", (self.outputs, self.width), bound * (self.target_bound or 1.0)),
        ]
        if self.per_class:
            parts.append(("by_class", (self.outputs, packed), bound**2))
        if len(chosen) != len(parts):
            raise InputError(f"shares must be {len(parts)} numbers, got {len(chosen)}.")
        return Layout(tuple(Part(*part, share) for part, share in zip(parts, chosen, strict=True)))

    def sums(self, features: Values, targets: Values) -> dict[str, Tensor]:
        """Return the sums of the parts, float64, in their own units.

        An example adds zero to all of them where a feature or target is not finite, or its class is none of
        0 .. k - 1. Products are float64 for float64 features and float32 else, added up in float64.

        Args:
            features: (n, d0), n may be 0.
            targets: (n,) integer classes, or (n, k) with a `target_bound`.

        Raises:
            InputError: other shapes.
        """
        groups = self.outputs if self.per_class else 1
        seconds = torch.zeros(groups, self.width, self.width, dtype=torch.float64)
        first = torch.zeros(self.outputs, self.width, dtype=torch.float64)
        self._check(features, targets)
        size = bounded.BLOCK * groups  # so that a class's rows of a block are enough for a fast product
        for values, wanted in bounded.blocks(features, targets, size):
            rows, coefficients, labels = self._rows(values, wanted)
            first += products.cross_moment(coefficients, rows).cpu()
            for group in range(groups):
                own = rows if groups == 1 else rows[labels == group]
                seconds[group] += products.second_moment(own).cpu()
        sums = {"second": packing.pack(seconds.sum(0)), "first": first}
        return {**sums, "by_class": packing.pack(seconds)} if self.per_class else sums

    def _check(self, features: Values, targets: Values) -> None:
        wanted = () if self.target_bound is None else (self.outputs,)
        if tuple(features.shape[1:]) != (self.features,) or tuple(targets.shape[1:]) != wanted:
            raise InputError(
                f"moments must get features (n, {self.features}) and targets {('n', *wanted)}, got "
                f"{tuple(features.shape)} and {tuple(targets.shape)}."
            )

    def _rows(self, values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows (n, d), coefficients (n, k) of their dtype, and labels (n,)."""
        rows = self.rows.of(values)
        if self.target_bound is None:
            labels, hot = one_hot(targets, self.outputs, rows)
            return rows * hot.sum(1, keepdim=True), hot, labels
        # A row whose targets are not finite must leave the second moments too.
        finite = torch.isfinite(targets).all(1)
        wanted = bounded.clipped(targets.to(rows.dtype), self.target_bound)
        return rows * finite[:, None].to(rows.dtype), wanted, torch.zeros(len(rows), dtype=torch.long)


def one_hot(labels: Tensor, classes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels (n,) int64 and their one-hot rows (n, classes); a row of zeros where it is no class."""
    wanted = labels.long()
    known = (wanted >= 0) & (wanted < classes)
    hot = torch.zeros(len(wanted), classes, dtype=like.dtype, device=like.device)
    hot[known, wanted[known]] = 1
    return torch.where(known, wanted, torch.full_like(wanted, -1)), hot


def default_shares(outputs: int, gain: float = GAIN, per_class: bool = False) -> tuple[float, ...]:
    """Return the shares of "second", "first" (and "by_class") that disturb the solution W least.

    To first order the noises E of G and F of b move W = b (G + r I)^-1 by (F - W E) (G + r I)^-1. Of noise
    multiplier 1 an entry of F has standard deviation C, so F has length C sqrt(k d); an entry of W E has
    variance near C^4 |w|^2 / 2 (see `packing`), so W E has length C^2 |W| sqrt(d / 2), |W| = sqrt(k) gain /
    C. `split` of both gives second : first = gain / sqrt(2) : 1. Equal shares, those of the paper, are best
    where gain = sqrt(2); they are the default, because |W| is not public. With A_l, which take the place of
    G for one class each, their share is that of G.
    """
    validate.positive(gain, "gain")
    matrices = gain / math.sqrt(2)
    return split([matrices, 1.0, matrices] if per_class else [matrices, 1.0])
