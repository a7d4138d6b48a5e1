"""Tables of differences taken seed by seed, from results/*.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tables import load
from fedsim.report.markers import missing, provenance, table
from fedsim.report.significance import Difference, holm, mean_with_interval, paired

NOTE = (
    "\nMeans over {seeds} seeds ± half their 95 % intervals, in percent; differences are taken seed by seed, "
    "with the p of a paired t-test, adjusted for the {tests} tests of the table (Holm): {family}.\n"
)
BySeed = dict[str, dict[int, float]]


def ablation(name: str, also: Sequence[tuple[str, str]] = ()) -> str:
    """What taking out one technique does to accuracy, against the first variant.

    Args:
        name: of the comparison.
        also: pairs of variants whose tests in the family of all pairs are told below the table.
    """
    held = load(f"{name}.json")
    if held is None:
        return missing(f"python -m benchmarks.compared {name}", f"{name}.json")
    whole, *others = found = accuracy(held)
    tests = differences([(found[variant], found[whole]) for variant in others])
    rows = [[whole, with_interval(found[whole].values()), "", ""]]
    for variant, test in zip(others, tests, strict=True):
        rows.append([variant, with_interval(found[variant].values()), _said(test), test.verdict])
    titles = ["variant", "accuracy", "change", "test"]
    family = "each row against the first alone, not all pairs"
    note = NOTE.format(seeds=len(found[whole]), tests=len(tests), family=family)
    return table(titles, rows) + note + _all_pairs(found, also) + provenance(held)


def _all_pairs(found: BySeed, asked: Sequence[tuple[str, str]]) -> str:
    """What the larger family of all pairs says of some of them, one above or below the other."""
    if not asked:
        return ""
    pairs = [(one, other) for i, one in enumerate(found) for other in list(found)[:i]]
    tests = dict(zip(pairs, differences([(found[a], found[b]) for a, b in pairs]), strict=True))
    told = "; ".join(
        f"{one} against {other} {tests[one, other].mean:+.2f} ({tests[one, other].verdict})"
        for one, other in asked
    )
    return f"\nIn the larger family of all {len(pairs)} pairs, as other tables have it: {told}.\n"


def holders_law() -> str:
    """Local noise of H holders against central noise times the root of H, at the same settings."""
    measured, expected = load("holders.json"), load("holders_law.json")
    if measured is None or expected is None:
        return missing("python -m benchmarks.compared holders holders_law", "holders_law.json")
    own, law = accuracy(measured), accuracy(expected)
    tests = differences([(own[variant], law[variant]) for variant in law])
    rows = [
        [
            variant,
            with_interval(own[variant].values()),
            with_interval(law[variant].values()),
            said,
            test.verdict,
        ]
        for variant, test in zip(law, tests, strict=True)
        for said in [_said(test)]
    ]
    titles = ["variant", "accuracy", "central noise times the root of holders", "difference", "test"]
    family = "each row against its own law alone. What is not told apart is not shown to be equal"
    note = NOTE.format(seeds=len(next(iter(law.values()))), tests=len(tests), family=family)
    return table(titles, rows) + note + provenance(expected)


def accuracy(held: Mapping[str, Any]) -> BySeed:
    """Return the accuracy in percent of each variant by seed, of a comparison at one budget."""
    found: BySeed = {}
    for cell in held["cells"]:
        found.setdefault(cell["variant"], {})[cell["seed"]] = 100 * cell["accuracy"]
    return found


def of(held: Mapping[str, Any], variant: str, budget: float | None) -> list[float]:
    """Return the accuracy in percent of a variant at a budget, one number a seed."""
    return [
        100 * cell["accuracy"]
        for cell in held["cells"]
        if (cell["variant"], cell["epsilon"]) == (variant, budget)
    ]


def differences(pairs: Sequence[tuple[Mapping[int, float], Mapping[int, float]]]) -> list[Difference]:
    """Return what the first of each pair is above the second, p adjusted for all of them.

    Raises:
        ValueError: a pair has not the same seeds.
    """
    if any(one.keys() != other.keys() for one, other in pairs):
        raise ValueError("differences seed by seed need the same seeds on both sides")
    return holm(
        [paired([one[s] for s in sorted(one)], [other[s] for s in sorted(one)]) for one, other in pairs]
    )


def with_interval(values: Any) -> str:
    """Return the mean with half its 95 % interval, if there is one."""
    return mean_with_interval(list(values), 2)


def _said(test: Difference) -> str:
    half = "" if test.half_width is None else f" ± {test.half_width:.2f}"
    return f"{test.mean:+.2f}{half}"
