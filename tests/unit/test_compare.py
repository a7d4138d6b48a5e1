"""Comparisons: every shipped one is valid, cells resume, tables and page say what the runs found."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import html
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.container import ErrorbarContainer

from benchmarks import compared, report, tables
from fedsim import loading, provenance
from fedsim.config import CONFIG_DIR
from fedsim.engine.experiment import prepare
from fedsim.report import figures, markers
from fedsim.report.cells import Cell
from fedsim.report.page import About, page
from fedsim.report.table import COSTS, RESULTS, note, table
from fedsim.study import compare, tune
from fedsim.study.tuned import Chosen, Tuned, recipe_digest, recipe_name
from fedsim.validate import InputError
from tests.conftest import SMALL, command

SHIPPED = sorted((CONFIG_DIR / "compare").glob("*.yaml"))


@functools.cache
def cells_of(path: Path) -> list[compare.Planned]:
    """The runs of a shipped comparison, planned once for all tests."""
    return compare.cells(compare.load(path), [])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_comparisons_are_valid(path: Path) -> None:
    wanted = compare.load(path)
    planned = cells_of(path)
    assert len({cell.folder for cell in planned}) == len(planned) >= 2
    for cell in planned:
        assert cell.config.seed == cell.seed
        first = cell.seed == planned[0].seed and cell.epsilon in (None, planned[0].epsilon)
        if first and Path(wanted.recipe).stem == "quickstart":  # of the embedded data
            assert prepare(cell.config).mechanism.steps > 0


def test_runs_all_cells_once_and_reports(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, tiny, log = finished, finished.parent / "tiny.yaml", (finished.parent / "log").read_text()
    assert log.count("finished before") == 0
    assert log.count("[") == 6, "two budgets and two seeds of central, two seeds of nonprivate"
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [row["variant"] for row in rows] == ["central", "central", "nonprivate"]
    assert [row["epsilon per example"] for row in rows] == ["2", "20", "none"]
    said = r"accuracy \d+\.\d\d % \(2 seeds, no interval\)"
    assert all(re.fullmatch(said, row["score"]) for row in rows)
    text = (out / "table.md").read_text()
    assert text.startswith("At epsilon 2, central reaches a test accuracy of ")
    assert text.count("\n| central |") == 3, "two results, one line of costs"

    assert command(["compare", str(tiny), "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("finished before") == 6


def test_a_wrong_variant_is_found_before_anything_runs(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_text(tiny.read_text() + "  broken: [federation.holders=100000]\n")
    assert command(["compare", str(tiny), "--out", str(tmp_path / "out")]) == 2
    assert "variant 'broken'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("seeds: [0, 1.5]", "seeds must be whole numbers, got 1.5"),
        ("seeds: [true]", "seeds must be whole numbers, got True"),
        ("seeds: [null]", "seeds must be whole numbers, got None"),
        ("seeds: 3", "seeds must be a list of whole numbers, got 3"),
        ("epsilons: [yes]", "epsilons must be numbers, got True"),
        ("epsilons: ['1']", "epsilons must be numbers, got '1'"),
    ],
)
def test_seeds_and_budgets_are_numbers(said: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"recipe: base\nvariants: {{a: []}}\n{said}\n")
    with pytest.raises(InputError, match=re.escape(message)):
        compare.load(tmp_path / "c.yaml")
    (tmp_path / "t.yaml").write_text(f"recipe: base\nspace: {{train.steps: [1, 2]}}\n{said}\n")
    with pytest.raises(InputError, match=re.escape(message)):
        tune.load(tmp_path / "t.yaml")


@pytest.mark.parametrize(
    ("given", "variant", "message"),
    [
        (["seed=5"], "", "seed must be 0 in this run"),
        (["privacy.target_epsilon=8"], "", "target_epsilon must be 2 in this run"),
        ([], "  other: ['privacy={target_epsilon: 9}']", "target_epsilon must be 2 in this run"),
        ([], "  other: [task.options.headline=loss]", "task must be the same"),
        ([], "  other: [data.holdout_examples=100]", "data.holdout_examples must be the same"),
        ([], "  other: [data.test_examples=50]", "data.test_examples must be the same"),
        ([], "  other: [privacy.delta=1e-3]", "privacy.delta must be the same"),
        ([], "  other: ['seed=3']", "variant 'other': seed must be left out"),
        (
            [],
            "  other: train.steps=3",
            "variant 'other' must be a list of settings, such as [strategy=local]",
        ),
        ([], "  'a | b': []", "none of"),
        ([], '  "a\\nb": []', "no line break"),
        ([], "  '[/x]': []", "none of"),
    ],
)
def test_runs_that_are_not_what_their_row_says_are_refused(
    given: list[str],
    variant: str,
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny.write_text(f"{tiny.read_text()}{variant}\n")
    assert command(["compare", str(tiny), *given, "--out", str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_is_not_finished_says_so(finished: Path) -> None:
    cells = [Cell(**held) for held in json.loads((finished / "cells.json").read_text())]
    assert "Unfinished: 5 of 6 runs are there." in page(cells[:5], About("t", runs=6))
    assert "Unfinished" not in page(cells, About("t", runs=6))
    assert "Unfinished" not in (finished / "report.html").read_text()


def test_runs_that_diverge_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With and without parameters that are finite: scores of guesses are no results."""
    given = ["train.steps=2", "train.eval_every=2"]
    base = [s for s in SMALL if not s.startswith(("privacy.target", "privacy.noise"))]
    path = tmp_path / "c.yaml"
    path.write_text(
        f"title: t\nrecipe: base\nseeds: [0]\nepsilons: [2]\noverrides: [{', '.join([*base, *given])}]\n"
        "variants:\n  well: []\n  nan outputs: [optimizer.learning_rate=1e30]\n"
        "  no parameters: [optimizer.learning_rate=1e39]\n  after them: [optimizer.learning_rate=0.01]\n"
    )
    assert command(["compare", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "diverged; it is left out" in capsys.readouterr().err
    said = "Diverged, and left out: nan outputs at epsilon 2, seed 0; no parameters at epsilon 2, seed 0."
    for name in ("table.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert said in text
        assert "Unfinished" not in text
    cells = json.loads((tmp_path / "out" / "cells.json").read_text())
    assert [cell["variant"] for cell in cells] == ["well", "after them"]
    path.write_text(path.read_text().replace("  well: []\n", "").replace("=0.01", "=1e39"))
    assert command(["compare", str(path), "--out", str(tmp_path / "dead")]) == 3
    assert "has a score: all diverged. Lower the learning rates" in capsys.readouterr().err


def test_rows_of_several_versions_of_the_code_are_told(finished: Path) -> None:
    cells = [Cell(**held) for held in json.loads((finished / "cells.json").read_text())]
    assert "versions of the code" not in note(cells)
    cells[-1].result.update(code_hash="other", commit="c2")
    first = cells[0].result["commit"]
    told = f"({first}: central, nonprivate; c2: {cells[-1].variant})."
    assert f"Runs of 2 versions of the code stand side by side {told}" in note(cells)


def test_a_folder_is_of_one_comparison(
    kept: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose page another one would write over; with other rows and seeds it is still that one."""
    source, runs = Path(kept[0]), kept[1]
    out, text = runs / "compare" / "tiny", source.read_text()
    page = (out / "report.html").read_text()
    for changed in (
        text.replace("title: tiny", "title: other"),
        text.replace("recipe: base", "recipe: small"),
    ):
        assert changed != text
        source.write_text(changed)
        (tmp_path / "small.yaml").write_text("extends: base\n")
        assert command(["compare", str(source), "--out", str(out)]) == 2
        assert "is the folder of another comparison" in capsys.readouterr().err
    assert (out / "report.html").read_text() == page
    source.write_text(text.replace("seeds: [0, 1]", "seeds: [1]"))
    assert command(["compare", str(source), "--out", str(out)]) == 0


def test_scores_that_are_better_when_smaller_say_so(finished: Path) -> None:
    cells = [Cell(**held) for held in json.loads((finished / "cells.json").read_text())]
    assert "is better" not in note(cells)
    for cell in cells:
        cell.result["headline"]["higher_is_better"] = False
    assert "Lower accuracy is better." in note(cells)


def test_unknown_key_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_text(tiny.read_text().replace("seeds:", "sedes:"))
    assert command(["compare", str(tiny)]) == 2
    assert "seeds" in capsys.readouterr().err


class Page(HTMLParser):
    """What a page shows and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]


def test_the_page_needs_nothing_but_a_browser_and_shows_plots(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "video"} & set(page.tags)
    assert not re.search(r"url\((?!#)", text), "only parts of its own plots"
    assert "@import" not in text
    assert all(address.startswith("#") for address in page.addresses), "nothing is fetched"
    assert page.tags.count("svg") == page.tags.count("figure") == 4
    for caption in ("target epsilon", "against steps at epsilon 2", "over holders"):
        assert re.search(f"<figcaption>[^<]*{caption}", text), caption
    assert page.tags.count("tr") == 4 + 3, "results and costs, with their heads"
    assert page.tags.count("th") == len(RESULTS) + len(COSTS)
    assert text.index('class="lead"') < text.index("<svg") < text.index("<table"), "words, plots, numbers"
    for said in ("width=device-width", "prefers-color-scheme: dark", "fedsim compare", "Trusted: server"):
        assert said in text, said
    assert "#000000" not in text, "what is written takes the colour of the page"


def test_the_plots_show_what_the_cells_say(finished: Path) -> None:
    cells = [Cell(**held) for held in json.loads((finished / "cells.json").read_text())]
    pictures = dict(figures.figures(cells))
    (axes,) = pictures["Accuracy against the target epsilon, with 95% intervals"].axes
    (bars,) = axes.containers
    assert isinstance(bars, ErrorbarContainer)
    drawn = bars.lines[0].get_xydata()
    for budget, accuracy in drawn:
        group = [100 * c.result["accuracy"] for c in cells if c.epsilon == budget]
        assert accuracy == pytest.approx(np.mean(group))
    assert [x for x, _ in drawn] == [2, 20]
    assert not any(len(line) for line in bars.lines[2][0].get_segments()), "no interval of two seeds"
    third = [dataclasses.replace(c, seed=2, result={**c.result, "accuracy": 0.5}) for c in cells[::2]]
    (axes,) = dict(figures.figures([*cells, *third]))[
        "Accuracy against the target epsilon, with 95% intervals"
    ].axes
    (bars,) = axes.containers
    ends = np.concatenate(bars.lines[2][0].get_segments())[:, 1]
    group = [100 * c.result["accuracy"] for c in [*cells, *third] if c.epsilon == 2]
    assert len(group) == 3
    assert ends[1] - ends[0] == pytest.approx(2 * 4.3027 * np.std(group, ddof=1) / 3**0.5, rel=1e-4)
    (axes,) = pictures["Accuracy against steps at epsilon 2"].axes
    assert len(axes.lines) == 2, "and the one without a budget beside it"
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [2, 4, 6]
    (axes,) = pictures["Accuracy over holders: median, 5% to 95%"].axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["central, 2", "central, 20", "nonprivate"]
    assert "Cost of one run" not in pictures, "all send as many bytes: the table of costs says their seconds"
    trust = {**cells[0].result["trust"], "bytes_per_holder": 5000}
    kilobytes = cells[-1].result["trust"]["bytes_per_holder"] / 1e3
    dearer = [dataclasses.replace(cells[0], variant="central", result={**cells[0].result, "trust": trust})]
    (axes,) = dict(figures.figures([*dearer, *cells[1:]]))["Cost of one run"].axes
    assert [float(points.get_offsets()[0][0]) for points in axes.collections] == [5.0, kilobytes]
    legend = axes.get_legend()
    assert legend is not None
    assert {t.get_text() for t in legend.get_texts()} == {"central", "nonprivate"}


@pytest.mark.parametrize(
    "name",
    ["中文 设置", "🙂", "العربية", "$5 and $6", r"$\bad{$", "a $x^2$ b", "_hidden", "a_b^c", "<b>&amp;"],
)
def test_any_name_stands_on_every_plot_as_it_is_written(
    name: str, finished: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """As text, which the reader's own fonts show: no formula, and no word on fonts that are missing here."""
    held = json.loads((finished / "cells.json").read_text())
    cells = [Cell(**{**one, "variant": one["variant"].replace("central", name)}) for one in held]
    drawn = figures.figures(cells)
    assert len(drawn) == 4
    for caption, figure in drawn:
        text = " ".join(re.findall(r">([^<>]+)</(?:text|tspan)>", figures.svg(figure, caption)))
        assert name in html.unescape(text), caption
    assert [str(warning.message) for warning in recwarn] == []


def test_public_only_runs_are_reported_without_the_spread_over_holders(finished: Path) -> None:
    cells = [Cell(**held) for held in json.loads((finished / "cells.json").read_text())]
    for cell in cells:
        cell.result["holder_scores"] = {}
    assert {row["holders' scores, 5% to 95%"] for row in table(cells)} == {"not computed"}
    assert page(cells, About("t")).count("<svg") == 3


def test_a_finished_comparison_becomes_a_result_file(
    kept: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, runs = kept
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "main", lambda given: given)
    assert compared.main([source, "--out", str(runs)]) == []
    assert capsys.readouterr().err.count("finished before") == 6
    held = json.loads((tmp_path / "results" / "holders.json").read_text())
    assert set(held) == {
        "command",
        "commit",
        "hardware",
        "seeds",
        "seconds",
        "findings",
        "rows",
        "note",
        "cells",
        "search",
    }
    assert held["command"] == f"fedsim compare {source}"
    assert held["seeds"] == [0, 1]
    assert held["hardware"] == provenance.hardware()
    assert held["rows"] == list(
        csv.DictReader(io.StringIO((runs / "compare" / "tiny" / "table.csv").read_text()))
    )
    assert len(held["cells"]) == 6
    text = markers.fill(
        "a\n<!-- holders -->\nold\n<!-- end holders -->\nb",
        {"holders": report.PARTS["docs/comparisons.md"]["holders"]},
    )
    assert text.startswith("a\n<!-- holders -->\n* At epsilon 2, ")
    assert text.endswith("<!-- end holders -->\nb")
    assert "\nold\n" not in text
    assert held["rows"][0]["score"] in text
    assert "\n2 seeds, judged by public test data. " in text
    assert held["commit"] in text
    assert f"| {held['seconds'] / 60:.0f} | - |" in report.minutes()
    missing = report.PARTS["docs/comparisons.md"]["label-skew"]()
    assert "python -m benchmarks.compared label_skew" in missing


def test_a_table_is_made_of_its_own_runs_and_of_one_machine(
    kept: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, runs = kept
    one, other = sorted((runs / "compare" / "tiny" / "runs").iterdir())[:2]
    shutil.rmtree(other)
    compared.make(source, [], runs, search=False, results=tmp_path)
    assert capsys.readouterr().err.count("finished before") == 5, "what is missing is run"
    result = json.loads((one / "result.json").read_text())
    result["hardware"]["processor"] = "another"
    (one / "result.json").write_text(json.dumps(result))
    with pytest.raises(InputError, match="2 kinds of hardware"):
        compared.make(source, [], runs, search=False, results=tmp_path)


def test_what_a_search_cost_stays_with_the_settings_it_chose(tmp_path: Path) -> None:
    chosen = [Chosen("central", 2.0, ["optimizer.learning_rate=0.5"])]
    (tmp_path / "tuned.yaml").write_text(Tuned("t", "", "", 3, 100, [0], {}, chosen).write())
    wanted = compare.Comparison(tuned=str(tmp_path / "tuned.yaml"))
    before = tmp_path / "before.json"
    assert compared.known_search(wanted, before) is None
    trial = {"variant": "central", "epsilon": 2.0, "settings": ["optimizer.learning_rate=0.5"], "score": 0.5}
    before.write_text(json.dumps({"search": {"trials": [trial]}}))
    assert compared.known_search(wanted, before) == {"trials": [trial]}
    before.write_text(json.dumps({"search": {"trials": [{**trial, "settings": []}]}}))
    assert compared.known_search(wanted, before) is None, "of other settings"


def test_a_try_leaves_results_settings_and_pages_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a reduced comparison nor a reduced search comes in place of what was measured."""
    given = [s for s in SMALL if not s.startswith(("privacy.target", "privacy.noise"))]
    config, kept, runs = tmp_path / "configs", tmp_path / "results", tmp_path / "runs"
    for folder in ("compare", "tune", "tuned"):
        (config / folder).mkdir(parents=True)
    same = {"title": "t", "recipe": "base", "overrides": given, "epsilons": [2], "variants": {"a": []}}
    (config / "compare" / "tiny.yaml").write_text(
        yaml.safe_dump({**same, "seeds": [0], "tuned": "../tuned/tiny.yaml"})
    )
    search = {"trials": 2, "holdout_examples": 50, "space": {"train.ema_decay": [0.1, 0.3, 0.5]}}
    tuning = {"title": "t", "comparison": str(config / "compare" / "tiny.yaml"), **search}
    (config / "tune" / "tiny.yaml").write_text(yaml.safe_dump(tuning))
    (config / "tuned" / "tiny.yaml").write_text("as it was")
    kept.mkdir()
    (kept / "tiny.json").write_text("as it was")
    monkeypatch.setattr(tables, "RESULTS", kept)
    monkeypatch.setattr(compared, "CONFIG_DIR", config)
    monkeypatch.setattr(loading, "CONFIG_DIR", config)
    for name in ("base.yaml", "presets"):
        (config / name).symlink_to(CONFIG_DIR / name)
    monkeypatch.setattr(report, "main", lambda given: pytest.fail("the pages are not written"))
    words = ["tiny", "--search", "--out", str(runs), "--set", "train.steps=2"]
    assert compared.main(words) == 0
    assert f"stay as they are: this went to {runs / 'results'}" in capsys.readouterr().out
    assert (config / "tuned" / "tiny.yaml").read_text() == (kept / "tiny.json").read_text() == "as it was"
    chosen = (runs / "results" / "tiny.tuned.yaml").read_text()
    assert chosen.startswith("# Written by `fedsim tune tune/tiny train.steps=2`.")
    held = json.loads((runs / "results" / "tiny.json").read_text())
    assert held["search"]["command"] == "fedsim tune tune/tiny train.steps=2"
    assert held["command"] == "fedsim compare compare/tiny train.steps=2"
    (run,) = (runs / "compare" / "t" / "runs").iterdir()
    (entry,) = Tuned.read(runs / "results" / "tiny.tuned.yaml").chosen
    assert f"ema_decay: {entry.settings[0].partition('=')[2]}" in (run / "config.yaml").read_text()
    assert compared.main([*words, "--results", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "tiny.json").is_file()
    assert compared.main([*words, "--results", str(kept)]) == 2
    assert "another folder than results/" in capsys.readouterr().err
    monkeypatch.setattr(report, "main", lambda given: 0)
    (config / "tune" / "tiny.yaml").rename(config / "tune" / "other.yaml")
    shutil.copy(runs / "results" / "tiny.tuned.yaml", config / "tuned" / "tiny.yaml")
    (kept / "tiny.json").unlink()
    assert compared.main(["tiny", "--search", "--out", str(runs)]) == 0
    assert "no configs/tune/tiny.yaml says how to search" in capsys.readouterr().out
    assert (kept / "tiny.json").is_file(), "without --set it is the result"


def test_what_a_search_left_open_stands_beside_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budgets that were not tuned, settings at an edge, and no budgets at all."""
    entries = [
        Chosen("a", 1.0, ["x=1"], 0.5, ["optimizer.learning_rate"]),
        Chosen("a", 8.0, ["x=2"], 0.5, ["optimizer.learning_rate", "privacy.clip_norm"]),
        Chosen("b", None, ["x=3"], 0.5, ["privacy.clip_norm"]),
    ]
    tuned = Tuned("t", "base", "", 3, 100, [0], {}, entries)
    asked = [("a", 0.5), ("a", 1.0), ("a", 6.0), ("b", None)]
    assert tuned.borrowed(asked) == (
        "Budgets that were not tuned have the settings of the nearest: 0.5 has those of 1, 6 has those of 8."
    )
    assert tuned.edges(asked) == (
        "At the edge of what was searched, beyond which better may lie: optimizer.learning_rate (a at "
        "epsilon 1, 8), privacy.clip_norm (a at epsilon 8; b)."
    )
    assert tuned.borrowed([("a", 1.0)]) == tuned.edges([]) == ""
    trials = [{"variant": e.variant, "epsilon": e.epsilon, "settings": e.settings} for e in entries]
    search = {"trials": trials, "seconds": 60, "holdout_examples": 2000, "command": "fedsim tune t"}
    held = {"cells": [{"variant": v, "epsilon": e} for v, e in asked]}
    (tmp_path / "tuned.yaml").write_text(tuned.write())
    known = compare.Comparison(recipe=str(CONFIG_DIR / "base.yaml"), tuned=str(tmp_path / "tuned.yaml"))
    monkeypatch.setattr(compare, "load", lambda name: known)
    said = report._search("n", {**held, "search": {**search, "epsilons": [1, 8]}})
    assert "for every variant at epsilon 1, 8, by 2,000 held-out" in said
    assert "Other budgets take the nearest. Epsilon does not count the search. At the edge of what" in said
    said = report._search("n", {**held, "search": {**search, "epsilons": []}})
    assert "for every variant, by 2,000 held-out" in said
    assert "budgets" not in said
    others = {**search, "epsilons": [], "trials": trials[:1]}
    assert "At the edge" not in report._search("n", {**held, "search": others}), "of another search"
    by_hand = {"search": None, "note": "Score. Tuned: by 3 trials."}
    assert "by hand, which the repository does not keep and no command" in report._search("n", by_hand)
    assert "that are not kept; `--search` chooses anew" in report._search("holders", by_hand)
    assert "not searched for each row" in report._search("n", {**by_hand, "note": "Score."})


def scored(variant: str, *scores: float) -> list[dict[str, Any]]:
    """As result files keep them."""
    about = {"variant": variant, "epsilon": 1.0, "seconds": 60.0, "commit": "c"}
    return [{**about, "seed": seed, "accuracy": score} for seed, score in enumerate(scores)]


def test_the_matrix_says_how_its_settings_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [{"variant": "a", "epsilon": 2.0}] * 3
    search = {"trials": trials, "holdout_examples": 2000, "seconds": 120.0}
    held = {"seeds": [0, 1, 2], "cells": scored("a", 0.8, 0.81, 0.82), "search": search}
    monkeypatch.setattr(report, "load", lambda name: held)
    said = report.matrix("n")
    assert "the best of 3 trials a variant and budget on 2,000 held-out" in said
    assert "(3 runs, 2 minutes), which epsilon does not count. Budgets that" in said
    assert "1 has those of 2." in said
    held["search"] = None
    assert "trials" not in report.matrix("n")


def tuned_by(tiny: Path, entries: list[Chosen], **wrong: str) -> compare.Comparison:
    """The comparison with these settings, as a search of its recipe would have chosen them."""
    recipe = compare.load(tiny).recipe
    names = {"recipe": recipe_name(recipe), "recipe_digest": recipe_digest(recipe), **wrong}
    held = Tuned("t", trials=3, held_out_examples=100, seeds=[0], chosen=entries, **names)
    (tiny.parent / "tuned.yaml").write_text(held.write())
    if "tuned:" not in tiny.read_text():
        tiny.write_text(f"{tiny.read_text()}tuned: tuned.yaml\n")
    return compare.load(tiny)


def test_a_variant_with_a_budget_of_its_own_has_the_settings_of_the_nearest(tiny: Path) -> None:
    rates = [Chosen("own", epsilon, [f"optimizer.learning_rate={epsilon}"]) for epsilon in (0.2, 8.0)]
    known = yaml.safe_load(tiny.read_text())
    known["variants"] = {"own": ["privacy.target_epsilon=6"]}
    tiny.write_text(yaml.safe_dump(known))
    wanted = tuned_by(tiny, rates)
    planned = compare.cells(wanted, [])
    assert {cell.config.optimizer.learning_rate for cell in planned} == {8.0}
    assert {cell.epsilon for cell in planned} == {None}
    assert "6 has those of 8" in compare._chosen(wanted, planned)
    known["variants"] = {"own": ["preset=nonprivate", "privacy.target_epsilon=null"]}
    tiny.write_text(yaml.safe_dump(known))
    with pytest.raises(InputError, match=r"tuned at the budgets 0\.2, 8, and has none here"):
        compare.cells(tuned_by(tiny, rates), [])
    one = tuned_by(tiny, rates[:1])
    assert {cell.config.optimizer.learning_rate for cell in compare.cells(one, [])} == {0.2}


def test_settings_that_were_chosen_for_another_recipe_are_refused(tiny: Path) -> None:
    known = yaml.safe_load(tiny.read_text())
    entries = [Chosen(name, None, []) for name in known["variants"]]
    wanted = tuned_by(tiny, entries, recipe_digest="of another time")
    assert "was changed since its settings were chosen" in compare._chosen(wanted, compare.cells(wanted, []))
    assert "was changed" not in compare._chosen(tuned_by(tiny, entries), [])
    for other in ("quickstart/not", ""):
        with pytest.raises(InputError, match=r"settings chosen for .*, the recipe they are used with, got"):
            compare.cells(tuned_by(tiny, entries, recipe=other), [])


def test_what_was_another_setting_in_the_search_is_told_with_whose(tiny: Path) -> None:
    """Of files, variants and commands, which may have changed since; not of what is said elsewhere."""
    known = yaml.safe_load(tiny.read_text())
    given = known["overrides"]
    entries = [Chosen("central", 2.0, ["train.ema_decay=0.5"]), Chosen("nonprivate", None, [])]
    held = {"central": [*given, "data.holdout_examples=50", "seed=9"], "nonprivate": [*given]}
    held["nonprivate"] += known["variants"]["nonprivate"]

    def said(*overrides: str, **changed: list[str]) -> str:
        wanted = tuned_by(tiny, entries, searched={**held, **changed})
        return compare._chosen(wanted, compare.cells(wanted, list(overrides)), list(overrides))

    assert said().startswith("Budgets that were not tuned"), "nothing else is told"
    assert said("federation.nodes=1").startswith("Budgets that"), "it changes no result"
    assert said("train.ema_decay=0.1").startswith("In the search train.ema_decay was 0, not 0.1 (nonprivate)")
    assert said("train.steps=7").startswith("In the search train.steps was 6, not 7. ")
    shares = said(central=[*given, "strategy=shares"])
    assert shares.startswith("In the search strategy.name was shares, not central (central). ")
    other = said(central=[*given, "train.steps=5"], nonprivate=[*held["nonprivate"], "train.steps=8"])
    assert other.startswith("In the search train.steps was another one. ")
    entries = [Chosen("central", None, []), Chosen("nonprivate", None, [])]
    at_one = said(central=[*given, "privacy.target_epsilon=20"])
    assert at_one == "In the search privacy.target_epsilon was 20, not 2 (central)."


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ((0.0,), "epsilon of 'central' must be a positive"),
        ((-1.0, 2.0), "epsilon of 'central' must be a positive"),
        ((2.0, 2.0), "several for 'central' at epsilon 2.0"),
        ((None, None), "several for 'central' at epsilon None"),
    ],
)
def test_chosen_settings_that_are_of_no_budget_or_of_one_twice_are_refused(
    budgets: tuple[float | None, ...], message: str, tiny: Path
) -> None:
    with pytest.raises(InputError, match=message):
        compare.cells(tuned_by(tiny, [Chosen("central", epsilon, []) for epsilon in budgets]), [])


def test_what_a_recipe_is_called_and_what_it_sets(tmp_path: Path) -> None:
    """By its place among configurations; by its settings, in any order, but for free ones."""
    assert recipe_name(str(loading.find("smoke/dp_ls"))) == "smoke/dp_ls"
    own = tmp_path / "mine.yaml"
    found = []
    for text in (
        "train: {steps: 7, expected_batch_size: 50}",
        "title: x\ntrain: {expected_batch_size: 50, steps: 7}\nfederation: {nodes: 1}",
        "train: {steps: 8, expected_batch_size: 50}",
    ):
        own.write_text(text)
        found.append(recipe_digest(str(own)))
    assert recipe_name(str(own)) == "mine"
    assert found[0] == found[1] != found[2]


def test_the_page_of_a_tuned_comparison_says_what_its_search_left_open(tiny: Path) -> None:
    entries = [
        Chosen("central", 20.0, ["train.ema_decay=0.5"], 0.5, ["train.ema_decay"]),
        Chosen("nonprivate", None, []),
    ]
    wanted = tuned_by(tiny, entries)
    planned = compare.cells(wanted, [])
    said = compare._chosen(wanted, planned)
    assert "2 has those of 20" in said
    assert "train.ema_decay (central at epsilon 20)" in said
    assert compare._chosen(compare.Comparison(), planned) == ""
    out = tiny.parent / "out"
    assert command(["compare", str(tiny), "--out", str(out), "train.steps=2"]) == 0
    for name in ("report.html", "table.md"):
        assert said in (out / name).read_text(), name


def test_unequal_numbers_of_trials_are_told_with_whose_they_were() -> None:
    def cell(variant: str, epsilon: float | None, how: str) -> Cell:
        headline = {"name": "accuracy", "unit": "%", "higher_is_better": True}
        result = {"tuning": how, "code_hash": "h", "commit": "c", "epsilon": {}, "headline": headline}
        return Cell(variant, epsilon, 0, result, [], [], False)

    alike = [cell("a", 1, "12 trials"), cell("b", 1, "12 trials")]
    assert note(alike).endswith(" Tuned: 12 trials.")
    unequal = [*alike, cell("old, one", 1, "200 trials"), cell("old, one", 8, "200 trials")]
    assert note(unequal).endswith(" Tuned, a; b: 12 trials. Tuned, old, one: 200 trials.")
    partly = [*alike, cell("b", 8, "14 trials"), cell("c", None, "")]
    assert note(partly).endswith(
        " Tuned, a; b at epsilon 1: 12 trials. Tuned, b at epsilon 8: 14 trials. Of c no search is known."
    )
    assert "uned" not in note([cell("a", 1, "")])


def test_a_result_of_another_shape_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every part of every page: it names the file and what it lacks. That of mistakes has no result."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setitem(report.PARTS["docs/mistakes.md"], "mistakes", str)
    for name in [path.name for path in (CONFIG_DIR.parent / "results").glob("*.json")]:
        (tmp_path / name).write_text('{"kind": "odd", "search": null}')
    for parts in report.PARTS.values():
        for make in parts.values():
            with contextlib.suppress(InputError):
                make()  # and not with a KeyError
    assert report.main(["--check"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"/\w+\.json: a result of this kind must hold '\w+' beside kind, search", said)
    for content in ("[]", "{"):
        (tmp_path / "trust_models.json").write_text(content)
        assert report.main(["--check"]) == 2
        assert "trust_models.json: " in capsys.readouterr().err
    (tmp_path / "trust_models.json").write_text('{"cells": 5}')
    assert report.main(["--check"]) == 2
    assert "trust_models.json" in capsys.readouterr().err


def test_every_generated_table_has_its_place_and_its_comparison() -> None:
    root = CONFIG_DIR.parent
    for name, parts in report.PARTS.items():
        text = (root / name).read_text()
        for part in parts:
            assert text.count(f"<!-- {part} -->") == text.count(f"<!-- end {part} -->") == 1
    placed = {p.replace("-", "_") for p in report.PARTS["docs/comparisons.md"]} | {
        "trust_models",
        "heads_trust",
    }
    assert placed - {"minutes"} == set(compared.names()) == {path.stem for path in SHIPPED} - {compared.FIRST}


def test_shipped_comparisons_cover_what_they_say() -> None:
    def cells(name: str) -> list[compare.Planned]:
        return cells_of(CONFIG_DIR / "compare" / f"{name}.yaml")

    holders = {c.config.federation.holders for c in cells("holders")}
    assert holders == {10, 100, 1000, 10000}
    dropouts = cells("dropout_rates")
    rates = {c.config.strategy.options.get("dropout_rate", 0.0) for c in dropouts}
    assert rates == {0.0, 0.1, 0.15}
    assert {c.config.method() for c in dropouts} == {"central_dpsgd", "shares_dpsgd"}
    releases = {
        c.config.train.steps * c.config.strategy.options.get("local_steps", 1) for c in cells("local_steps")
    }
    assert releases == {60}, "the same noise in all of them"
    trust = {c.config.method() for c in cells("trust_models")}
    assert trust >= {"central_dpsgd", "shares_dpsgd", "local_dpsgd", "nonprivate"}
