"""A hook of mkdocs: links to files outside docs/ are shown as names, for the site lacks them.

`tests/unit/test_site.py` holds that the files are there.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with such links as their own text."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def shown(link: re.Match[str]) -> str:
        text, target = link.groups()
        inside = posixpath.normpath(posixpath.join(folder, target)).startswith("docs/")
        return link.group(0) if inside else text

    return LINK.sub(shown, markdown)
