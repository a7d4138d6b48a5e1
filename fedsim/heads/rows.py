"""Features of examples as rows of bounded length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import validate
from fedsim.validate import InputError

BLOCK = 2048  # rows at once: enough for the rate of a matrix product, few enough for the cache
_FAR = 2.0**20  # a row this many times longer than the bound is shortened to that before norms are taken

Values = Tensor | NDArray


@dataclass(frozen=True)
class Rows:
    """How the features x of an example become a row of norm at most `clip_norm`.

    x gets the constant `bias` as one more entry, and is then scaled by min(1, C / norm), the bias with it: it
    counts in the norm.

    Attributes:
        clip_norm: C > 0.
        bias: last entry of every row before clipping; 0 for none.
    """

    clip_norm: float
    bias: float = 0.0

    def __post_init__(self) -> None:
        validate.positive(self.clip_norm, "clip_norm")
        validate.in_range(self.bias, 0.0, 1e9, "bias")

    def width(self, features: int) -> int:
        """Return the length of a row of that many features."""
        return features + (self.bias > 0)

    def of(self, features: Tensor) -> Tensor:
        """Return the rows (n, width) of features (n, d), float64 where they are and float32 otherwise.

        Norms are taken in float64; a row's own is at most C up to the rounding of its entries. An example
        with an entry that is not finite gives a row of zeros, the bias included.
        """
        values = features.to(torch.promote_types(features.dtype, torch.float32))
        if self.bias:
            values = torch.cat([values, values.new_full((len(values), 1), self.bias)], 1)
        return clipped(values, self.clip_norm)


def clipped(values: Tensor, bound: float) -> Tensor:
    """Return the rows of `values` (n, m), float32 or float64, scaled by min(1, bound / norm).

    Rows with an entry that is not finite become zero; very long ones do not overflow.
    """
    norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    if not bool((norms < _FAR * bound).all()):
        peaks = values.abs().amax(1)
        finite = torch.isfinite(peaks)
        far = peaks > _FAR * bound
        # In this order: a reciprocal of the largest numbers is subnormal, which would lose its digits.
        near = values / torch.where(far, peaks, torch.ones_like(peaks))[:, None]
        near = torch.where(far[:, None], near * (_FAR * bound), near)
        values = torch.where(finite[:, None], near, torch.zeros_like(near))
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    factors = (bound / norms.clamp(min=bound)).to(values.dtype)
    return values * factors[:, None]


def blocks(features: Values, targets: Values, size: int = BLOCK) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield consecutive rows of both as tensors, at most `size` at once; memory-mapped arrays are read so.

    Raises:
        InputError: features that are not (n, d), or another number of targets.
    """
    if features.ndim != 2 or len(features) != len(targets):
        raise InputError(
            f"features must have shape (n, d) with n targets, got {tuple(features.shape)} and "
            f"{len(targets)} targets."
        )
    for start in range(0, len(features), size):
        stop = start + size
        yield _tensor(features[start:stop]), _tensor(targets[start:stop])


def _tensor(values: Values) -> Tensor:
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
