"""Merging what files and command lines say into a typed schema, by OmegaConf.

A choice (`Choice`) is written `{name, options}`, or by its name alone, which means its default options. Who
names another variant than the one before starts from that variant's defaults: the options of the other one
mean nothing to it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from fedsim import rules, unknown
from fedsim.validate import InputError


@dataclass(frozen=True)
class Choice:
    """One variant of an axis: registered, package.module:Object, or an entry point; with its options."""

    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@functools.cache
def choices(schema: type[Any]) -> tuple[str, ...]:
    """Return the dotted names of what is chosen in a schema: its parts that have a name and options."""
    return tuple(_choices(schema, ""))


def _choices(schema: type[Any], prefix: str) -> Iterator[str]:
    # Of the defaults a field at a time: options as a whole may be refused as long as nothing is chosen.
    for entry in dataclasses.fields(schema):
        made = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        if "Choice" in str(entry.type):
            yield prefix + entry.name
        elif dataclasses.is_dataclass(kind := type(made)):
            if {"name", "options"} <= {part.name for part in dataclasses.fields(kind)}:
                yield prefix + entry.name
            yield from _choices(kind, f"{prefix}{entry.name}.")


def schema_of(kind: type[Any]) -> DictConfig:
    """Return a schema to merge with, which merging leaves as it is."""
    return _thaw(OmegaConf.structured(kind))


def parse_options(
    options: dict[str, Any],
    schema: type[Any],
    where: str,
    setting: str = "",
    given: Mapping[str, Any] | None = None,
) -> Any:
    """Return `schema(**options, **given)` for a frozen dataclass of options, with typed conversion.

    Args:
        options: as written.
        schema: the dataclass.
        where: what holds the options, for messages.
        setting: their dotted name, where `where` is another.
        given: values, as they are, of fields that are no options.

    Raises:
        InputError: unknown option (with the nearest valid one), wrong type, or one that nothing reads.
    """
    given = given or {}
    typed = _options_of(schema, tuple(given))  # type: ignore[arg-type]
    if options:
        typed = merge(typed, OmegaConf.create(options), where)
    parsed = to_dataclass(typed, schema, given)
    rules.refuse_unread(parsed, setting or where)
    return parsed


@functools.lru_cache(maxsize=256)
def _options_of(schema: type[Any], without: tuple[str, ...]) -> DictConfig:
    """The schema of a dataclass of options, without some of its fields; one for all, as merging leaves it."""
    typed = schema_of(schema)
    OmegaConf.set_struct(typed, False)  # or nothing could be taken out
    for name in without:
        del typed[name]
    OmegaConf.set_struct(typed, None)
    return typed


def _thaw(node: DictConfig) -> DictConfig:
    OmegaConf.set_readonly(node, False)
    for key in node:
        if OmegaConf.is_config(child := node._get_node(key)) and isinstance(child, DictConfig):
            _thaw(child)
    return node


def read(path: Path) -> DictConfig:
    """Return the mapping that a YAML file holds, to be merged and never changed: it is one for all.

    Raises:
        InputError: the file holds none.
    """
    try:
        loaded = _parsed(text := path.read_text(encoding="utf-8"))
    except Exception as error:
        raise InputError(
            f"{path} must be a readable YAML file of settings by name, but: {_yaml_problem(error)}. Mend "
            "that line: sections are indented by blanks, and every key stands once."
        ) from error
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{path} must hold settings by name, such as title: mine, got a list.")
    _refuse_other_bases(text, str(path))
    return loaded


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> DictConfig | ListConfig:
    """What YAML text holds; parsing takes longer than all the rest of loading."""
    return OmegaConf.load(io.StringIO(text))


_OTHER_BASE = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


@functools.lru_cache(maxsize=1024)
def _refuse_other_bases(text: str, where: str) -> None:
    """Refuse numbers that YAML 1.1 reads as nobody means them: 0100 as 64, 1:40 as 100.

    Raises:
        InputError: one that is not in quotes.
    """
    if re.search(r"\b0[0-9_]|[0-9]:[0-9]", text) is None:  # to scan takes as long as to parse
        return
    with contextlib.suppress(yaml.YAMLError):  # what is no YAML is refused elsewhere
        for token in yaml.scan(text):
            if isinstance(token, yaml.ScalarToken) and token.plain and _OTHER_BASE.fullmatch(token.value):
                raise InputError(
                    f"{where}: {token.value} must be a decimal number, and YAML reads it to another base. "
                    "Write it without leading zeros and colons, or in quotes if it is a word."
                )


def dotlist(overrides: Sequence[str]) -> DictConfig:
    """Return "key.path=value" strings as a mapping.

    Raises:
        InputError: one that is none, or not a YAML value.
    """
    for item in overrides:
        if not re.match(r"^[A-Za-z_][\w.]*=", item):
            raise InputError(
                f"override must look like key.path=value, got {item!r}. Leave no blanks around =, and quote "
                "what has blanks."
            )
        if item.startswith("extends="):
            raise InputError(f"extends must stand in a configuration file, got the override {item!r}.")
        _refuse_other_bases(item.partition("=")[2], f"override {item!r}")
    tree: dict[str, Any] = {}
    try:
        for item in _in_order(overrides):
            path, _, text = item.partition("=")
            _put(tree, path.split("."), copy.deepcopy(_value(text)))
        return OmegaConf.create(tree)
    except Exception as error:
        raise InputError(
            f"override must have a YAML value, got {_unreadable(overrides)!r}: {_yaml_problem(error)}. Close "
            "its brackets and quotes."
        ) from error


@functools.lru_cache(maxsize=1024)
def _value(text: str) -> Any:
    """What stands behind the = of an override, as OmegaConf reads it: a class of readers a time."""
    held: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    return held["value"]


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set what stands at a path; a mapping is merged into one that is there."""
    *sections, last = path
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    if isinstance(value, dict) and isinstance(tree.get(last), dict):
        for key, inner in value.items():
            _put(tree[last], [key], inner)
    else:
        tree[last] = value


