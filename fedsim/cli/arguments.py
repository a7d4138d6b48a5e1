"""What the commands' argument parsers share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # OmegaConf takes a moment to import: only where a command needs it
    from fedsim.config import Config


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


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the configuration and its overrides."""
    parser.add_argument("config", help="YAML file, or a name under configs/ such as quickstart")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example privacy.target_epsilon=1"
    )


def load(options: argparse.Namespace) -> Config:
    """Return the checked configuration that the command line names."""
    from fedsim import config as configs

    return configs.load(options.config, options.overrides)
