"""What a configuration names that fedsim does not bring: `package.module:Object`.

The object is found as Python finds it, or in the current folder. Its source is part of what was run: it is in
the code hash that server and nodes compare, and goes along to the nodes of Flower's simulation unless it is
of an installed package.
"""

from __future__ import annotations

import importlib
import inspect
import os
import random
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fedsim import given, imports, unknown, validate
from fedsim.validate import InputError

ALLOWED = "FEDSIM_REFERENCES"
"""Environment variable of a node: references it may be sent, with commas between."""


_resolved: set[str] = set()


def is_reference(name: str) -> bool:
    """Whether `name` is `package.module:Object`, and no name of fedsim's own."""
    return ":" in name


def check(name: str, own: Collection[str], setting: str) -> None:
    """Raise InputError unless `name` is one of fedsim's `own` or a reference; the nearest is suggested."""
    if not is_reference(name):
        try:
            validate.one_of(name, own, setting)
        except InputError as error:
            here = unknown.choice(setting, name) or f"Or name an object of your own, {_colon(name)}."
            raise InputError(f"{error} {here}") from None


def _colon(name: str) -> str:
    """How a reference is written; of a name with dots, that one."""
    module, _, thing = name.rpartition(".")
    return f"with a colon: {module}:{thing}" if module else "as package.module:Object"


def resolve(reference: str, setting: str) -> Any:
    """Return the object that `package.module:Object` names; "Object" may be a path, as "Outer.inner".

    Raises:
        InputError: no such module or object, or one whose import fails; with the cause.
    """
    if given.is_given(reference):
        return given.get(reference, setting)
    module_name, _, path = reference.partition(":")
    if not path or not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise InputError(
            f"{setting} must be package.module:Object, got {reference!r}. Use one colon, no spaces."
        )
    found: Any = _module(module_name, setting)
    _resolved.add(reference)
    for part in path.split("."):
        if not hasattr(found, part):
            near = validate.did_you_mean(part, [name for name in dir(found) if not name.startswith("_")])
            raise InputError(f"{setting}: {module_name} has no {path!r}. {near}".rstrip())
        found = getattr(found, part)
    return found


def _module(name: str, setting: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that nothing there hides what is installed
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"{setting}: importing {name} fails: {error}. Install what it needs.") from error
        raise InputError(
            f"{setting}: there is no module {name!r} in {here} or on Python's path. "
            + (
                f"Name the module without its ending, as {name.removesuffix('.py')}:Object."
                if name.endswith(".py")
                else "Start fedsim in the folder of the file, or set PYTHONPATH to it."
            )
        ) from error
    except Exception as error:
        raise InputError(
            f"{setting}: importing {name} fails by {type(error).__name__}: {error}. Mend the module."
        ) from error


def sources(reference: str) -> dict[str, Path]:
    """Return the files that make up what a reference names, by their path from the folder they are found in.

    Of a module that stands alone its file, of a package all its Python files, and of either what it imports
    from the same folder, by the import statements of those files; of an installed package the module's own
    file, for the rest of it is not the user's.

    Raises:
        InputError: as `resolve`; or a module without a Python file, which can neither be compared nor sent.
    """
    if given.is_given(reference):  # its name has a digest of what it holds
        return {}
    name = reference.partition(":")[0]
    package, module = _module(name.partition(".")[0], "source"), _module(name, "source")
    if not installed(reference) and getattr(package, "__file__", None) is not None:
        module = package  # a folder without __init__.py has no file
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py"):
        raise InputError(f"{reference}: {module.__name__} must have a Python file, got {file or 'none'}.")
    path = Path(os.path.abspath(file))  # where Python found it: what it imports is beside the link
    if installed(reference):
        return {f"{module.__name__.replace('.', '/')}.py": path}
    package_file = path.name == "__init__.py"
    root = path.parents[module.__name__.count(".") + package_file]
    files = imports.followed(path.parent.rglob("*.py") if package_file else [path], root)
    return {file.relative_to(root).as_posix(): file for file in sorted(files)}


def installed(reference: str) -> bool:
    """Whether a reference leads into Python's library or an installed package: nodes have those."""
    if given.is_given(reference):
        return True
    file = getattr(_module(reference.partition(":")[0], "source"), "__file__", None)
    if file is None:
        return True
    kept = {Path(folder).resolve() for folder in sysconfig.get_paths().values()}
    return any(folder in Path(file).resolve().parents for folder in kept)


def check_allowed(references: Collection[str]) -> None:
    """Refuse, on a node, what whoever started it has not allowed: names that a server sends are run here.

    Raises:
        InputError: a reference that is not in $FEDSIM_REFERENCES, nor was used by this process itself.
    """
    references = [name for name in references if not given.is_given(name)]
    allowed = {name.strip() for name in os.environ.get(ALLOWED, "").split(",")} | _resolved
    if refused := [name for name in references if name not in allowed]:
        raise InputError(
            f"this node runs no code it was not told of, but is sent {', '.join(refused)}. Start nodes with "
            f"{ALLOWED}={','.join(references)}, the module on their path, as `fedsim run` does."
        )


def called(make: Callable[..., Any], options: Mapping[str, Any], known: Mapping[str, Any], where: str) -> Any:
    """Return `make(**options)`, with those of `known` added that it has parameters for.

    Raises:
        InputError: options it does not take or lacks, or what it raises itself; with its signature.
    """
    taken = fitting(make, options, known, where)
    try:
        return make(**{**taken, **options})
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{_shown(make)} fails by {type(error).__name__}: {error}. Check {where}: {dict(options)}."
        ) from error


def fitting(
    make: Callable[..., Any], options: Mapping[str, Any], known: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return those of `known` that `make` has parameters for; nothing is called.

    Raises:
        InputError: options it does not take or lacks; with its signature.
    """
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        return {}
    taken = {name: value for name, value in known.items() if name in signature.parameters}
    try:
        signature.bind(**{**taken, **options})
    except TypeError as error:
        raise InputError(
            f"{where} must fit {_shown(make)}{signature}: {error}. Give what it needs, and nothing else."
        ) from error
    return taken


def _shown(make: Callable[..., Any]) -> str:
    return getattr(make, "__qualname__", None) or type(make).__name__


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep Python's global generator as it is within the block, for imports that draw from it: rich's styles
    do, and a user's numbers must not depend on who imported it first."""
    held = random.getstate()
    try:
        yield
    finally:
        random.setstate(held)


@contextmanager
def generators(key: bytes) -> Iterator[None]:
    """Let the global generators of torch, numpy and Python start from a key within the block.

    For code that is not ours: nothing else here draws from them. Afterwards they are as before.
    """
    import torch

    held = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(key)
    np.random.seed(np.frombuffer(key, dtype=np.uint32))  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(key[:8], "little", signed=True))
            yield
    finally:
        random.setstate(held[0])
        np.random.set_state(held[1])  # noqa: NPY002
