"""Generated comments of configs/base.yaml: after each name that is chosen, all there are."""

from __future__ import annotations

import re

from fedsim import axes
from fedsim.validate import InputError

COLUMN = 31  # of the comments


def commented(text: str) -> str:
    """Return base.yaml with the comments beside the choices as the registries have them.

    Raises:
        InputError: a setting is not in the text, or is not where its section is.
    """
    for setting, variants in axes.described().items():
        names = " | ".join([*variants, "package.module:Object"])
        text = _replaced(text, setting, names)
    return text


def _replaced(text: str, setting: str, names: str) -> str:
    lines = text.split("\n")
    try:
        section, _, key = setting.partition(".")
        place = lines.index(next(line for line in lines if re.match(rf"{section}:(\s|$)", line)))
        if key:
            place = next(i for i in range(place + 1, len(lines)) if re.match(rf"  {key}:", lines[i]))
        if not lines[place].split("#")[0].partition(":")[2].strip():
            place += 1  # the name stands below
    except StopIteration as error:
        raise InputError(f"base.yaml must have {setting}, and has it not.") from error
    value = lines[place].split("#")[0].rstrip()
    comment = "of " if value.endswith("[]") else "or " if value.endswith("null") else ""
    lines[place] = f"{value:<{COLUMN - 1}} # {comment}{names}"
    return "\n".join(lines)
