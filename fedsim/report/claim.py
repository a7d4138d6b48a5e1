"""How an epsilon is said: with everything it depends on, or not claimed at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NO_CLAIM_ABOVE = 1000.0
"""From here on an epsilon is no guarantee, and no number is shown: e to the 1,000th protects nobody."""
MEANINGLESS_ABOVE = 100.0
"""From here on an epsilon hides nobody; the number is shown, because it is exact."""
NONE = "none"
_HIDDEN = {
    ("example", True): "whether one example took part",
    ("example", False): "which of two examples took part",
    ("holder", True): "whether a holder took part, with all its examples",
    ("holder", False): "which of two holders took part, with all their examples",
}


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


def meaning(spent: Mapping[str, Any]) -> str:
    """Return in words what an epsilon (the mapping of an `EpsilonResult`) is about, by its unit and relation,
    and whether it is small enough to mean anything."""
    value = _finite(spent["value"])
    hides = "hides" if value is not None and value <= MEANINGLESS_ABOVE else "does not hide"
    added = spent["relation"] != "replace one"
    return f"{hides} {_HIDDEN[spent['unit'], added]}"


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