def _unreadable(overrides: Sequence[str]) -> str:
    """The first override that has no YAML value."""
    for item in overrides:
        try:
            OmegaConf.from_dotlist([item])
        except Exception:
            return item
    return " ".join(overrides)


def _yaml_problem(error: Exception) -> str:
    """What a reader of YAML stumbled over, in one line, and the line it was in."""
    said = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    return said if mark is None or not mark.line else f"{said}, in line {mark.line + 1}"


def _in_order(overrides: Sequence[str]) -> list[str]:
    """Write names of choices in full where their options are set too, which would replace a short name; and
    leave out the options of a variant that a later override names another one in place of."""
    keys = [item.partition("=")[0] for item in overrides]
    named: dict[str, str] = {}
    out: list[str] = []
    for key, item in zip(keys, overrides, strict=True):
        path, value = key.removesuffix(".name"), item.partition("=")[2].strip()
        inner = any(other == f"{path}.name" or other.startswith(f"{path}.options") for other in keys)
        if inner and _is_name(value):
            if named.setdefault(path, value) != value:
                out = [held for held in out if not held.startswith(f"{path}.options")]
            named[path] = value
            item = f"{path}.name={value}"
        out.append(item)
    return out


def _is_name(value: str) -> bool:
    return value not in ("", "null", "~") and not value.startswith("{")


