"""What a comparison calls better is told apart by a test, and chance alone seldom is."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import by_seed
from fedsim import provenance
from fedsim.report import results, significance
from fedsim.report.cells import Cell, between, groups, pairwise
from fedsim.report.findings import findings, promise
from fedsim.report.significance import Difference
from fedsim.report.table import note, table
from fedsim.study import probe

ACCURACY = {"name": "accuracy", "unit": "%", "higher_is_better": True}


def _cell(variant: str, epsilon: float | None, seed: int, score: float, **more: Any) -> Cell:
    spent = {
        "value": epsilon,
        "delta": 1e-5,
        "n_delta": 0.1,
        "relation": "add/remove one",
        "accountant": "pld",
        "note": "",
    }
    trust = {
        "trusted": "server",
        "noise_added": "once",
        "unit": "example",
        "bytes_per_holder": 8.0,
        "messages": 4,
        "survivors_needed": "any",
    }
    headline = more.pop("headline", ACCURACY)
    result = {
        headline["name"]: score,
        "headline": headline,
        "epsilon": {"example": spent},
        "noise_multiplier": None if epsilon is None else 1.0,
        "seconds": 1.0,
        "code_hash": "h",
        "commit": "c",
        "tuning": "",
    }
    return Cell(variant, epsilon, seed, {**result, "trust": trust, "holder_scores": {}, **more}, [])


def _cells(scores: dict[str, list[float]], epsilon: float | None = 1.0, **more: Any) -> list[Cell]:
    return [_cell(v, epsilon, s, x, **more) for v, found in scores.items() for s, x in enumerate(found)]


def test_intervals_and_tests_are_those_of_the_textbook() -> None:
    own, other = [0.81, 0.79, 0.84, 0.80, 0.83], [0.80, 0.782, 0.82, 0.79, 0.81]
    interval = stats.t.interval(0.95, 4, statistics.mean(own), stats.sem(own))
    half = significance.half_width(own)
    assert half is not None
    assert [statistics.mean(own) - half, statistics.mean(own) + half] == pytest.approx(interval)
    pair = significance.paired(own, other)
    oracle = stats.ttest_1samp(np.subtract(own, other), 0.0)
    assert pair.p == pytest.approx(oracle.pvalue)
    assert pair.significant
    assert not significance.welch(own, other).significant, "as if the seeds were not the same"
    assert significance.welch(own, other).p == pytest.approx(
        stats.ttest_ind(own, other, equal_var=False).pvalue
    )
    assert significance.paired([0.8, 0.7], [0.8, 0.7]) == Difference(0.0, None, 1.0)
    assert significance.paired([0.8], [0.7]).p is None
    assert significance.paired([0.715, 0.704], [0.713, 0.702]).p == 0.5, "a sign test of two seeds"
    rounded = significance.paired([0.3, 0.5, 0.9], [0.1, 0.3, 0.7])
    assert rounded.p == 1 / 4, "the same difference three times, but for rounding"


def test_adjusted_tests_are_those_of_holm() -> None:
    raw = [Difference(0.0, 0.1, p) for p in (0.01, 0.04, 0.03, 0.005)] + [Difference(0.0, None, None)]
    assert [d.p for d in significance.holm(raw)] == pytest.approx([0.03, 0.06, 0.06, 0.02, None])


@pytest.mark.parametrize("examples", [100_000, 400])
def test_chance_is_called_better_at_most_one_time_in_twenty(examples: int) -> None:
    """Six variants at two budgets that are all the same, compared 400 times: were each test taken by
    itself, a variant would be called behind the luckiest one in half of the comparisons."""
    random = np.random.default_rng(7)
    told = 0
    for _ in range(400):
        cells = []
        for epsilon in (1.0, 3.0):
            scores = np.rint(random.normal(0.8, 0.01, (6, 5)) * examples) / examples
            cells += _cells({f"v{i}": list(row) for i, row in enumerate(scores)}, epsilon)
        told += any("behind" in sentence for sentence in findings(cells))
    assert told / 400 < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_what_is_told_apart_is_said_with_its_size_and_the_rest_is_not() -> None:
    scores = {
        "a": [0.80, 0.81, 0.79, 0.80, 0.805],
        "b": [0.798, 0.812, 0.788, 0.801, 0.803],
        "c": [0.70, 0.71, 0.69, 0.70, 0.706],
    }
    free = _cells({"free": [0.85, 0.86, 0.85, 0.86, 0.85]}, None)
    for cell in free:
        cell.result["epsilon"]["example"]["value"] = None
    (said,) = findings(_cells(scores) + free)
    assert said.startswith("At epsilon 1, a has the best test accuracy, 80.10 ± ")
    assert "not told from it: b; behind: c by 9.98 points. Without privacy: 85.40 ± " in said
    (said,) = findings(_cells({"a": scores["a"], "b": scores["b"]}))
    assert "no difference can be told: test accuracy from 80.04 ± " in said
    (said,) = findings(_cells({"a": [0.8], "b": [0.5]}))
    assert "no difference can be told, for too few seeds" in said
    noisy = {"a": [0.70, 0.99, 0.72, 0.98, 0.75], "b": scores["a"], "c": scores["c"]}
    (said,) = findings(_cells(noisy))
    assert "the best is not told from any other" in said, "though b and c are"
    lacks = {**scores, "d": [0.1, 0.11, 0.1, 0.1]}
    (said,) = findings(_cells(lacks))
    assert (
        "not told from it: b; behind: c by 9.98 points; not tested, for runs of some seeds are missing: d"
        in said
    )
    units = _cells({"a": scores["a"]}) + _cells({"c": scores["c"]})
    for place, cell in enumerate(units):
        spent = {**cell.result["epsilon"]["example"], "unit": "holder" if place >= 5 else "example"}
        cell.result["epsilon"] = {spent["unit"]: spent}
        cell.result["trust"] = {**cell.result["trust"], "unit": spent["unit"]}
    (said,) = findings(units)
    assert said.startswith("At epsilon 1 of different units, one example and a whole holder, a has the best")
    held = [replace(cell, held_out=True) for cell in _cells(scores)]
    assert "best held-out accuracy" in findings(held)[0]
    assert "held out" in note(held)
    own = _cells({"x": [0.8, 0.7]}, None) + _cells({"y": [0.7, 0.8]}, None)
    for cell, value in zip(own, (277, 277, 4.24, 4.24), strict=True):
        cell.result["epsilon"]["example"]["value"] = value
    assert findings(own)[0].startswith("At epsilons from 4.24 to 277, no difference can be told")
    for value in (None, 5000.0):
        for cell in own[:2]:
            cell.result["epsilon"]["example"]["value"] = value
        assert findings(own)[0].startswith("At epsilon 4.24 (1 of 2 claim none), "), "a budget is not theirs"
    rmse = {"name": "rmse", "unit": "marks", "higher_is_better": False}
    (said,) = findings(_cells(scores, headline=rmse))
    assert said.startswith("At epsilon 1, c has the best test rmse")
    assert "marks" in said


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([0.8], "80.00 % (1 seed, no interval)"),
        ([0.8, 0.81], "80.50 % (2 seeds, no interval)"),
        ([0.8, 0.8], "80.00 % (2 seeds, no interval)"),
        ([0.8, 0.8, 0.8, 0.8], "80.00 % (4 seeds that agree, no interval)"),
        ([0.3, 0.1 + 0.2, 0.3], "30.00 % (3 seeds that agree, no interval)"),
        ([0.8, 0.81, 0.82], "81.00 ± 2.48 %"),
    ],
)
def test_there_is_no_interval_of_two_seeds_or_of_seeds_that_agree(scores: list[float], said: str) -> None:
    """Plus or minus nothing would be a certain mean. All pages say it by one function."""
    assert (significance.half_width(scores) is None) == ("no interval" in said)
    (group,) = groups(_cells({"a": scores}))
    assert group.said() == said
    held = {"headline": ACCURACY, "scores": scores, "mean": statistics.mean(scores)}
    assert results._reached(held).replace("accuracy; ", "").replace(" (accuracy)", "") == said
    assert by_seed.with_interval(100 * x for x in scores) == said.replace(" %", "")
    (line,) = probe.rows_of({"f": {"h": scores}})[1:]
    assert line[1].partition(" (")[2] == said.partition(" (")[2]
    mean = significance.mean_with_interval([100 * x for x in scores], 2, "%")
    assert mean == said


def test_copies_of_a_row_change_no_other_rows_p() -> None:
    """As variants that are the same by construction: central, however many holders."""
    own = {"a": [0.70, 0.71, 0.73, 0.72], "b": [0.60, 0.61, 0.63, 0.62], "c": [0.71, 0.73, 0.74, 0.72]}
    alone = pairwise(groups(_cells(own)))
    found = groups(
        _cells({"a": own["a"], "a again": own["a"], "b": own["b"], "c": own["c"], "b too": own["b"]})
    )
    known = pairwise(found)
    named = [group.variant for group in found]

    def p(one: str, other: str) -> float | None:
        return between(known, named.index(one), named.index(other)).p

    assert p("a", "b") == p("a again", "b too") == p("b", "a again") == alone[1, 0].p
    assert p("c", "b") == p("c", "b too") == alone[2, 1].p
    assert p("a", "a again") == p("b", "b too") == 1.0
    assert between(known, 0, 2).mean == -between(known, 2, 0).mean == pytest.approx(0.1)
    other = groups([*_cells(own), *_cells({"a": own["a"]}, 8.0)])
    assert set(pairwise(other)) == {(1, 0), (2, 0), (2, 1)}, "the same scores at another budget"


def test_rows_are_compared_with_the_row_above_at_their_budget_over_the_seeds_both_have() -> None:
    low = _cells({"a": [0.70, 0.71, 0.72], "b": [0.60, 0.61, 0.63]})
    high = _cells({"a": [0.80, 0.81, 0.82], "b": [0.83, 0.84, 0.85]}, 8.0)
    shuffled = [*high[::-1], *low[:3], *low[:2:-1]]  # the runs of b at 1 in another order than those of a
    found = groups(shuffled)
    assert [(g.epsilon, g.variant) for g in found] == [(1.0, "a"), (1.0, "b"), (8.0, "b"), (8.0, "a")]
    known = pairwise(found)
    assert set(known) == {(1, 0), (3, 2)}, "pairs of one budget"
    assert known[1, 0].mean == pytest.approx(-0.29 / 3)
    assert known[1, 0].p is not None
    assert known[3, 2].mean == pytest.approx(-0.03)
    assert between(known, 2, 3).mean == pytest.approx(0.03)
    lacking = low[:3] + low[4:]
    assert pairwise(groups(lacking))[1, 0].p is None, "b lacks its first seed"
    assert "no test: not the same seeds of both" in table(lacking)[1]["against the row above"]
    assert [row["score"] for row in table(lacking)] == [
        "accuracy 71.00 ± 2.48 %",
        "accuracy 62.00 % (2 of 3 seeds, no interval)",
    ]
    assert note(lacking).startswith("3 seeds, fewer where a row says so, judged by ")
    assert note(low).startswith("3 seeds, judged by ")
    (said,) = findings(lacking)
    assert "no difference can be told, for runs of some seeds are missing: " in said
    four = _cells({"a": [0.7, 0.71, 0.72, 0.7], "b": [0.6, 0.61, 0.63, 0.6]})
    assert table(four[:4] + four[5:])[1]["score"] == "accuracy 61.33 ± 3.79 % (3 of 4 seeds)"
    rows = table(low + high)
    assert [row["against the row above"] for row in rows][::2] == ["-", "-"]
    assert rows[1]["against the row above"].startswith("-9.67 (p ")


def test_no_number_stands_where_no_epsilon_can_be_claimed() -> None:
    for value in (None, math.inf, 2791.0):
        cells = _cells({"a": [0.8, 0.81]})
        for cell in cells:
            cell.result["epsilon"]["holder"] = {**cell.result["epsilon"]["example"], "value": value}
        (row,) = table(cells)
        assert row["epsilon per holder"] == "none"
        (group,) = groups(cells)
        assert "all examples of one holder: no claimable epsilon" in promise(group)
        assert "2791" not in promise(group)


def _spending(variant: str, seed: int, **spent: Any) -> Cell:
    """A run whose epsilon is given in parts."""
    cell = _cell(variant, 1.0, seed, 0.8 + seed / 100)
    whole = {**cell.result["epsilon"]["example"], **spent}
    return replace(cell, result={**cell.result, "epsilon": {"example": whole, "holder": {**whole}}})


def test_a_row_claims_the_epsilon_of_the_seed_that_spent_most() -> None:
    cells = [_spending("a", seed, value=value) for seed, value in enumerate((18.9, 32.46, 24.7))]
    (row,) = table(cells)
    assert (row["epsilon per example"], row["epsilon per holder"]) == ("32.5", "32.5")
    (group,) = groups(cells)
    assert "32.46" in promise(group)
    (row,) = table([*cells, _spending("a", 3, value=None)])
    assert row["epsilon per holder"] == "none", "one seed that claims nothing is enough"
    free = [replace(cell, epsilon=None) for cell in (*cells, _spending("b", 0, value=2.0))]
    assert findings(free)[0].startswith("At epsilons from 2 to 32.5, ")
    same = [_spending(name, 0, value=value) for name, value in (("a", 4.0), ("b", 4.0001))]
    assert findings([replace(cell, epsilon=None) for cell in same])[0].startswith("At epsilon 4, ")


def test_noise_without_a_claim_is_not_called_no_privacy() -> None:
    private = _cells({"private": [0.8, 0.82]})
    imitated = _cells({"imitated": [0.83, 0.84]}, None, noise_multiplier=0.3)
    plain = _cells({"plain": [0.9, 0.91]}, None)
    both = findings([*private, *imitated, *plain])[0]
    assert "Without privacy: 90.50" in both
    assert "With noise that gives no claimable epsilon: 83.50" in both
    assert "Without privacy" not in findings([*private, *imitated])[0]
    assert "no claimable" not in findings([*private, *plain])[0]


def test_equal_epsilons_that_are_not_one_promise_say_so() -> None:
    pld = [_spending("pld", seed, value=1.0) for seed in range(2)]
    rdp = [_spending("rdp", seed, value=1.0, accountant="rdp") for seed in range(2)]
    fixed = [_spending("fixed", seed, value=1.0, relation="replace one") for seed in range(2)]
    assert findings(pld)[0].startswith("At epsilon 1, ")
    assert note(pld).endswith(" Epsilon: delta 1e-05, add/remove one, by pld.")
    assert findings([*pld, *rdp])[0].startswith("At epsilon 1 by pld and rdp, ")
    assert findings([*pld, *fixed])[0].startswith("At epsilon 1 of different neighbouring relations, ")
    assert note([*pld, *fixed]).endswith(
        " Epsilon, where equal numbers are not the same noise: delta 1e-05, add/remove one, by pld: pld; "
        "delta 1e-05, replace one, by pld: fixed."
    )
    free = [replace(cell, epsilon=None) for cell in (*pld, *rdp)]
    assert findings(free)[0].startswith("At epsilon 1 by pld and rdp, ")


def test_an_ablation_tests_against_its_first_row_and_tells_what_all_pairs_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two families: the rows against the first, and all pairs."""
    scores = {"whole": (0.80, 0.81, 0.79), "one": (0.78, 0.80, 0.77), "two": (0.70, 0.71, 0.68)}
    cells = [
        {"variant": variant, "epsilon": 1.0, "seed": seed, "accuracy": score}
        for variant, held in scores.items()
        for seed, score in enumerate(held)
    ]
    about = {"command": "c", "commit": "c", "hardware": provenance.hardware()}
    monkeypatch.setattr(by_seed, "load", lambda name: {"cells": cells, **about})
    said = by_seed.ablation("n", [("two", "one")])
    percent = {variant: [100 * score for score in held] for variant, held in scores.items()}
    first = significance.holm([significance.paired(percent[v], percent["whole"]) for v in ("one", "two")])
    every = significance.holm(
        [
            significance.paired(percent[a], percent[b])
            for a, b in (("one", "whole"), ("two", "whole"), ("two", "one"))
        ]
    )
    for test in first:
        assert f"{test.mean:+.2f} ± {test.half_width:.2f} | {test.verdict} |" in said
    assert "adjusted for the 2 tests of the table (Holm): each row against the first alone" in said
    assert f"all 3 pairs, as other tables have it: two against one {every[2].mean:+.2f}" in said
    assert f"({every[2].verdict}).\n" in said
    assert "all 3 pairs" not in by_seed.ablation("n")
