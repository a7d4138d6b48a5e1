"""What the commands' argument parsers share."""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from fedsim.cli import proposals
from fedsim.validate import did_you_mean

if TYPE_CHECKING:  # OmegaConf takes a moment to import: only where a command needs it
    from fedsim.config import Config


SETTING = re.compile(r"[A-Za-z_][\w.]*=")
"""How an override begins."""


class Parser(argparse.ArgumentParser):
    """Options of several values leave other words alone; errors end with the nearest right word, and with
    where help is."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse."""
        return super().parse_known_args(self._apart(sys.argv[1:] if args is None else args), namespace)

    def _apart(self, words: Sequence[str]) -> list[str]:
        """Put before the options what one of several values would take for its own: settings, and the first
        argument, which is no value of that option, where none stands before it."""
        before: list[str] = []
        options: list[str] = []
        many: argparse.Action | None = None
        values = 0
        for place, word in enumerate(words):
            if word == "--":
                return [*before, *options, *words[place:]]
            if word.startswith("--") or word in self._option_string_actions:
                many, values = self._of_several_values(word), 0
                options.append(word)
            elif not options or (many is not None and _leaves(many, word, values > 0 and not before)):
                before.append(word)
            else:
                values += 1
                options.append(word)
        return [*before, *options]

    def _of_several_values(self, word: str) -> argparse.Action | None:
        """The option that a word names, in full or by its beginning, where it takes any number of values."""
        named = self._option_string_actions
        found = [named[word]] if word in named else [named[flag] for flag in named if flag.startswith(word)]
        return found[0] if len(found) == 1 and found[0].nargs in ("+", "*") else None

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and end the process with exit code 2."""
        found = re.match(r"argument \S+: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        near = did_you_mean(found[1], re.findall(r"'(.*?)'", found[2])) if found else ""
        if listed := re.match(r"argument (\S+): invalid int value: '([\d, ]+)'", message):
            near = f"Put blanks between numbers: {listed[1]} {' '.join(re.findall(r'[0-9]+', listed[2]))}."
        super().error(f"{message}. {f'{near} ' if near else ''}`{self.prog} --help` says more.")


def _leaves(option: argparse.Action, word: str, may_be_first: bool) -> bool:
    """Whether a word after values of an option is none: a setting, or, where the command's first argument may
    come here, one that the option's type refuses."""
    if SETTING.match(word) or not may_be_first or not callable(option.type):
        return SETTING.match(word) is not None
    try:
        option.type(word)
    except ValueError:
        return True
    return False


def command(
    commands: Any, name: str, handler: Any, summary: str, details: str = ""
) -> argparse.ArgumentParser:
    """Add one command with its --json switch; `handler(options)` returns what --json prints."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary}. {details}".rstrip()
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON on standard output")
    parser.set_defaults(handler=handler)
    return parser


def config_arguments(
    parser: argparse.ArgumentParser,
    what: str = "YAML file, or a name under configs/ such as quickstart",
    overrides: str = "for example privacy.target_epsilon=1",
) -> None:
    """Add the configuration and its overrides; their help."""
    named = parser.add_argument("config", help=what)
    proposals.proposing(named, proposals.configurations)
    given = parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=overrides)
    proposals.proposing(given, proposals.overrides)


def load(options: argparse.Namespace) -> Config:
    """Return the checked configuration that the command line names."""
    from fedsim import loading

    return loading.load(options.config, options.overrides)


@contextmanager
def importing() -> Iterator[None]:
    """Import a command's libraries without collecting garbage.

    The collector would go through the same new objects again and again, a tenth of the time of such imports,
    to find that none can go. They stay to the end, so it is told to leave them alone from then on.
    """
    if "numpy" in sys.modules:  # what imports it has been here before
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