def merge(base: DictConfig, update: DictConfig, where: str) -> DictConfig:
    """Return `base` with what `update` says; both stay as they are.

    Args:
        where: what holds the update, for messages.

    Raises:
        InputError: an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    base, update = _chosen(base, update)
    for key in _leaves(update):
        if not _known(base, key):
            valid = sorted(_leaves(base, keep_sections=True))
            if kind := unknown.another_kind(list(update), list(base)):
                raise InputError(f"{where} is {kind}: its key '{key}' means nothing here.")
            raise InputError(f"{where}: unknown key '{key}'. {unknown.remedy(key, valid)}".rstrip())
    try:
        with read_write(base):
            base.merge_with(update)
        OmegaConf.resolve(base)
    except OmegaConfBaseException as error:
        raise InputError(f"{where}: {_misfit(error, base, update)}") from error
    return base


_WANTED = {
    "int": "a whole number, such as 100",
    "float": "a number, with a point, such as 0.5",
    "bool": "true or false",
    "str": "one word or text",
}


def _misfit(error: OmegaConfBaseException, base: DictConfig, update: DictConfig) -> str:
    """Say what a setting must be, and what came: OmegaConf's own words are about its types."""
    said = str(error).splitlines()[0]
    key = str(getattr(error, "full_key", None) or "") or _replaced_section(base, update)
    if not key:
        return f"{said}."
    node, value = _node(base, key), _node(update, key)
    came = OmegaConf.to_container(value) if OmegaConf.is_config(value) else getattr(value, "_value", str)()
    if isinstance(node, DictConfig):
        inner = next(iter(node), "name")
        return f"'{key}' must hold settings by name, such as {{{inner!s}: ...}}, got {came!r}."
    if isinstance(node, ListConfig):
        return f"'{key}' must be a list, such as [a, b], got {came!r}."
    kind = getattr(getattr(node, "_metadata", None), "ref_type", None)
    wanted = _WANTED.get(getattr(kind, "__name__", ""))
    return f"'{key}': {said}." if wanted is None else f"'{key}' must be {wanted}, got {came!r}."


def _replaced_section(base: DictConfig, update: DictConfig) -> str:
    """The first key under which `update` has something else than settings, and `base` a section."""
    for key in map(str, update):
        if isinstance(_node(base, key), DictConfig) and not isinstance(_node(update, key), DictConfig):
            return key
    return ""


def _chosen(base: DictConfig, update: DictConfig) -> tuple[DictConfig, DictConfig]:
    """Write every choice that `update` makes as name and options, and clear those of another in `base`, which
    is a copy in any case."""
    schema = OmegaConf.get_type(base)
    made = [
        path
        for path in (choices(schema) if dataclasses.is_dataclass(schema) else ())
        if _node(update, path) is not None and not _node(update, path)._is_none()
    ]
    base = copy.deepcopy(base)
    if made:
        update = copy.deepcopy(update)
    for path in made:
        given, held = _node(update, path), _node(base, path)
        short = not isinstance(given, DictConfig)
        name = given if short else given._get_node("name")
        name = None if name is None else name._value()
        if short:
            OmegaConf.update(update, path, {"name": name, "options": {}}, merge=False)
        if held is None or held._is_none():
            OmegaConf.update(base, path, schema_of(Choice), merge=False)
        elif short or name not in (None, held.name):
            OmegaConf.update(base, f"{path}.options", {}, merge=False)
    return base, update


def _node(tree: DictConfig, path: str) -> Any:
    """What stands at a dotted path, as it is; None where there is nothing."""
    node: Any = tree
    for part in path.split("."):
        node = node._get_node(part) if isinstance(node, DictConfig) and not node._is_none() else None
    return node


def _known(base: DictConfig, key: str) -> bool:
    node: Any = base
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return False
        if OmegaConf.get_type(node) is dict:  # a free mapping takes any key
            return True
        if part not in node:
            return False
        node = node._get_node(part)
    return True


def _leaves(node: DictConfig, prefix: str = "", keep_sections: bool = False) -> list[str]:
    out: list[str] = []
    for key in node:
        child = node._get_node(key)
        name = prefix + str(key)
        if isinstance(child, DictConfig) and not child._is_none() and len(child):
            out += [name] if keep_sections else []
            out += _leaves(child, f"{name}.", keep_sections)
        else:
            out.append(name)
    return out


def to_dataclass(node: Any, schema: type[Any], given: Mapping[str, Any] | None = None) -> Any:
    """Return what is merged into the schema of a dataclass as an instance of it, with the fields `given`."""
    values: dict[str, Any] = dict(given or {})
    for entry in dataclasses.fields(schema):
        if entry.name in values:
            continue
        value = node[entry.name]
        kind = OmegaConf.get_type(value) if OmegaConf.is_config(value) else None
        if dataclasses.is_dataclass(kind):
            values[entry.name] = to_dataclass(value, kind)
        elif OmegaConf.is_config(value):
            values[entry.name] = OmegaConf.to_container(value)
        else:
            values[entry.name] = value
    return schema(**values)
