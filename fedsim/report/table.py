"""A comparison as rows of text."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from fedsim.report import claim
from fedsim.report.cells import Cell, Group, between, groups, pairwise
from fedsim.report.significance import Difference

RESULTS = ("variant", "epsilon per example", "epsilon per holder", "score", "against the row above")
COSTS = ("variant", "bytes per holder and step", "messages per step", "survivors needed", "seconds")
OTHERS = ("unit", "trusted", "noise added", "holders' scores, 5% to 95%")
COLUMNS = (*RESULTS, *COSTS[1:], *OTHERS)
NOTE = (
    "Score: mean over seeds ± half its 95 % interval. Against the row above, at the same budget: the "
    "difference seed by seed, and the p of a paired t-test, adjusted for all pairs within budgets (Holm). "
    "Epsilon: none where none can be claimed; per holder, of the largest one; of the seed that spent most."
)


def note(cells: Iterable[Cell]) -> str:
    """Return what stands below the table: seeds, what the score is computed on, and how to read it."""
    held = list(cells)
    seeds, found = len({cell.seed for cell in held}), groups(held)
    count = f"{seeds} seed{'s' if seeds > 1 else ''}"
    count += ", fewer where a row says so" if any(len(group.cells) < seeds for group in found) else ""
    on = "private training examples that were held out" if held[0].held_out else "public test data"
    lower = "" if found[0].headline.higher_is_better else f" Lower {found[0].headline.name} is better."
    return f"{count}, judged by {on}.{lower} {NOTE}{_accounted(held)}{_tuned(held)}{_versions(held)}"


def _accounted(cells: Iterable[Cell]) -> str:
    """Say what epsilons depend on, of whom where it is not the same for all."""
    rows: dict[str, dict[str, None]] = {}
    for group in groups(cells):
        if group.protected and group.claimed:
            spent = group.claimed
            basis = f"delta {spent['delta']:g}, {spent['relation']}, by {spent['accountant']}"
            rows.setdefault(basis, {})[group.variant] = None
    if not rows:
        return ""
    if len(rows) == 1:
        return f" Epsilon: {next(iter(rows))}."
    told = "; ".join(f"{basis}: {', '.join(held)}" for basis, held in rows.items())
    return f" Epsilon, where equal numbers are not the same noise: {told}."


def _versions(cells: Sequence[Cell]) -> str:
    """Say which rows were made by which version of the code, where there are several: their difference may be
    one of versions."""
    rows: dict[str, dict[str, None]] = {}
    commits: dict[str, dict[str, None]] = {}
    for cell in cells:
        rows.setdefault(cell.result["code_hash"], {})[cell.variant] = None
        commits.setdefault(cell.result["code_hash"], {})[cell.result["commit"]] = None
    if len(rows) == 1:
        return ""
    told = "; ".join(f"{' and '.join(commits[code])}: {', '.join(held)}" for code, held in rows.items())
    return f" Runs of {len(rows)} versions of the code stand side by side ({told})."


def _tuned(cells: Iterable[Cell]) -> str:
    """How settings were chosen, of whom where it was not the same for all."""
    rows: dict[str, dict[str, dict[float | None, None]]] = {}
    for cell in cells:
        rows.setdefault(cell.result["tuning"], {}).setdefault(cell.variant, {})[cell.epsilon] = None
    if len(rows) == 1:
        (how,) = rows
        return f" Tuned: {how}." if how else ""

    def named(variant: str, budgets: Iterable[float | None]) -> str:
        if sum(variant in others for others in rows.values()) == 1:
            return variant
        return f"{variant} at epsilon {', '.join('none' if e is None else f'{e:g}' for e in budgets)}"

    said = [(how, "; ".join(named(*one) for one in held.items())) for how, held in rows.items()]
    tuned = "".join(f" Tuned, {whose}: {how}." for how, whose in said if how)
    return tuned + "".join(f" Of {whose} no search is known." for how, whose in said if not how)


def table(cells: Iterable[Cell]) -> list[dict[str, str]]:
    """Return one row for each (variant, budget), by budget: `COLUMNS` as text."""
    found = groups(cells)
    known = pairwise(found)
    above = [
        between(known, i, i - 1) if i and group.epsilon == found[i - 1].epsilon else None
        for i, group in enumerate(found)
    ]
    return [_row(group, difference) for group, difference in zip(found, above, strict=True)]


def costs(cells: Iterable[Cell]) -> list[dict[str, str]]:
    """Return one row for each variant: `COSTS` as text, means over its budgets."""
    by_variant: dict[str, list[Cell]] = {}
    for cell in cells:
        by_variant.setdefault(cell.variant, []).append(cell)
    rows = []
    for variant, held in by_variant.items():
        trust = held[0].result["trust"]
        values = (
            variant,
            f"{statistics.mean(cell.result['trust']['bytes_per_holder'] for cell in held):,.0f}",
            str(trust["messages"]),
            str(trust["survivors_needed"]),
            f"{statistics.mean(cell.result['seconds'] for cell in held):.1f}",
        )
        rows.append(dict(zip(COSTS, values, strict=True)))
    return rows


def _row(group: Group, above: Difference | None) -> dict[str, str]:
    trust, headline, holders = group.result["trust"], group.headline, group.holders
    values = (
        group.variant,
        claim.number(group.epsilons.get("example", {}).get("value")),
        claim.number(group.epsilons.get("holder", {}).get("value")),
        f"{headline.name} {group.said()}",
        against(group, above),
        f"{trust['bytes_per_holder']:,.0f}",
        str(trust["messages"]),
        str(trust["survivors_needed"]),
        f"{group.seconds:.1f}",
        trust["unit"],
        trust["trusted"],
        trust["noise_added"],
        f"{headline.shown(holders[0])} to {headline.shown(holders[2])}" if holders else "not computed",
    )
    return dict(zip(COLUMNS, values, strict=True))


def against(group: Group, above: Difference | None) -> str:
    """Return a difference with its test, in the unit of the group's headline."""
    if above is None:
        return "-"
    sign = "+" if above.mean > 0 else ""
    return f"{sign}{group.headline.number(above.mean)} ({above.verdict})"
