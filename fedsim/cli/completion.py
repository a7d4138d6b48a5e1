"""`completion`: the shell completes commands, options, configurations, settings and values.

It asks this program at every tab, through argcomplete; `eval "$(fedsim completion bash)"` turns it on.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from fedsim.cli.arguments import command
from fedsim.validate import InputError

SHELLS = ("bash", "zsh", "fish")
ASKED = "_ARGCOMPLETE"
"""Environment variable by which the shell says that it asks for proposals."""


def add(commands: Any) -> None:
    """Register the command."""
    parser = command(
        commands,
        "completion",
        _completion,
        "a script that lets the shell complete commands, configurations and settings",
        'For bash and zsh: eval "$(fedsim completion bash)" in ~/.bashrc or ~/.zshrc. For fish: fedsim '
        "completion fish > ~/.config/fish/completions/fedsim.fish.",
    )
    parser.add_argument("shell", choices=SHELLS)


def _completion(options: argparse.Namespace) -> dict[str, str]:
    script: str = _argcomplete().shellcode(["fedsim"], shell=options.shell)
    if not options.json:
        print(script)
    return {"shell": options.shell, "script": script}


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process, where it asks (`ASKED`); else do nothing."""
    if ASKED in os.environ:
        _argcomplete().autocomplete(parser, always_complete_options=False)


def _argcomplete() -> Any:
    try:
        import argcomplete
    except ImportError as error:
        raise InputError(
            "completion needs argcomplete, and it is not installed. pip install argcomplete."
        ) from error
    return argcomplete
