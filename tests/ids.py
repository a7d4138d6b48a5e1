"""Test ids as text: whether what a table names is there."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def missing(test_id: str) -> str:
    """Return what is not there of `path::function[case]`, or of a path alone; "" where all is.

    The case in brackets is left to pytest: which there are is known only by collecting.
    """
    path, *inner = test_id.partition("[")[0].split("::")
    if not (ROOT / path).is_file():
        return path
    return "" if not inner or inner[-1] in _functions(ROOT / path) else test_id


@functools.cache
def _functions(path: Path) -> frozenset[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef))
