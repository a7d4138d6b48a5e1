"""The `fedsim` command.

Exit codes: 0 done; 1 `results --check` found files out of date; 2 bad input, nothing was started; 3 the run
stopped with a cause and can be resumed; 130 interrupted (resumable too).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from fedsim import __version__, unknown
from fedsim.cli import (
    completion,
    extraction,
    many,
    models,
    planning,
    privacy,
    probing,
    results,
    training,
    tuning,
)
from fedsim.cli.arguments import SETTING, Parser
from fedsim.report.plain import as_json
from fedsim.validate import FedsimError, InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # names from outside may be beyond what a terminal can show
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    top = parser()
    completion.complete(top)
    options = _parse(top, arguments)
    try:
        answer = options.handler(options)
        if options.json:
            print(as_json(answer, indent=2), flush=True)
        return 0
    except FedsimError as error:
        print(f"fedsim: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read the answer has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError) as error:  # a run turns these into RunError
        print(f"fedsim: {str(error) or type(error).__name__}. Nothing was started.", file=sys.stderr)
        return InputError.exit_code
    except KeyboardInterrupt:
        goes_on = getattr(options, "goes_on", "--resume and the same --out")
        print(f"fedsim: interrupted; continue with {goes_on}.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = Parser(
        prog="fedsim",
        description="Differentially private training on data that stays with its holders, by simulation.",
    )
    top.add_argument("--version", action="version", version=f"fedsim {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (
        training,
        many,
        tuning,
        planning,
        extraction,
        privacy,
        models,
        probing,
        results,
        completion,
    ):
        group.add(commands)
    return top


def _without_dashes(rest: Sequence[str], options: argparse.Namespace) -> str:
    """How to write a setting that was given like an option."""
    name, _, value = rest[0].lstrip("-").partition("=")
    if not (rest[0].startswith("--") and hasattr(options, "overrides")):
        return ""
    value = value or (rest[1] if len(rest) > 1 and not rest[1].startswith("-") else "VALUE")
    name = name.replace("-", "_")
    return f"Settings have no dashes: {unknown.ELSEWHERE.get(name, name)}={value}"


def _parse(top: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may also stand after options, where argparse alone would not look for them."""
    options, rest = top.parse_known_args(arguments)
    rest = [item for item in rest if item != "--"]
    if rest and not (hasattr(options, "overrides") and all(SETTING.match(item) for item in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}. {_without_dashes(rest, options)}".rstrip(" ."))
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options
