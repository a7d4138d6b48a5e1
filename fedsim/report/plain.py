"""Answers and results as JSON that any parser reads: what is not a finite number is null.

Null means: not defined (the loss of an empty draw, the spread of one seed) or not finite. An epsilon that is
null cannot be claimed, and its `note` says why.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any


def plain(value: Any) -> Any:
    """Turn dataclasses into mappings, tuples into lists, and numbers that are not finite into None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)


def as_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as strict JSON."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)
