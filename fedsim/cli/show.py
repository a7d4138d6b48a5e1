"""How answers look on the console: tables, and epsilons with everything they depend on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from fedsim.report.claim import claim, meaning

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def table(*columns: str) -> Table:
    """Return an empty table with these columns."""
    from rich.table import Table

    empty = Table(show_lines=False)
    for column in columns:
        empty.add_column(column, overflow="fold")
    return empty


def console(least: int = 0) -> Console:
    """Return a console, at least so many characters wide, that shows names as they are: "[a]" and ":b:" of
    somebody's data are no markup and no emoji."""
    from rich.console import Console

    plain = Console(markup=False, emoji=False)
    return plain if plain.width >= least else Console(markup=False, emoji=False, width=least)


def spent(epsilon: Any) -> str:
    """Return one epsilon (an EpsilonResult or its mapping) with all it depends on; never a bare number."""
    if dataclasses.is_dataclass(epsilon) and not isinstance(epsilon, type):
        epsilon = dataclasses.asdict(epsilon)
    return claim(epsilon)


def epsilons(spent: Mapping[str, Any], sensitive: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return every epsilon of a run or plan as a row: what it is of, and the number with what it says.

    Args:
        spent: by "example" or "holder"; "UNIT_check" and the like are the same by other accountants.
        sensitive: names "epsilon.UNIT" of those that are not to be published.
    """
    rows = []
    for name, found in spent.items():
        held = found if isinstance(found, Mapping) else dataclasses.asdict(found)
        unit, again = held["unit"], name != held["unit"]
        lines = [claim(held)] if again else [claim(held), meaning(held)]
        if f"epsilon.{name}" in sensitive:
            lines.append("sensitive: it follows from the size of the largest holder")
        rows.append((f"epsilon per {unit}{', again' if again else ''}", "\n".join(lines)))
    return rows


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
