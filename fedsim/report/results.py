"""Recipes' results as tables: what was claimed, what was reached, and what produced it.

Reads every results/**/*.json whose "kind" is "recipe" (by `fedsim repeat`; fields: fedsim.study.repeat).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.headline import Metric
from fedsim.report.claim import NONE, number
from fedsim.report.held import loaded
from fedsim.report.markers import Parts, machine, provenance, table
from fedsim.report.significance import of_scores
from fedsim.validate import InputError

README, PAGE = "README.md", "docs/results.md"
COMMAND = "fedsim repeat CONFIG --seeds 0 1 2 --results results/NAME.json"
UNTITLED = "Other recipes"
_NEEDED = (
    "config",
    "overrides",
    "reference",
    "evaluated_on",
    "data",
    "holders",
    "partition",
    "steps",
    "target_epsilon",
    "epsilon",
    "delta",
    "seeds",
    "headline",
    "scores",
    "mean",
    "minutes",
    "command",
    "commit",
    "hardware",
    "backend",
)
_KINDS = {
    **dict.fromkeys(("reference", "data", "epsilon", "headline", "hardware"), dict),
    **dict.fromkeys(("overrides", "seeds", "scores"), list),
}


@dataclass(frozen=True)
class Claim:
    """An accuracy (%) that somebody published for a budget; None where it is not known.

    Attributes:
        accountant: what the budget was accounted with: one epsilon is more noise by a looser one.
        status, accountant_status: how far the numbers, and the accountant, are confirmed.
    """

    accuracy: float | None
    epsilon: float | None
    source: str
    status: str
    accountant: str
    accountant_status: str


def read(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (path relative to `folder`, content) of all recipe results under it, sorted by path.

    Raises:
        InputError: a file is not JSON, or a recipe result lacks a field.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        held = loaded(path)
        if isinstance(held, dict) and held.get("kind") == "recipe":
            lacking = [key for key in _NEEDED if key not in held]
            if lacking:
                raise InputError(f"{path}: a recipe result must hold {', '.join(lacking)}. Make it again.")
            for key, kind in _KINDS.items():
                if not isinstance(held[key], kind):
                    raise InputError(
                        f"{path}: {key} of a recipe result must be a {kind.__name__}, got {held[key]!r}. "
                        "Make it again."
                    )
            try:
                Metric.of(held)
            except TypeError as error:
                raise InputError(
                    f"{path}: headline of a recipe result must hold name, unit and higher_is_better. Make "
                    "it again."
                ) from error
            if len(held["seeds"]) != len(held["scores"]) or not held["scores"]:
                raise InputError(f"{path}: a recipe result must hold a score for each seed. Make it again.")
            found.append((name, held))
    return found


def parts(root: Path) -> dict[str, Parts]:
    """Return the generated parts by file, for `markers.update`."""
    held = [result for _, result in read(root / "results")]
    return {
        README: {"recipe-results": lambda: summary(held)},
        PAGE: {"recipe-results": lambda: page(held)},
    }


def claims(reference: dict[str, Any]) -> list[Claim]:
    """Return what `reference` claims: its own accuracy and epsilon, and each entry of its `claims`."""
    given = [reference] if reference.get("accuracy") is not None else []
    return [
        Claim(
            accuracy=entry.get("accuracy"),
            epsilon=entry.get("epsilon"),
            source=str(entry.get("source") or reference.get("paper") or ""),
            status=(status := str(entry.get("accuracy_status") or entry.get("status") or "unknown")),
            accountant=str(entry.get("accountant") or "unknown accountant"),
            accountant_status=str(entry.get("accountant_status") or status),
        )
        for entry in [*given, *reference.get("claims", [])]
    ]


def claim_for(held: dict[str, Any]) -> Claim | None:
    """Return the best claim at the budget of a result, or None."""
    budget = held["target_epsilon"]
    if budget is None:
        spent = held["epsilon"].get("example", {}).get("value")
        budget = spent if isinstance(spent, float) else math.nan
    near = [
        claim
        for claim in claims(held["reference"])
        if claim.accuracy is not None and claim.epsilon and abs(claim.epsilon / budget - 1.0) <= 0.11
    ]
    return max(near, key=lambda claim: claim.accuracy or 0.0, default=None)


def summary(held: Sequence[dict[str, Any]]) -> str:
    """Return the short table: test-set results only."""
    rows = [
        [
            f"`{_recipe(one)}`",
            _data(one),
            _value(one, "example"),
            _claimed(one),
            _reached(one),
            str(len(one["seeds"])),
            f"{one['minutes']:.1f}",
            machine(one["hardware"]),
        ]
        for one in held
        if one["evaluated_on"] == "test set"
    ]
    if not rows:
        return _nothing()
    head = [
        "recipe",
        "data",
        "epsilon per example",
        "published",
        "reached",
        "seeds",
        "minutes",
        "machine",
    ]
    return table(head, rows)


def page(held: Sequence[dict[str, Any]]) -> str:
    """Return all results, a section a paper, each with the command that gives it again."""
    if not held:
        return _nothing()
    papers: dict[str, list[dict[str, Any]]] = {}
    for one in held:
        papers.setdefault(str(one["reference"].get("paper") or UNTITLED), []).append(one)
    return "\n".join(_section(paper, papers[paper]) for paper in sorted(papers))


def _section(paper: str, held: Sequence[dict[str, Any]]) -> str:
    head = [
        "recipe",
        "data",
        "published",
        "reached",
        "each seed",
        "epsilon per example",
        "epsilon per holder",
        "delta",
        "steps",
        "holders",
        "backend",
        "minutes",
    ]
    rows = [
        [
            f"`{_recipe(one)}`",
            _data(one) + ("" if one["evaluated_on"] == "test set" else f" ({one['evaluated_on']})"),
            _claimed(one),
            _reached(one),
            ", ".join(
                f"{seed}: {Metric.of(one).number(score)}"
                for seed, score in zip(one["seeds"], one["scores"], strict=True)
            ),
            _value(one, "example"),
            _value(one, "holder"),
            f"{one['delta']:g}",
            str(one["steps"]),
            f"{one['holders']}, {one['partition']}",
            one["backend"],
            f"{one['minutes']:.1f}",
        ]
        for one in held
    ]
    text = f"### {paper}\n\n{table(head, rows)}"
    notes = dict.fromkeys(note for one in held if (note := one["reference"].get("note")))
    text += "".join(f"\n{note}\n" for note in notes)
    tuned = [(_recipe(one), how) for one in held if (how := one.get("tuning"))]
    text += "".join(f"\n`{recipe}`, tuned: {how}.\n" for recipe, how in tuned)
    return text + "".join(provenance(one) for one in held)


def _recipe(held: dict[str, Any]) -> str:
    """The configuration and what was changed of it, speed and logging left out."""
    changed = [
        o for o in held["overrides"] if not o.startswith(("engine.", "monitor.", "title=", "data.root="))
    ]
    return " ".join([held["config"].removesuffix(".yaml"), *changed])


def _data(held: dict[str, Any]) -> str:
    """The source; of one that reads files, such as a table, the file too."""
    name, options = held["data"]["name"], held["data"].get("options") or {}
    return f"{name} ({options['train']})" if "train" in options else str(name)


def _reached(held: dict[str, Any]) -> str:
    """Mean, half its 95 % interval, unit and name of the metric."""
    headline = Metric.of(held)
    return of_scores(held["scores"], headline, headline.name)


def _claimed(held: dict[str, Any]) -> str:
    claim = claim_for(held)
    if claim is None:
        return "-"
    by = f"{claim.accuracy:g} at {claim.epsilon:g} by {claim.accountant}"
    doubt = "" if claim.accountant_status == claim.status else f"; accountant {claim.accountant_status}"
    return f"{by} ({claim.source}, {claim.status}{doubt})"


def _value(held: dict[str, Any], unit: str) -> str:
    spent = held["epsilon"].get(unit)
    if spent is None:  # a run without any has none of this unit either; of others it was not asked for
        any_claim = any(number(other["value"]) != NONE for other in held["epsilon"].values())
        return "-" if any_claim else NONE
    value, checked = number(spent["value"]), held["epsilon"].get(f"{unit}_check")
    if value == NONE:
        return value
    by = f"{value} by {spent['accountant']}"
    if checked is None or checked["accountant"] == spent["accountant"]:
        return by
    return f"{by} ({number(checked['value'])} by {checked['accountant']})"


def _nothing() -> str:
    return f"Nothing measured yet. Run `{COMMAND}`, then `fedsim results`.\n"
