"""What is known of the examples that contribute to a step, and what a node says of all of them together."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.types import ClippedSum

NORM_EDGES = tuple(
    float(x) for x in np.logspace(-3, 4, 57)
)  # histogram of per-example norms, 8 bins a decade
STATISTICS = {
    "loss_sum": 0,
    "clipped": 0,
    "non_finite": 0,
    "undecodable": 0,
    "norm_sum": 0,
    "norm_histogram": len(NORM_EDGES) - 1,
}
"""Names of a reply's statistics, with the length of those that are lists, 0 for numbers."""


class Found:
    """Statistics of examples, of one physical batch after the other.

    Args:
        bound: sensitivity of the clip rule.
    """

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._norms: list[torch.Tensor] = []
        self._losses: list[torch.Tensor] = []
        self._clipped: list[torch.Tensor | None] = []
        self._undecodable = 0

    def add(
        self,
        norms: torch.Tensor,
        losses: torch.Tensor,
        clipped: torch.Tensor | None,
        whole: NDArray[np.bool_] | None,
    ) -> None:
        """Take in those of the examples that are there, (m,) each, in a batch of which `whole` (n,) says
        which they are; the others have no finite norm, as everything that contributes nothing."""
        if whole is not None:
            self._undecodable += int((~whole).sum())
            norms, losses = (_spread(values, whole, torch.nan) for values in (norms, losses))
            clipped = None if clipped is None else _spread(clipped, whole, False)
        self._norms.append(norms)
        self._losses.append(losses)
        self._clipped.append(clipped)

    def take(self, part: ClippedSum) -> None:
        """Take in the statistics of a sum."""
        self._undecodable += part.undecodable
        self.add(part.norms, part.losses, part.clipped, None)

    def together(
        self, total: torch.Tensor, count: int, places: NDArray[np.int64] | None = None
    ) -> ClippedSum:
        """Return the statistics with a sum of so many examples.

        Args:
            places: where each of the examples belongs, in the order they came; None if it is that order.
        """
        values = torch.cat(self._norms), torch.cat(self._losses), _joined(self._clipped)
        if places is not None:
            order = torch.from_numpy(np.argsort(places)).to(values[0].device)
            values = values[0][order], values[1][order], None if values[2] is None else values[2][order]
        norms, losses, clipped = values
        return ClippedSum(total, count, self._bound, norms, losses, clipped, self._undecodable)


def _spread(values: torch.Tensor, whole: NDArray[np.bool_], fill: float | bool) -> torch.Tensor:
    """Return (n,) with the values in the places that are there, and `fill` in the others."""
    out = values.new_full((len(whole),), fill)
    out[torch.from_numpy(whole).to(values.device)] = values
    return out


def _joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def statistics(result: ClippedSum, undecodable: int = 0) -> dict[str, float | list[float]]:
    """Return sensitive statistics that add up over nodes: loss sum, clipped count, norm histogram.

    Args:
        result: of the step.
        undecodable: pictures beside those that the result counts.
    """
    norms = result.norms.cpu().numpy()
    whole = np.isfinite(norms)
    finite = norms[whole]
    clipped = finite > result.sensitivity if result.clipped is None else result.clipped.cpu().numpy()[whole]
    losses = result.losses.cpu().numpy()
    counts, _ = np.histogram(np.clip(finite, NORM_EDGES[0], NORM_EDGES[-1]), bins=np.asarray(NORM_EDGES))
    return {
        "loss_sum": float(losses[np.isfinite(losses)].sum()),
        "clipped": float(clipped.sum()),
        "non_finite": float(len(norms) - len(finite)),
        "undecodable": float(result.undecodable + undecodable),
        "norm_sum": float(finite.sum()),
        "norm_histogram": [float(c) for c in counts],
    }
