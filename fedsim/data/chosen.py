"""Rows of a table that is kept elsewhere, by place: of millions, a choice that costs few bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64] | slice

NEARLY = 0.9
"""Share of the table from which on rows that are left out are remembered, and not those that are there."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which rows, of a table of `whole`.

    Attributes:
        whole: rows that the table has.
        rows: the place of each row; None: all of them, in order. Of the smallest dtype that holds them.
        first, count: instead, so many from a place on; a negative count: up to the end.
        passed: of these, places that are left out, each less those left out before it, ascending: so a row is
            found among millions by the few that are held out.
    """

    whole: int
    rows: NDArray[Any] | None = None
    first: int = 0
    count: int = -1
    passed: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        if self.rows is not None:
            return len(self.rows)
        return self.whole - self.first if self.count < 0 else self.count

    def places(self, rows: Rows) -> NDArray[np.int64]:
        """Return where rows are in the table."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        if self.rows is not None:
            return self.rows[rows].astype(np.int64)
        if self.passed is not None:
            rows = rows + np.searchsorted(self.passed, rows, side="right")
        return self.first + rows

    def take(self, rows: Rows) -> Chosen:
        """Return these rows of the rows. Consecutive ones cost no memory, nor do nearly all of them in order;
        others four bytes each up to four thousand million."""
        if isinstance(rows, slice) and rows.indices(len(self))[2] == 1 and self.rows is None:
            start, stop, _ = rows.indices(len(self))
            if self.passed is None:
                return Chosen(self.whole, None, self.first + start, max(0, stop - start))
        places = self.places(rows)
        if len(places) > NEARLY * self.whole and bool((places[1:] > places[:-1]).all()):
            there = np.zeros(self.whole, np.bool_)
            there[places] = True
            passed = np.flatnonzero(~there)
            passed -= np.arange(len(passed))
            return Chosen(self.whole, None, 0, len(places), passed)
        return Chosen(self.whole, places.astype(np.min_scalar_type(max(0, self.whole))))
