"""From files, overrides and mappings to a `Config`, and back to text: finding, reading, merging, paths.

`load` resolves a name or path, follows `extends`, applies overrides, refuses unknown keys with the nearest
valid one, checks ranges and conflicts, and returns a frozen `Config`. How one layer is merged over another is
`fedsim.merging`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedsim import presets, rules, validate
from fedsim.config import CONFIG_DIR, Config
from fedsim.merging import Choice, dotlist, merge, read, schema_of, to_dataclass
from fedsim.validate import InputError

PATHS = ("data.root", "model.init_from", "federation.partition.options.file")
"""Settings that name files."""


def load(
    source: str | Path,
    overrides: Sequence[str] = (),
    folder: Path | None = Path(),
    where: str = "command line",
) -> Config:
    """Load a configuration.

    Args:
        source: path of a YAML file, or a name under configs/ such as "quickstart" or "smoke/central_dpsgd".
        overrides: "key.path=value" strings, YAML values, applied last.
        folder: where relative paths in `overrides` start; None refuses them. Paths in a file (`extends`,
            data.root, model.init_from) start at that file's own folder.
        where: the overrides were said, for errors.

    Raises:
        InputError: unknown key (with the nearest valid one), wrong type, value out of range, settings that
            exclude each other or that nothing reads, missing or unreadable file.
    """
    merged = _from_file(source)
    if overrides:
        merged = _layered(merged, dotlist(overrides), where, folder)
    return _freeze(merged)


def _from_file(source: str | Path) -> DictConfig:
    """What a file and those it extends say; not to be changed, for it may be one for all."""
    files = [path for path, _ in reversed(_chain(find(source)))]
    # Those of fedsim say the same wherever the process works.
    own = tuple(itertools.takewhile(lambda path: path.is_relative_to(CONFIG_DIR), files))
    merged = _own_files(tuple((path, path.read_text(encoding="utf-8")) for path in own))
    return functools.reduce(_over, files[len(own) :], merged)


@functools.lru_cache(maxsize=256)
def _own_files(held: tuple[tuple[Path, str], ...]) -> DictConfig:
    """What files say, each merged over those before it; many extend the same."""
    return _over(_own_files(held[:-1]), held[-1][0]) if held else _schema()


def _over(merged: DictConfig, path: Path) -> DictConfig:
    return _layered(merged, read(path), str(path), path.parent)


def _layered(merged: DictConfig, given: DictConfig, where: str, folder: Path | None) -> DictConfig:
    """Merge what one file or command line says, over the preset it names."""
    said = OmegaConf.to_container(given)
    preset = _written(said, "preset")
    if preset is not None:
        merged = merge(merged, presets.content(str(preset), CONFIG_DIR), f"preset {preset}")
    merged = _located(merge(merged, given, where), said, folder)
    merged.preset = None
    return merged


def loaded(source: str | Path | Mapping[str, Any] | Config, changes: Mapping[str, Any]) -> Config:
    """Load a configuration from whatever says one, with changes on top.

    Args:
        source: as of `load`, a mapping of settings by section, or a configuration.
        changes: settings by section, or by dotted name; a section is changed, not replaced.

    Raises:
        InputError: as `load`.
    """
    if isinstance(source, Config):
        merged = OmegaConf.create(dataclasses.asdict(source))
        merged = _merged(_schema(), merged, "configuration")
    elif isinstance(source, Mapping):
        merged = _merged(_schema(), _nested(source, "configuration"), "configuration")
    else:
        merged = _from_file(source)
    return _freeze(_merged(merged, _nested(changes, "overrides"), "overrides"))


def _merged(merged: DictConfig, given: DictConfig, where: str) -> DictConfig:
    return _layered(merged, given, where, Path())


def _nested(settings: Mapping[str, Any], where: str) -> DictConfig:
    """Return settings by section or dotted name as one tree."""
    tree = OmegaConf.create({})
    try:
        for name, value in settings.items():
            plain = dataclasses.asdict(value) if isinstance(value, Choice) else value
            OmegaConf.update(tree, str(name), plain, merge=True)
    except Exception as error:
        raise InputError(f"{where} must hold settings by section, got {dict(settings)}. {error}") from error
    return tree


def located(overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the overrides of a file in `folder` with their relative paths made absolute.

    Raises:
        InputError: an override that is not "key.path=value".
    """
    out = list(overrides)
    for path in PATHS:
        for item in overrides:
            given = OmegaConf.select(dotlist([item]), path)
            if given is not None:
                out.append(f"{path}={json.dumps(str(_absolute(str(given), folder)))}")
    return out


def _located(merged: DictConfig, written: Any, folder: Path | None) -> DictConfig:
    """Make the paths that `written` sets absolute: processes of a run work in other folders."""
    for path in PATHS:
        if _written(written, path) is None:
            continue
        value = str(OmegaConf.select(merged, path))
        if folder is None and not _expanded(value).is_absolute():
            raise InputError(
                f"{path} must be an absolute path here (the runtime changes folders), got {value!r}."
            )
        OmegaConf.update(merged, path, str(_absolute(value, folder or Path())))
    return merged


