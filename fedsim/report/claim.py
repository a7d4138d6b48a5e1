"""How an epsilon is said: with everything it depends on, or not claimed at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NO_CLAIM_ABOVE = 1000.0
"""From here on an epsilon is no guarantee, and no number is shown: e to the 1,000th protects nobody."""
NONE = "none"


def claim(spent: Mapping[str, Any]) -> str:
    """Return one line for an epsilon (the mapping of an `EpsilonResult`); never a bare number."""
    basis = f"{delta(spent)}, {spent['relation']}, {spent['accountant']}"
    note = f"; {spent['note']}" if spent["note"] else ""
    value = _finite(spent["value"])
    if value is None:
        return f"no claimable epsilon: {spent['note']}" if spent["note"] else "no claimable epsilon"
    if value > NO_CLAIM_ABOVE:
        return f"no claimable epsilon: above {NO_CLAIM_ABOVE:g} nobody is protected ({basis}{note})"
    return f"{value:.4g} ({basis}{note})"


def delta(spent: Mapping[str, Any]) -> str:
    """Return an epsilon's delta with N x delta, the units it could give away whole on average."""
    n_delta = spent.get("n_delta")
    return f"delta {spent['delta']:g}, N x delta {'unknown' if n_delta is None else f'{n_delta:.2g}'}"


def number(value: Any) -> str:
    """Return the value for a table cell whose heading says the rest, `NONE` where none can be claimed."""
    finite = _finite(value)
    if finite is None or finite > NO_CLAIM_ABOVE:
        return NONE
    return f"{finite:.0f}" if finite >= 100 else f"{finite:.3g}"


def _finite(value: Any) -> float | None:
    """The value, or None where it is infinite or was not computable (null in files)."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
