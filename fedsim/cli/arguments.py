"""What the commands' argument parsers share."""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from fedsim.cli import proposals
from fedsim.validate import did_you_mean

if TYPE_CHECKING:  # OmegaConf takes a moment to import: only where a command needs it
    from fedsim.config import Config


class Parser(argparse.ArgumentParser):
    """Errors end with the nearest right word, and with where help is."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and end the process with exit code 2."""
        found = re.match(r"argument \S+: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        near = did_you_mean(found[1], re.findall(r"'(.*?)'", found[2])) if found else ""
        super().error(f"{message}. {f'{near} ' if near else ''}`{self.prog} --help` says more.")


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
