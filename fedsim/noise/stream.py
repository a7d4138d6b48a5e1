"""Noise that is correlated over steps: part of it cancels in the running sum of the noisy gradients.

Both mechanisms here factor the prefix-sum matrix A (lower triangle of ones) as A = B C. The steps' sums x
(one row a step) are encoded, made private with independent noise, and decoded: B (C x + z) = A x + B z. The
optimizer wants a gradient a step, not a prefix sum, so differences of neighbouring rows are released:

    noisy gradients = x + M z,    M = D B,  D = inverse of A,    hence M C = identity.

All of it is one release of the Gaussian mechanism with the sensitivity of C, whatever M does (Denisov et
al. 2022, Theorem 2.1: also when later gradients depend on earlier releases). If a unit takes part in one
step only, that is the largest column norm of C, times the clip norm.

* `tree.TreeAggregation`: C holds the nodes of a binary tree over the steps of a pass; a new tree every
  `restart_every` steps (Kairouz et al. 2021, "Practical and private (deep) learning without sampling or
  shuffling", with the online variance reduction of Honaker 2015 and restarts).
* `banded.BandedToeplitz`: C is lower triangular, banded, constant along diagonals (Choquette-Choo et al.
2023,
  "(Amplified) banded matrix factorization"; McKenna 2024, "Scaling up the banded matrix factorization").
  Columns at least `bands` apart share no row, so participations that far apart are separate releases.

`Stream` makes M z row by row in memory that does not grow with the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import seeds

Array = NDArray[np.float64]


class Factorisation(Protocol):
    """A factorisation, as matrices for analysis and step by step for runs; z is standard normal."""

    def column_norm(self, steps: int) -> float:
        """Return the largest column norm of C over `steps` steps: the L2 sensitivity, in clip norms, to a
        unit that takes part once (in every `restart_every` or `bands` steps)."""
        ...

    def factors(self, steps: int) -> tuple[Array, Array]:
        """Return the explicit (C, M), float64 of shapes (k, steps) and (steps, k); for tests and analysis."""
        ...

    def first_needed(self, step: int) -> int:
        """Return the step from which replaying gives the memory that `step` starts with."""
        ...

    def rows(self, step: int) -> int:
        """Return the number of vectors in the memory that `step` starts with."""
        ...

    def advance(
        self, memory: list[Array], root: seeds.Root, step: int, count: int
    ) -> tuple[Array, list[Array]]:
        """Return row `step` of M z, (count,) float64 of its own, and the memory the next step starts with.

        z derives from (root, step) alone. Vectors in `memory` are left as they are.
        """
        ...


class Stream:
    """The rows of M z one after the other. What a row is depends on (root, step) only; memory saves time.

    A step other than the next one (a run resumed from an older checkpoint, or without saved memory) is made
    by replaying the steps it depends on, bit for bit the same.
    """

    def __init__(self) -> None:
        self._position = 0
        self._memory: list[Array] = []
        self._root: seeds.Root | None = None

    def sample(self, factorisation: Factorisation, root: seeds.Root, step: int, count: int) -> Array:
        """Return the unit-scale noise of one step, (count,) float64: row `step` of M z.

        Args:
            factorisation: the same for all steps of a run.
            root: what z derives from.
            step: server updates before this one.
            count: coordinates; they are independent of each other.
        """
        position, memory = self._position, self._memory
        self._position, self._memory = -1, []  # if anything fails below, the next call replays
        known = self._root is None or self._root == root
        whole = len(memory) == factorisation.rows(step) and all(row.size == count for row in memory)
        if position != step or not known or not whole:
            memory = []
            for earlier in range(factorisation.first_needed(step), step):
                _, memory = factorisation.advance(memory, root, earlier, count)
        noise, self._memory = factorisation.advance(memory, root, step, count)
        self._position, self._root = step + 1, root
        return noise

    def state_dict(self) -> dict[str, Tensor]:
        """Return the next step and the memory, float64 (rows, P). It holds noise that was released: it must
        not be kept where the noise has to stay secret."""
        rows = torch.from_numpy(np.stack(self._memory)) if self._memory else torch.zeros(0, 0).double()
        return {"position": torch.tensor(self._position), "memory": rows}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned; from nothing, the next call replays."""
        self._root = None
        self._position = int(state["position"]) if state else -1
        self._memory = [row.numpy().copy() for row in state["memory"]] if state else []
