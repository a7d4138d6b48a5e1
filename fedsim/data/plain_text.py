"""Text as it lies in files: UTF-8, or what a byte order mark in front says."""

from __future__ import annotations

import codecs

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # starts as that of UTF-16 does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LONGEST = max(len(mark) for mark, _ in MARKS)


def encoding_of(start: bytes) -> str:
    """Return the encoding of a text by its first bytes, `LONGEST` of them or all; the mark is no text."""
    return next((encoding for mark, encoding in MARKS if start.startswith(mark)), "utf-8")


def decoded(content: bytes) -> str:
    """Return the text of a file's bytes; what is none becomes U+FFFD."""
    return content.decode(encoding_of(content), "replace")