def says(source: str | Path | Mapping[str, Any] | Config, setting: str) -> bool:
    """Whether a configuration, of those that `loaded` takes, chooses a dotted setting: a file, or one that it
    extends, or a mapping says something of it; a Config says everything.

    Raises:
        InputError: as `load`.
    """
    if isinstance(source, Config):
        return True
    if isinstance(source, Mapping):
        return _written(OmegaConf.to_container(_nested(source, "configuration")), setting) is not None
    files = (content for path, content in _chain(find(source)) if path != CONFIG_DIR / "base.yaml")
    return any(_written(OmegaConf.to_container(content), setting) is not None for content in files)


def _written(written: Any, path: str) -> Any:
    """What the plain mapping of a file or command line says at a dotted path; None for nothing."""
    node = written
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _absolute(path: str, folder: Path) -> Path:
    return Path(os.path.abspath(folder / _expanded(path)))


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise InputError(f"{str(path)!r} must be a path: {error}") from error


def from_json(text: str) -> Config:
    """Rebuild a Config from `Config.to_json`, as nodes do; checked like a file."""
    return _freeze(merge(_schema(), OmegaConf.create(json.loads(text)), "message"))


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML; loading it gives an equal Config."""
    return _as_yaml(json.dumps(dataclasses.asdict(config)))  # in its own order


@functools.lru_cache(maxsize=16)
def _as_yaml(content: str) -> str:
    """What a run writes to its folder more than once; most of a small run's time is to make it."""
    return OmegaConf.to_yaml(OmegaConf.create({**json.loads(content), "extends": None}))


@functools.cache
def _schema() -> DictConfig:
    """The schema to merge with; one for all."""
    return schema_of(Config)


def find(source: str | Path, folder: Path = Path()) -> Path:
    """Return the file that a path, relative ones from `folder` on and with or without .yaml, or a name under
    configs/ means.

    Raises:
        InputError: there is none; suggests near names.
    """
    if not isinstance(source, str | Path):
        raise InputError(
            "config must be the name of a configuration, a path, settings by section or a Config, got "
            f"{type(source).__name__}."
        )
    beside = folder / _expanded(source)
    named, here = CONFIG_DIR / f"{source}.yaml", Path(f"{beside}.yaml")
    ours = here.resolve().is_relative_to(CONFIG_DIR.resolve())
    if _is_file(named) and _is_file(here) and not ours and not _is_file(beside):
        raise InputError(
            f"config must be one file, but {str(source)!r} is a configuration of fedsim's and a file here. "
            f"Write {source}.yaml for {here}, or rename it."
        )
    for path in (beside, named, here):
        if _is_file(path):
            return path
    known = sorted(str(p.relative_to(CONFIG_DIR))[:-5] for p in CONFIG_DIR.rglob("*.yaml"))
    known += sorted(p.stem for p in folder.glob("*.yaml") if not p.name.startswith("."))
    raise InputError(
        f"config must be a YAML file{f' (from {folder} on)' if folder != Path() else ''} or a name under "
        f"{CONFIG_DIR.name}/, got {str(source)!r}. " + (validate.near(str(source), known) or _known(known))
    )


def _is_file(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # too long, or with a null byte: no such file
        return path.is_file()
    return False


def _known(names: Sequence[str]) -> str:
    """The names at the top, and the folders of the others."""
    top = [name for name in names if "/" not in name]
    folders = sorted({f"{name.partition('/')[0]}/..." for name in names if "/" in name})
    return f"There are {', '.join([*top, *folders])}."


def _chain(path: Path) -> list[tuple[Path, DictConfig]]:
    """The file and those it extends with what they hold, nearest first."""
    chain: list[tuple[Path, DictConfig]] = []
    current: Path | None = path
    while current is not None:
        paths = [p for p, _ in chain]
        if current.resolve() in [p.resolve() for p in paths]:
            raise InputError(f"{path}: 'extends' must not form a circle, got {[str(p) for p in paths]}.")
        content = read(current)
        chain.append((current, content))
        parent = content._get_node("extends")
        parent = None if parent is None else parent._value()  # as written: nothing is merged yet
        current = None if parent is None else _extended(str(parent), current)
    return chain


def _extended(parent: str, file: Path) -> Path:
    try:
        return find(parent, file.parent)
    except InputError as error:
        raise InputError(f"{file}: extends: {error}") from error


def _freeze(merged: DictConfig) -> Config:
    config: Config = _in_order(to_dataclass(merged, Config))
    rules.check(config)
    return config


def _in_order(value: Any) -> Any:
    """Return settings with the keys of all options sorted: the order in which they were written must tell
    neither two processes nor training and predicting apart, such as by the order of a table's columns."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _in_order(held) for name, held in fields.items()})
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value, key=str)}
    return [_in_order(item) for item in value] if isinstance(value, list) else value
