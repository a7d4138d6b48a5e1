"""What a comparison says, in sentences: from the numbers and their tests, and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fedsim.report import claim
from fedsim.report.cells import Cell, Group, Tests, between, groups, pairwise
from fedsim.report.significance import FEW, Difference


def findings(cells: Sequence[Cell]) -> list[str]:
    """Return a sentence a budget: what scores best, what cannot be told from it, and what falls behind.

    Told apart is what `cells.pairwise` tells apart at 5 %; the best of the variants without privacy is named
    beside those that have a budget. Budgets that stand for different units, relations
    or accountants say so: equal numbers are not the same promise.
    """
    found = groups(cells)
    known = pairwise(found)
    budgets = dict.fromkeys(group.epsilon for group in found)
    places = {epsilon: [i for i, g in enumerate(found) if g.epsilon == epsilon] for epsilon in budgets}
    without = [group for group in found if not group.protected]
    sentences = []
    for epsilon, rivals in places.items():
        if epsilon is None and len(places) > 1 and all(found[i] in without for i in rivals):
            continue  # named beside the others
        beside = [] if epsilon is None else without
        private = [i for i in rivals if found[i] not in beside] or rivals
        sentences.append(_sentence(found, private, known, beside))
    return sentences


def _sentence(found: Sequence[Group], rivals: Sequence[int], known: Tests, without: Sequence[Group]) -> str:
    first = found[rivals[0]]
    place = max(rivals, key=lambda i: _rank(found[i]))
    best, headline, at = found[place], first.headline, _at([found[i] for i in rivals])
    change = {i: between(known, place, i) for i in rivals if i != place}
    ranked = sorted(change, key=lambda i: abs(change[i].mean))
    behind = [i for i in ranked if change[i].significant]
    same = [found[i].variant for i in ranked if change[i].p is not None and not change[i].significant]
    unknown = [i for i in ranked if change[i].p is None]
    if not change:
        text = f"{at}{best.variant} reaches a {best.judged_by} of {best.said()}"
    elif behind:
        text = f"{at}{best.variant} has the best {best.judged_by}, {best.said()}"
        text += f"; not told from it: {_list(same)}" if same else ""
        unit = "points" if headline.unit == "%" else headline.unit
        told = [f"{found[i].variant} by {headline.number(abs(change[i].mean))}" for i in behind]
        text += f"; behind: {_list(told)} {unit}".rstrip()
        if unknown:
            why = _untested(change[i] for i in unknown)
            text += f"; not tested{why}: {_list([found[i].variant for i in unknown])}"
    else:
        pairs = [between(known, i, j) for i in rivals for j in rivals if i > j]
        any_told = any(pair.significant for pair in pairs)
        what = "the best is not told from any other" if any_told else "no difference can be told"
        what = what if at else what.capitalize()
        worst = found[ranked[-1]]
        text = (
            f"{at}{what}{_untested(change.values())}: {best.judged_by} from {worst.said()} "
            f"({worst.variant}) to {best.said()} ({best.variant})"
        )
    for name, noised in (("Without privacy", False), ("With noise that gives no claimable epsilon", True)):
        if others := [group for group in without if group.noised == noised]:
            top = max(others, key=_rank)
            text += f". {name}: {top.said()} ({top.variant})"
    return f"{text}."


def _untested(changes: Iterable[Difference]) -> str:
    """Why the best was tested against none, if it was not."""
    reasons = {None if change.p is not None else change.why for change in changes}
    if None in reasons:
        return ""
    return ", for too few seeds" if reasons == {FEW} else ", for runs of some seeds are missing"


def _at(rivals: Sequence[Group]) -> str:
    """Say at which epsilon these stand, each unit's own where they have no common budget."""
    if rivals[0].epsilon is not None:
        return f"At epsilon {rivals[0].epsilon:g}{_unlike(rivals)}, "
    spent = [_spent(group) for group in rivals]
    own = sorted({f"{value:.3g}": value for value in spent if value != math.inf}.values())
    if not own:
        return ""
    some = f"epsilon {own[0]:.3g}" if len(own) == 1 else f"epsilons from {own[0]:.3g} to {own[-1]:.3g}"
    none = f" ({spent.count(math.inf)} of {len(spent)} claim none)" if math.inf in spent else ""
    return f"At {some}{none}{_unlike(rivals)}, "


def _unlike(rivals: Sequence[Group]) -> str:
    """Say that equal numbers are not one promise, or not one amount of noise."""
    protected = [group.claimed for group in rivals if group.protected]
    units, relations, accountants = (
        {spent.get(key) for spent in protected} for key in ("unit", "relation", "accountant")
    )
    if len(units) > 1:
        return " of different units, one example and a whole holder"
    if len(relations) > 1:
        return " of different neighbouring relations"
    return f" by {_list(sorted(map(str, accountants)))}" if len(accountants) > 1 else ""


def _spent(group: Group) -> float:
    """The epsilon of the unit that a group protects, infinite where none is claimable."""
    value: Any = group.claimed.get("value")
    return math.inf if claim.number(value) == claim.NONE else float(value)


def _rank(group: Group) -> float:
    return group.mean if group.headline.higher_is_better else -group.mean


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def promise(group: Group) -> str:
    """Return in words what the runs of a group promise to whom, and whom one must trust for it."""
    result = group.result
    parts = []
    for unit in ("example", "holder"):
        spent = group.epsilons.get(unit)
        if spent is not None:
            whole = "one example" if unit == "example" else "all examples of one holder"
            parts.append(f"{whole}: {claim.claim(spent)}")
    trust = result["trust"]
    return f"Trusted: {trust['trusted']}. Noise: {trust['noise_added']}. {_upper('; '.join(parts))}."


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
