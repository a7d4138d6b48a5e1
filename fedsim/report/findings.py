"""What a comparison says, in sentences: from the numbers and their tests, and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedsim.report import claim, significance
from fedsim.report.cells import Cell, Group, by_budget, groups


def findings(cells: Sequence[Cell]) -> list[str]:
    """Return a sentence a budget: what scores best, what cannot be told from it, and what falls behind.

    Each variant is compared with the best of its budget by a paired t-test over the seeds at 5 %, adjusted
    for the tests of that budget (Holm); the best of the variants without privacy is named beside them.
    """
    found = by_budget(groups(cells))
    without = [g for group in found.values() for g in group if _unprotected(g)]
    sentences = []
    for epsilon, rivals in found.items():
        private = [g for g in rivals if g not in without] if epsilon is not None else rivals
        if epsilon is None and len(found) > 1 and all(g in without for g in rivals):
            continue  # named beside the others
        sentences.append(_sentence(epsilon, private or rivals, without if epsilon is not None else []))
    return sentences


def _sentence(epsilon: float | None, rivals: Sequence[Group], without: Sequence[Group]) -> str:
    headline = rivals[0].headline
    best = _best(rivals)
    others = [g for g in rivals if g is not best]
    tests = significance.holm([best.minus(g) for g in others])
    ranked = sorted(zip(others, tests, strict=True), key=lambda pair: abs(pair[1].mean))
    behind = [(g.variant, abs(test.mean)) for g, test in ranked if test.significant]
    same = [g.variant for g, test in ranked if not test.significant]
    at = "" if epsilon is None else f"At epsilon {epsilon:g}, "
    if not others:
        text = f"{at}{best.variant} reaches a test {headline.name} of {best.said()}"
    elif not behind:
        why = " by one seed" if all(test.p is None for test in tests) else ""
        worst = max(others, key=lambda g: abs(g.mean - best.mean))
        text = (
            f"{at}no difference can be told{why}: test {headline.name} from {worst.said()} ({worst.variant}) "
            f"to {best.said()} ({best.variant})"
        )
    else:
        text = f"{at}{best.variant} has the best test {headline.name}, {best.said()}"
        text += f"; not told from it: {_list(same)}" if same else ""
        unit = "points" if headline.unit == "%" else headline.unit
        told = [f"{variant} by {headline.number(change)}" for variant, change in behind]
        text += f"; behind: {_list(told)} {unit}".rstrip()
    if without:
        top = _best(without)
        text += f". Without privacy: {top.said()} ({top.variant})"
    return text[0].upper() + text[1:] + "."


def _best(rivals: Sequence[Group]) -> Group:
    sign = 1 if rivals[0].headline.higher_is_better else -1
    return max(rivals, key=lambda g: sign * g.mean)


def _unprotected(group: Group) -> bool:
    values = [spent["value"] for spent in group.result["epsilon"].values()]
    return all(value is None or not math.isfinite(value) for value in values)


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def promise(group: Group) -> str:
    """Return in words what the runs of a group promise to whom, and whom one must trust for it."""
    result = group.result
    parts = []
    for unit in ("example", "holder"):
        spent = result["epsilon"].get(unit)
        if spent is not None:
            whole = "one example" if unit == "example" else "all examples of one holder"
            parts.append(f"{whole}: {claim.claim(spent)}")
    trust = result["trust"]
    return f"Trusted: {trust['trusted']}. Noise: {trust['noise_added']}. {_upper('; '.join(parts))}."


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
