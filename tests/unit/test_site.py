"""Pages of docs/: commands that are run into them, the site's order, its links out of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import executed, site_links, site_notebooks

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_commands_of_a_page_are_run_one_after_another_in_one_folder(tmp_path: Path) -> None:
    page = "Text.\n\n```console\n$ echo old > f\nstale\n$ cat f; echo $COLUMNS\n```\n\n```\n$ not run\n```\n"
    assert executed.commands(page) == ["echo old > f", "cat f; echo $COLUMNS"]
    made = executed.executed(page, tmp_path)
    assert "```console\n$ echo old > f\n\n$ cat f; echo $COLUMNS\nold\n80\n```" in made
    assert made.endswith("```\n$ not run\n```\n")
    assert executed.commands(made) == executed.commands(page)
    with pytest.raises(executed.Failed, match="ended with 3"):
        executed.executed("```console\n$ echo why; exit 3\n```\n", tmp_path)


def test_programs_of_a_page_are_this_environments(tmp_path: Path) -> None:
    assert executed.output("fedsim --version", tmp_path).startswith("fedsim ")


def test_every_page_has_its_place_on_the_site() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    placed = [page for section in nav for pages in section.values() for page in pages]
    there = [path.relative_to(ROOT / "docs").as_posix() for path in PAGES]
    assert sorted(placed) == sorted([*there, *site_notebooks.pages()])


def test_links_out_of_the_site_are_names_there_and_files_here() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api/index.md"))
    text = "[a](../../configs/base.yaml), [b](../extend.md#parts), [`c`](../../tests/README.md#d)"
    assert site_links.on_page_markdown(text, page) == "a, [b](../extend.md#parts), `c`"
    for path in PAGES:
        for _, target in site_links.LINK.findall(path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_site_asks_no_other_server_for_anything() -> None:
    held = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert held["theme"]["font"] is False
    for path in PAGES:
        assert not re.search(r"!\[[^\]]*\]\(http", path.read_text(encoding="utf-8")), path


def test_the_site_is_built_with_this_projects_hooks() -> None:
    """Another package of the environment brings a `benchmarks` too: only `python -m` looks here first."""
    recipe = (ROOT / "Makefile").read_text().partition("\ndocs:")[2].partition("\n\n")[0]
    (built,) = (line for line in recipe.splitlines() if "mkdocs build" in line)
    assert "$(BIN)/python -m mkdocs build --strict" in built
