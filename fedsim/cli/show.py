"""How answers look on the console: tables, and epsilons with everything they depend on."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from fedsim.report.claim import claim

if TYPE_CHECKING:
    from rich.table import Table


def table(*columns: str) -> Table:
    """Return an empty table with these columns."""
    from rich.table import Table

    empty = Table(show_lines=False)
    for column in columns:
        empty.add_column(column, overflow="fold")
    return empty


def spent(epsilon: Any) -> str:
    """Return one epsilon (an EpsilonResult or its mapping) with all it depends on; never a bare number."""
    if dataclasses.is_dataclass(epsilon) and not isinstance(epsilon, type):
        epsilon = dataclasses.asdict(epsilon)
    return claim(epsilon)


def value(epsilon: float | None) -> str:
    """Return the number alone, for table cells whose heading says the rest."""
    if epsilon is None:
        return "-"
    return f"{epsilon:.4g}" if math.isfinite(epsilon) else "no claimable epsilon"


def number(item: Any) -> str:
    """Return a float with six digits, a large integer with separators, anything else as it is."""
    if isinstance(item, int) and not isinstance(item, bool):
        return f"{item:,}"
    return f"{item:.6g}" if isinstance(item, float) else str(item)
