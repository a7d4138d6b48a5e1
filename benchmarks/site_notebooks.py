"""A hook of mkdocs: the notebooks of examples/notebooks/ are pages of the site, with what came out of them.

Pages are made when the site is built, from the outputs that the notebooks' files hold. Links to a notebook
lead to its page (`benchmarks.site_links` is to come after this hook).
"""

from __future__ import annotations

import base64
import posixpath
import re
from typing import Any

from benchmarks import notebooks

FOLDER = "notebooks"
LINK = re.compile(r"\]\(((?:\.\./)*(?:[\w.-]+/)*)([\w-]+)\.ipynb\)")


def pages() -> list[str]:
    """Return the pages' paths below docs/."""
    return [f"{FOLDER}/{name}.md" for name in notebooks.names()]


def page(name: str, notebook: notebooks.Notebook) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by their names beside the page."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = notebooks.text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../../docs/", "](../"))
            continue
        parts.append(_block("python", source))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{name}_{len(pictures) + 1}.png"
                pictures[file] = base64.b64decode(notebooks.text_of(data["image/png"]))
                parts.append(f"![what the code above draws]({file})")
            else:
                said = output.get("text", data.get("text/plain", ""))
                parts.append(_block("text", notebooks.text_of(said).rstrip("\n")))
    file = f"examples/notebooks/{name}.ipynb"
    parts.append(f"This page is the notebook `{file}`, with the outputs of its last run.")
    return "\n\n".join(parts) + "\n", pictures


def _block(language: str, content: str) -> str:
    return f"```{language}\n{content}\n```"


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages and their pictures."""
    from mkdocs.structure.files import File

    for name, path in zip(notebooks.names(), pages(), strict=True):
        made, pictures = page(name, notebooks.read(name))
        files.append(File.generated(config, path, content=made))
        for file, content in pictures.items():
            files.append(File.generated(config, f"{FOLDER}/{file}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with links to notebooks as links to their pages."""
    here = posixpath.dirname(page.file.src_uri)

    def shown(link: re.Match[str]) -> str:
        return f"]({posixpath.relpath(f'{FOLDER}/{link.group(2)}.md', here or '.')})"

    return LINK.sub(shown, markdown)
