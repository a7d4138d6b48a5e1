"""Members of tar files and where their bytes are, found by reading headers alone.

POSIX.1-1988 (ustar) with the long names and sizes of GNU tar and of POSIX.1-2001 (pax). Links, sparse files
and devices are refused: what they stand for is not in the file. So is a file without an end, or with anything
after it: what would be lost there, nobody would miss.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsim.validate import InputError

BLOCK = 512
RECORD = 20 * BLOCK
"""What writers fill the end of a tar file up to, with zeros."""

_FILES, _FOLDER, _LONG, _LONG_LINK = b"0\0", b"5", b"L", b"K"
_PAX, _PAX_ALL = b"x", b"g"


@dataclass(frozen=True)
class Member:
    """One file in a tar file: its name, and where its bytes are."""

    name: str
    start: int
    size: int


def members(descriptor: int, path: Path) -> Iterator[Member]:
    """Yield the files of an open tar file in their order.

    Raises:
        InputError: it is no whole tar file, ends before its end or goes on after it, or holds something else
            than files and folders; names it.
    """
    end, at = os.fstat(descriptor).st_size, 0
    told: dict[str, str] = {}
    while True:
        head = os.pread(descriptor, BLOCK, at)
        if not head.strip(b"\0"):
            _check_end(descriptor, path, at, end)
            return
        kind = _checked(head, path, at)
        size = _number(head[124:136], path, at)
        start = at + BLOCK
        if "size" in told and kind != _PAX:
            size = int(told["size"])
        at = start + -(-size // BLOCK) * BLOCK
        if start + size > end:
            raise InputError(
                f"{path} is cut off: {_name(head, told)!r} should have {size} bytes, and {end - start} are "
                "there. Restore the file."
            )
        if kind == _LONG:
            told["path"] = os.pread(descriptor, size, start).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == _PAX:
            told |= _pax(os.pread(descriptor, size, start), path)
        elif kind in (_PAX_ALL, _FOLDER):
            told = {} if kind == _FOLDER else told
        elif kind in (b"0", b"\0"):
            yield Member(_name(head, told), start, size)
            told = {}
        else:
            raise InputError(
                f"{path} must hold files and folders only, got {_name(head, told)!r} of type "
                f"{kind.decode('latin-1')!r} (a link, say). Pack what it stands for."
            )


def _check_end(descriptor: int, path: Path, at: int, end: int) -> None:
    """Refuse a tar file that does not end here: by two blocks of zeros, and zeros up to a whole record."""
    if end - at < 2 * BLOCK:
        raise InputError(
            f"{path} is cut off, or was never closed: a tar file ends with {2 * BLOCK} zero bytes, and it "
            f"has {end - at} at byte {at}. Restore it, or pack it anew (tar -cf)."
        )
    if end - at >= 2 * BLOCK + RECORD:
        raise InputError(
            f"{path} has its end at byte {at} of {end}, and should have less than {2 * BLOCK + RECORD} bytes "
            "from there. Its rest was overwritten or never written (as after an interrupted download), "
            "several tar files were joined (cat), or it has large records (tar -b). Restore it, or pack it "
            "anew (tar -cf)."
        )
    if os.pread(descriptor, end - at, at).strip(b"\0"):
        raise InputError(
            f"{path} has its end at byte {at} of {end}, and goes on after it: a header was overwritten, or "
            "several tar files were joined (cat). Restore it, or pack it anew (tar -cf)."
        )


def _checked(head: bytes, path: Path, at: int) -> bytes:
    """Return the type of the member whose header this is, once the checksum is right."""
    if len(head) == BLOCK:
        stated = _number(head[148:156], path, at)
        if stated == sum(head) - sum(head[148:156]) + 8 * ord(" "):
            return head[156:157]
    raise InputError(f"{path} must be a tar file, uncompressed and whole, and has no header at byte {at}.")


def _number(text: bytes, path: Path, at: int) -> int:
    if text[:1] == b"\x80":  # GNU: a number in binary
        return int.from_bytes(text[1:], "big")
    try:
        return int(text.strip(b" \0") or b"0", 8)
    except ValueError:
        raise InputError(
            f"{path} must be a tar file, uncompressed and whole, and has no number at byte {at}."
        ) from None


def _name(head: bytes, told: dict[str, str]) -> str:
    if "path" in told:
        return told["path"]
    name = head[:100].split(b"\0", 1)[0]
    prefix = head[345:500].split(b"\0", 1)[0] if head[257:262] == b"ustar" and head[262:263] == b"\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _pax(content: bytes, path: Path) -> dict[str, str]:
    """Return what a pax header says: records "LENGTH NAME=VALUE\\n"."""
    found: dict[str, str] = {}
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record, content = content[:length], content[length:]
        name, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not length or record[-1:] != b"\n" or not equals:
            raise InputError(f"{path} must be a whole tar file, and has a damaged pax header.")
        found[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
    if any(name.startswith("GNU.sparse") for name in found):
        raise InputError(f"{path} must hold whole files, and has a sparse one. Pack it without --sparse.")
    return {name: value for name, value in found.items() if name in ("path", "size")}
