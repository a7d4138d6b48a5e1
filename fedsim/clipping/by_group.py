"""Parts of gradients scaled down, each to a bound of its own."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.clipping.base import BoundedRule
from fedsim.grads import constants


@dataclass(frozen=True)
class ClipByGroup(BoundedRule):
    """Scale each group's part of a gradient down to the group's own bound, as `FlatClip` does the whole.

    The bounds C_g satisfy sum of C_g^2 = C^2, so that the contribution of an example, all parts together,
    has norm at most C.
    """

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
