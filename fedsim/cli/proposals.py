"""What the shell may propose for an argument: configurations, settings, their values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_OF_COMMAND = {"compare": ("compare",), "tune": ("tune",)}
_LISTED = re.compile(r"#\s*(?:of |or )?((?:[\w.:]+ \| )+[\w.:]+)")


def proposing(action: argparse.Action, propose: Callable[..., list[str]]) -> None:
    """Let an argument be completed by a function of (prefix, parsed_args)."""
    action.completer = propose  # type: ignore[attr-defined]


def configurations(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the names under configs/ that a command takes, and YAML files and folders from here on."""
    from fedsim.config import CONFIG_DIR

    wanted = _OF_COMMAND.get(getattr(parsed_args, "command", ""))
    no_recipes = {"presets", "tuned", *(folder for folders in _OF_COMMAND.values() for folder in folders)}
    own = []
    for path in CONFIG_DIR.rglob("*.yaml"):
        name = path.relative_to(CONFIG_DIR).with_suffix("").as_posix()
        folder = name.partition("/")[0]
        if folder in wanted if wanted else folder not in no_recipes:
            own.append(name)
    typed = prefix.rpartition("/")
    here = [path for path in Path(typed[0] + typed[1]).glob("*") if not path.name.startswith(".")]
    files = [path.as_posix() for path in here if path.suffix == ".yaml"]
    return sorted(own) + sorted(files) + sorted(f"{path.as_posix()}/" for path in here if path.is_dir())


def overrides(prefix: str, **_: Any) -> list[str]:
    """Return settings as "section.key=", and once that stands, the values that configs/base.yaml lists."""
    held = _settings()
    key, equals, _value = prefix.partition("=")
    if equals:
        return [f"{key}={value}" for value in held.get(key, ())]
    return [f"{name}=" for name in held]


def _settings() -> dict[str, tuple[str, ...]]:
    """Every setting with the words that base.yaml's comment lists for it; none where it lists none."""
    from fedsim.config import CONFIG_DIR

    found: dict[str, tuple[str, ...]] = {}
    path: list[tuple[int, str]] = []
    for line in (CONFIG_DIR / "base.yaml").read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)(\w+):(.*)", line)
        if match is None:
            continue
        depth, key, rest = len(match[1]), match[2], match[3]
        path = [part for part in path if part[0] < depth] + [(depth, key)]
        value = rest.partition("#")[0].strip()
        if value:
            listed = _LISTED.search(rest)
            words = listed[1].split(" | ") if listed else []
            if value in ("true", "false"):
                words = ["true", "false"]
            found[".".join(name for _, name in path)] = tuple(w for w in words if ":" not in w)
    return found
