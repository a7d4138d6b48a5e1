"""What sources of tar files share: which files there are, and what stands beside a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedsim import validate
from fedsim.data import plain_text, rows
from fedsim.data.pictures.building import Sample
from fedsim.data.sources.image_files import AT_ONCE, ON_DEMAND
from fedsim.validate import InputError, PrivateInputError

ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")


def check(source: str, decode: str, picture: str | None, **members: str | None) -> None:
    """Refuse options that no source of tar files can have.

    Args:
        source: its name.
        decode: data.options.decode.
        picture: data.options.picture.
        members: by the name of the option: endings, or json.FIELD.

    Raises:
        InputError: says which.
    """
    if decode == AT_ONCE:
        raise InputError(
            f"data.options.decode of {source} must be {ON_DEMAND} or packed, got {AT_ONCE}. Leave it out."
        )
    for name, given in members.items():
        if given is not None and not ending(given).isalnum():
            raise InputError(
                f"data.options.{name} must be the ending of a member, such as txt, or json.FIELD, got "
                f"{given!r}."
            )
    if picture is not None:
        validate.one_of(picture.lower(), ENDINGS, "data.options.picture")


def found(root: Path, pattern: str, source: str) -> Sequence[Path]:
    """Return the tar files of a pattern below `root`, by name.

    Raises:
        InputError: there is none, or the pattern is no such thing.
    """
    try:
        shards = sorted(path for path in root.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError) as error:  # an absolute pattern, or an empty one
        raise InputError(f"{source}: {pattern!r} must be a pattern below data.root: {error}.") from error
    if not shards:
        raise InputError(
            f"{source}: expected tar files at {root}/{pattern}, got none. Set data.root, or "
            "data.options.train and test."
        )
    return shards


def pictures(picture: str | None) -> Sequence[str]:
    """Return the endings of pictures: the one that an option names, or all that are known."""
    return ENDINGS if picture is None else (picture.lower(),)


def ending(given: str) -> str:
    """Return the ending of a member from an option, which is one, or json.FIELD."""
    return given.partition(".")[0].lower()


def word(content: bytes, where: str) -> str | None:
    """Return what a member says, or its field where the option is json.FIELD; None: there is no such field
    with a word or a number."""
    text, field = plain_text.decoded(content), where.partition(".")[2]
    if not field:
        return text
    try:
        held = json.loads(text)[field]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return rows.spoken(held)


def said(shard: str, sample: Sample, where: str) -> str:
    """Return the word that a member of a sample, or a field of one, holds.

    Raises:
        PrivateInputError: there is none.
    """
    content = sample.texts.get(ending(where))
    if content is None:
        raise wrong(shard, sample, f"every key must have a member {ending(where)}", "none")
    held = word(content, where)
    if held is None:
        expected = f"the json of every key must have a field {where.partition('.')[2]}"
        raise wrong(shard, sample, expected, "none")
    return held.strip()


def owner(shard: str, sample: Sample, where: str) -> int:
    """Return the number of a sample's owner.

    Raises:
        PrivateInputError: there is none, or it is no number from 0 and below 2^32.
    """
    held = said(shard, sample, where)
    if not held.isdecimal() or int(held) >= 2**32:
        raise wrong(shard, sample, f"{where} of every key must be the number of its owner", held)
    return int(held)


def wrong(shard: str, sample: Sample, expected: str, got: str) -> PrivateInputError:
    """Return the error for a sample that is not as expected."""
    return PrivateInputError(
        f"{shard}, {sample.key}: {expected}, got {got!r}. Mend it, or leave it out.",
        f"{shard}: {expected}. Mend it, or leave it out.",
    )
