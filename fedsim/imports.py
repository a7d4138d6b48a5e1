"""Which files import statements lead to within one folder: the code that code of one's own relies on."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

_KNOWN = ("fedsim", "strategies")  # compared and sent as fedsim itself


def followed(files: Iterable[Path], root: Path) -> set[Path]:
    """Return Python files in `root` with all that they import from `root`, and what that imports in turn.

    Of a package that is imported all files, of a module its own. By import statements wherever they stand;
    what is imported in other ways is not seen.
    """

    @functools.cache  # thousands of names begin with a few
    def kind(first: str) -> str:
        if (root / first / "__init__.py").is_file():
            return "package"
        return "other" if (root / first).is_dir() or (root / f"{first}.py").is_file() else ""

    found = set(files)
    new, seen = set(found), set[str]()
    while new:
        named = (_imports(path, path.relative_to(root), path.stat().st_mtime_ns) for path in new)
        parts = ((name, name.partition(".")[0]) for name in set[str]().union(*named))
        names = {first if kind(first) == "package" else name for name, first in parts if kind(first)} - seen
        seen |= names
        new = {file for name in names for file in _local(name, root)} - found
        found |= new
    return found


@functools.lru_cache(maxsize=4096)
def _imports(path: Path, place: Path, changed: int) -> frozenset[str]:
    """Dotted names that the file at `place` in its root imports, as it was last changed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return frozenset()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = place.parts[: -node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)} - {""}
    return frozenset(names)


def _local(name: str, root: Path) -> set[Path]:
    parts = name.split(".")
    if parts[0] in _KNOWN:
        return set()
    folder = root.joinpath(*parts)
    if (folder / "__init__.py").is_file():
        return set(folder.rglob("*.py"))
    return {folder.with_suffix(".py")} if folder.with_suffix(".py").is_file() else set()
