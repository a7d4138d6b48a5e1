"""Files that tools and services read beside the code say what the project says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedsim
from fedsim.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    return tomllib.loads(text("pyproject.toml"))["project"]


def test_the_citation_is_of_this_version_under_its_licence() -> None:
    held = yaml.safe_load(text("CITATION.cff"))
    assert held["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "abstract"} <= held.keys()
    assert str(held["version"]) == fedsim.__version__ == project()["version"]
    assert held["license"] == project()["license"]
    for entry in (held, *held["references"]):
        assert entry["title"]
        assert all("name" in author or "family-names" in author for author in entry["authors"])


def test_the_changelog_begins_with_this_version_and_with_what_was_wrong() -> None:
    headings = re.findall(r"^#+ .*$", text("CHANGELOG.md"), re.M)
    assert headings[1].startswith(f"## {fedsim.__version__}")
    assert headings[2] == "### Corrected claims"


def test_hooks_before_a_commit_are_those_of_make_lint() -> None:
    (local,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert local["repo"] == "local", "nothing is fetched"
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", text("Makefile"), re.M)
    assert recipe is not None
    wanted = [
        line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in recipe[1].splitlines()
    ]
    assert [hook["entry"] for hook in local["hooks"]] == wanted
    for hook in local["hooks"]:
        assert hook["language"] == "system"
        assert hook["types"] == ["python"]


@pytest.mark.parametrize("name", ["bug", "wrong_number", "idea"])
def test_templates_of_issues_have_a_head(name: str) -> None:
    _, head, body = text(f".github/ISSUE_TEMPLATE/{name}.md").split("---\n", 2)
    held = yaml.safe_load(head)
    assert held.keys() == {"name", "about", "labels"}
    assert body.strip()


def test_every_trust_model_has_its_row_in_the_threat_model() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", text("SECURITY.md"), re.M)
    assert set(rows) == set(STRATEGIES.own())


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/mistakes.md"])
def test_the_readme_leads_there(name: str) -> None:
    assert f"]({name})" in text("README.md")


def test_what_is_depended_on_has_a_tested_version() -> None:
    pinned = {line.partition("==")[0].lower() for line in text("constraints.txt").splitlines()}
    for wanted in project()["dependencies"]:
        name = re.match(r"[\w-]+", wanted)
        assert name is not None
        assert name[0].lower() in pinned, wanted
