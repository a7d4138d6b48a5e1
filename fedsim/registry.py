"""One axis of a configuration: what can be chosen there, from inside or outside.

A variant is a frozen dataclass: its fields are its options, but for those that settings of their own give
(`Registry.given`), and its methods do the work. Those that fedsim brings stand one or a few a file in the
axis's own package, each under `@AXIS.register("name")`; a new file is found without being listed anywhere.
From outside come `package.module:Object`, and what an installed package offers as an entry point of the group
"fedsim.AXIS".
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fedsim import given, references
from fedsim.validate import InputError

if TYPE_CHECKING:
    from fedsim.merging import Choice

T = TypeVar("T")
Class = TypeVar("Class", bound=type[Any])


class Registry(Generic[T]):
    """The variants of one axis.

    Args:
        setting: where a configuration chooses, such as "data.name" or "federation.partition".
        package: whose modules register the variants; imported when the first one is asked for.
        base: class that every variant derives from.
        adapt: makes a `base` of what an object from outside gave, where that is something simpler.
        function: makes a `base` of a function from outside, where one is a variant itself, or is made by what
            is named and called with the options.
        given: fields of the variants that are no options, because settings of their own say them; `make` is
            told them by name.
    """

    def __init__(
        self,
        setting: str,
        package: str,
        base: type[Any],
        adapt: Callable[[Any], T | None] | None = None,
        function: Callable[[Callable[..., Any]], T] | None = None,
        given: tuple[str, ...] = (),
    ) -> None:
        self.setting = setting
        self.axis = package.rpartition(".")[2]
        self.base = base
        self._package = package
        self._adapt = adapt
        self._function = function
        self.given = given
        self._own: dict[str, type[Any]] = {}
        self._complete = False

    @property
    def options(self) -> str:
        """Where a configuration gives the options."""
        return f"{self.setting.removesuffix('.name')}.options"

    def register(self, name: str) -> Callable[[Class], Class]:
        """Register the decorated class under `name`; its docstring's first line describes it in lists."""

        def put(variant: Class) -> Class:
            assert name not in self._own, f"{self.setting} {name} is registered twice"
            self._own[name] = variant
            return variant

        return put

    def own(self) -> Mapping[str, type[Any]]:
        """Return fedsim's own variants by name, in the order of their files."""
        if not self._complete:
            package = importlib.import_module(self._package)
            for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
                importlib.import_module(f"{self._package}.{module}")
            # A module may have been imported before for itself: the order is that of the files all the same.
            self._own = dict(sorted(self._own.items(), key=lambda item: item[1].__module__))
            self._complete = True
        return self._own

    def _by_file(self, name: str) -> type[Any] | None:
        """Return fedsim's own variant of a name if it is imported, or if a file of that name registers it.

        The other variants, and what they need, need not be imported then.
        """
        if name not in self._own and name.isidentifier():
            package = importlib.import_module(self._package)
            if any(module.name == name for module in pkgutil.iter_modules(package.__path__)):
                importlib.import_module(f"{self._package}.{name}")
        return self._own.get(name)

    def names(self) -> list[str]:
        """Return the names that can be chosen: fedsim's own, and those of installed packages."""
        return [*self.own(), *sorted(entry_points(self.axis))]

    def find(self, name: str) -> Any:
        """Return the class, or other callable, that a name means.

        Raises:
            InputError: there is none; suggests the nearest name.
        """
        if (variant := self._by_file(name) or self.own().get(name)) is not None:
            return variant
        if name in (offered := entry_points(self.axis)):
            return references.resolve(offered[name], self.setting)
        self._refuse_method(name)
        references.check(name, self.names(), self.setting)
        return references.resolve(name, self.setting)

    def _refuse_method(self, name: str) -> None:
        """Of a preset, which chooses on several axes, say how it is chosen."""
        from fedsim import presets  # imports omegaconf: only where a name is unknown
        from fedsim.config import CONFIG_DIR

        if self.setting.removesuffix(".name") in presets.AXES and name in presets.names(CONFIG_DIR):
            raise InputError(
                f"{self.setting} must be one of {', '.join(self.names())}, got {name!r}, which is a method, "
                f"with a choice on every axis: write preset={name}."
            )

    def make(self, choice: Choice, **known: Any) -> T:
        """Return the variant that is chosen, with its options.

        Args:
            choice: name and options.
            known: what an object from outside is given beside its options where it has parameters of these
                names, and a dataclass where it has fields of those in `given`.

        Raises:
            InputError: no such variant, an option it does not take or of a wrong type, what it raises itself
                for a wrong value, or an object that makes something else.
        """
        from fedsim.merging import parse_options  # imports omegaconf: only where something is chosen

        found = self.find(choice.name)
        if said := [name for name in self.given if name in choice.options]:
            raise InputError(f"{self.options} must leave out {said[0]}, which a setting of its own says.")
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            _refuse_undecorated(found, choice.name)
            where, fields = f"{self.options} of {choice.name}", options_of(found)
            told = {name: known[name] for name in self.given if name in fields}
            made = parse_options(choice.options, found, where, self.options, told)
        elif isinstance(found, self.base):  # an instance in a module: its options are set
            made = found
            if choice.options:
                raise InputError(f"{self.options} must be empty for {choice.name}, got {choice.options}.")
        elif self._function is not None and _lacks_more(found, choice.options):  # a variant itself
            made = functools.partial(found, **choice.options)
        else:
            simpler = self._adapt is not None or self._function is not None
            if not callable(found) or (not simpler and _is_other(found, self.base)):
                kind = found if isinstance(found, type) else type(found)
                raise InputError(
                    f"{self.setting} must name a {self.base.__module__}.{self.base.__name__} or what makes "
                    f"one, but {_called(choice.name)} is {'the class' if kind is found else 'an object of'} "
                    f"{kind.__module__}.{kind.__name__}. Derive it from that one (docs/extend.md), or choose "
                    "by name: `fedsim list`."
                )
            made = references.called(found, choice.options, known, self.options)
        if not isinstance(made, self.base) and self._adapt is not None:
            made = self._adapt(made) or made
        if not isinstance(made, self.base) and self._function is not None and callable(made):
            made = self._function(made)
        if not isinstance(made, self.base):
            raise InputError(
                f"{self.setting} must name a {self.base.__module__}.{self.base.__name__} or what makes one, "
                f"but {_called(choice.name)} gives {type(made).__name__}. Derive its class from that one "
                "(docs/extend.md), or choose by name: `fedsim list`."
            )
        return made

    def described(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return, by name, the first line of a variant's docstring and its options with their defaults."""
        return {
            name: (
                first_line(variant),
                {o: default for o, default in options_of(variant).items() if o not in self.given},
            )
            for name, variant in self.own().items()
        }


@functools.cache
def entry_points(axis: str) -> dict[str, str]:
    """Return what installed packages offer for an axis, as references by name."""
    return {point.name: point.value for point in metadata.entry_points(group=f"fedsim.{axis}")}


def options_of(variant: type[Any]) -> dict[str, Any]:
    """Return a variant's options with their defaults, "needed" where there is none."""
    out: dict[str, Any] = {}
    for entry in dataclasses.fields(variant):
        if entry.default is not dataclasses.MISSING:
            out[entry.name] = entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            out[entry.name] = entry.default_factory()
        else:
            out[entry.name] = "needed"
    return out


def first_line(thing: Any) -> str:
    """Return the first line of what documents an object: its own docstring, else its module's."""
    said = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    return inspect.cleandoc(said or sys.modules[thing.__module__].__doc__ or "").partition("\n")[0]


def _is_other(found: Any, base: type[Any]) -> bool:
    """Whether something is a class whose instances are none of `base`."""
    return isinstance(found, type) and not issubclass(found, base) and "__new__" not in vars(found)


def _refuse_undecorated(found: type[Any], name: str) -> None:
    """Refuse a class whose annotations are no fields, because it derives from a dataclass and is none."""
    annotated = vars(found).get("__annotations__", {})
    own = [key for key, said in annotated.items() if "ClassVar" not in str(said)]
    if own and "__dataclass_fields__" not in vars(found):
        raise InputError(
            f"{_called(name)} must be decorated with @dataclass(frozen=True), or {', '.join(own)} would be "
            "no options of it."
        )


def _called(name: str) -> str:
    """What a message calls an object: by its name, which of one handed in from Python is a digest."""
    return "the object handed in" if given.is_given(name) else name


def _lacks_more(function: Any, options: Mapping[str, Any]) -> bool:
    """Whether a function takes the options and still needs arguments: it is called later, with those."""
    if isinstance(function, type) or not callable(function):
        return False
    try:
        signature = inspect.signature(function)
        signature.bind_partial(**options)
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(**options)
    except TypeError:
        return True
    return False


def check_choice(choice: Any, setting: str) -> Choice:
    """Return an entry of a list of choices, a name or {name, options}, as one.

    Raises:
        InputError: it is neither.
    """
    from fedsim.merging import Choice

    if isinstance(choice, str):
        return Choice(choice)
    if (
        isinstance(choice, dict)
        and isinstance(choice.get("name"), str)
        and set(choice) <= {"name", "options"}
    ):
        return Choice(choice["name"], dict(choice.get("options") or {}))
    raise InputError(f"{setting} must list names or {{name, options}}, got {choice!r}.")
