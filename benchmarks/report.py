"""Write the generated parts of README.md and docs/ from results/*.json and from the code.

    python -m benchmarks.report [--check]

Nothing between `<!-- NAME -->` and `<!-- end NAME -->` is typed by hand. --check changes nothing and exits 1
when a file is out of date.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import by_seed, captioning_table, heads_table, mistakes, pictures, tables, tuning
from benchmarks.tables import load
from fedsim import api, presets
from fedsim.config import CONFIG_DIR
from fedsim.report.markers import Parts, missing, provenance, table, update
from fedsim.report.table import RESULTS
from fedsim.strategies import STRATEGIES
from fedsim.study import compare, unlike
from fedsim.study.tuned import Chosen, Tuned
from fedsim.validate import FedsimError, InputError

ROOT = Path(__file__).resolve().parents[1]


def trust_models() -> str:
    """One row for each trust model of fedsim's, from what its class says."""
    rows = []
    for name, cls in STRATEGIES.own().items():
        sent = cls.sent.format(what="contributions")
        rows.append([f"`{name}`", cls.trusted, sent, cls.noise_added, cls.dropout_policy])
    return table(["strategy", "who is trusted", "what is sent", "where noise is added", "dropouts"], rows)


@functools.cache  # it follows from the code alone, and takes seconds
def noise(name: str) -> str:
    """Noise multiplier and accountant of each variant of a comparison that protects examples, by budget."""
    wanted = compare.load(f"compare/{name}")
    one = dataclasses.replace(wanted, seeds=wanted.seeds[:1])
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in compare.cells(one, []):
        plan = api.check(cell.config)
        if cell.epsilon is not None and plan["unit"] == "example":
            accountant = plan["epsilon"]["example"]["accountant"]
            rows.setdefault((cell.variant, accountant), []).append(f"{plan['noise_multiplier']:.4g}")
    titles = ["variant", "accountant", *(f"epsilon {epsilon:g}" for epsilon in wanted.epsilons)]
    return table(titles, [[*key, *values] for key, values in rows.items()])


def methods() -> str:
    """One row for each file in configs/presets/: what it picks, and its own first words."""
    rows = []
    for name in presets.names(CONFIG_DIR):
        held = presets.content(name, CONFIG_DIR)
        chosen = [_choice(held[axis]) for axis in presets.AXES]
        said = (CONFIG_DIR / presets.FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        about = " ".join(line[1:].strip() for line in said if line.startswith("#"))
        rows.append([f"`{name}`", *chosen, about])
    return table(["preset", *presets.AXES, "what it is"], rows)


def _choice(choice: Any) -> str:
    """Return a choice as text: its name, with the options it has."""
    if isinstance(choice, str):
        return f"`{choice}`"
    options = ", ".join(f"{key}: {value}" for key, value in choice.options.items())
    return f"`{choice.name}` ({options})"


HOLDERS = "holders' scores, 5% to 95%"
COSTS = ("bytes per holder and step", "messages per step", "seconds")


def comparison(name: str, more: Sequence[str] = ()) -> str:
    """What configs/compare/NAME.yaml said when it was last run: sentences, then the table."""
    held = load(f"{name}.json")
    if held is None:
        return missing(f"python -m benchmarks.compared {name}", f"{name}.json")
    columns = [*RESULTS, *more]
    said = "\n".join(f"* {sentence}" for sentence in held["findings"])
    rows = [[row[column] for column in columns] for row in held["rows"]]
    note = f"{held['note']}\n{_search(name, held)}"
    return f"{said}\n\n{table(columns, rows)}\n{note}{provenance(held)}"


def matrix(name: str) -> str:
    """The scores of a comparison, a row a variant and a column a budget."""
    held = load(f"{name}.json")
    if held is None:
        return missing(f"python -m benchmarks.compared {name}", f"{name}.json")
    budgets = sorted({cell["epsilon"] for cell in held["cells"] if cell["epsilon"] is not None})
    rows = [
        [
            variant,
            *(
                by_seed.with_interval(scores) if scores else ""
                for budget in budgets
                for scores in [by_seed.of(held, variant, budget)]
            ),
        ]
        for variant in dict.fromkeys(cell["variant"] for cell in held["cells"])
        if by_seed.of(held, variant, budgets[0])
    ]
    free = [
        f"{variant} {by_seed.with_interval(scores)}"
        for variant in dict.fromkeys(cell["variant"] for cell in held["cells"])
        if (scores := by_seed.of(held, variant, None))
    ]
    note = (
        f"\nTest accuracy (%), mean over {len(held['seeds'])} seeds ± half its 95 % interval. No budget: "
        f"{', '.join(free)}.{_tried(held)}\n"
    )
    return table(["variant", *(f"epsilon {budget:g}" for budget in budgets)], rows) + note


def _tried(held: dict[str, Any]) -> str:
    """How the settings of a comparison's rows were chosen, in short, and which budgets borrow them."""
    if (search := held.get("search")) is None:
        return ""
    tried = [(trial["variant"], trial["epsilon"]) for trial in search["trials"]]
    entries = [Chosen(variant, epsilon) for variant, epsilon in dict.fromkeys(tried)]
    borrowed = Tuned(chosen=entries).borrowed((cell["variant"], cell["epsilon"]) for cell in held["cells"])
    return (
        f" Settings of each: the best of {len(tried) // len(entries)} trials a variant and budget on "
        f"{search['holdout_examples']:,} held-out training examples ({len(tried)} runs, "
        f"{search['seconds'] / 60:.0f} minutes), which epsilon does not count. {borrowed}"
    ).rstrip()


def records(page: str) -> str:
    """What the prior from random images reaches on Fashion-MNIST, by budget, with a link to its table.

    Args:
        page: the path of docs/comparisons.md from where the sentence stands.
    """
    held = load("fashion_records.json")
    if held is None:
        return missing("python -m benchmarks.compared fashion_records", "fashion_records.json")
    plain, prior = dict.fromkeys(cell["variant"] for cell in held["cells"])
    told = []
    for row in held["rows"]:
        if row["variant"] == prior:
            budget = row["epsilon per example"]
            told.append(f"{row['score']} at epsilon {budget}, {row['against the row above']}")
    return (
        f"Full Fashion-MNIST without public data, {prior} (`de2022/fashion_prior`), and what it is above "
        f"{plain} (`de2022/fashion_cpu`): {'; '.join(told)}. {len(held['seeds'])} seeds: "
        f"[the table, and how settings were chosen]({page}#a-prior-from-images-of-random-processes).\n"
    )


def odds() -> str:
    """What the best attack knows at an epsilon, without delta (Wasserman, Zhou 2010; Kairouz et al. 2015)."""
    rows = []
    for epsilon in (0.1, 0.5, 1.0, 2.0, 3.0, 8.0):
        factor = math.exp(epsilon)
        sure = factor / (1 + factor)
        found = min(factor * 0.01, 1 - 0.99 / factor)
        rows.append([f"{epsilon:g}", f"{100 * sure:.4g} %", f"{100 * found:.3g} of 100"])
    titles = [
        "epsilon",
        "he thought even odds: then he is at most so sure that you were in",
        "he may accuse 1 of 100 wrongly: then he finds at most so many who were in",
    ]
    return table(titles, rows)


def _search(name: str, held: dict[str, Any]) -> str:
    """What the search for a comparison's settings cost, and what it chose at an edge, or why that is not
    known."""
    search = held.get("search")
    if search is None and " Tuned" not in held["note"]:
        return (
            "\nSettings: those of the recipe and of each row's line in the file, not searched for each row: "
            "what a difference owes to settings is not known.\n"
        )
    if search is None:
        how = "made by hand, which the repository does not keep and no command repeats"
        if (CONFIG_DIR / "tune" / f"{name}.yaml").is_file():
            how = "that are not kept; `--search` chooses anew"
        return f"\nSettings: chosen by trials {how}. Epsilon does not count them.\n"
    rows = len({(trial["variant"], trial["epsilon"]) for trial in search["trials"]})
    budgets = ", ".join(f"{epsilon:g}" for epsilon in search["epsilons"])
    at, others = (f" at epsilon {budgets}", " Other budgets take the nearest.") if budgets else ("", "")
    cost = f"{len(search['trials'])} runs, {search['seconds'] / 60:.0f} minutes"
    return (
        f"\nSettings: the best of {len(search['trials']) // rows} trials for every variant{at}, "
        f"by {search['holdout_examples']:,} held-out training examples (`{search['command']}`: "
        f"{cost}).{others} Epsilon does not count the search.{_left_open(name, held)}\n"
    )


def _left_open(name: str, held: dict[str, Any]) -> str:
    """What was another setting in the search, and what it chose at the edge of its space, if the settings of
    today came from it."""
    wanted = compare.load(f"compare/{name}")
    if wanted.tuned is None:
        return ""
    chosen = Tuned.read(Path(wanted.tuned))
    if not chosen.came_of(held["search"]["trials"]):
        return ""
    planned = [(cell.variant, cell.config) for cell in compare.cells(wanted, [])]
    edges = chosen.edges((cell["variant"], cell["epsilon"]) for cell in held["cells"])
    said = (unlike.sentence(chosen, wanted.recipe, planned), edges)
    return "".join(f" {one}" for one in said if one)


OTHERS = {
    "heads.json": "`python -m benchmarks.heads --json results/heads.json` ([private heads](heads.md))",
    "captioning_law.json": "`python -m benchmarks.captioning_law` ([captioning](captioning.md))",
}
"""Commands of tables on other pages, whose result files hold seconds of every run."""


def minutes() -> str:
    """What each comparison takes, one command each, from the seconds of its runs and of its search."""
    rows, trained, searched = [], 0.0, 0.0
    for path in sorted((CONFIG_DIR / "compare").glob("*.yaml")):
        held = load(f"{path.stem}.json")
        if held is not None:
            runs, search = held["seconds"] / 60, held.get("search")
            chosen = 0.0 if search is None else search["seconds"] / 60
            trained, searched = trained + runs, searched + chosen
            command = f"`python -m benchmarks.compared {path.stem}`"
            rows.append([command, f"{len(held['cells'])}", f"{runs:.0f}", f"{chosen:.0f}" if search else "-"])
    total = (
        "\nMinutes add up the seconds of the runs, each from its first step to its result; start-up, "
        "fetching data and computing features ahead are not among them. All of `benchmarks.compared` "
        f"together: {(trained + searched) / 60:.1f} hours of one core, {trained / 60:.1f} of the runs, which "
        f"`python -m benchmarks.compared` makes, and {searched / 60:.1f} of the searches, which it makes too "
        "with `--search`. On two cores, two commands beside each other, each with half of the names, take "
        "about half of that.\n"
    )
    for name, about in OTHERS.items():
        if (held := load(name)) is not None:
            spent = held.get("seconds", sum(row["seconds"] for row in held["rows"])) / 60
            rows.append([about, f"{len(held['rows'])}", f"{spent:.0f}", "-"])
    return table(["command", "runs", "minutes", "minutes of the search (`--search`)"], rows) + total


BATCH = "an eighth of the batch, same steps"
ALSO_END_TO_END = (
    ("constant learning rate", "the recipe"),
    ("without momentum", "the recipe"),
    (BATCH, "the recipe"),
    ("group normalisation", "the recipe"),
    ("group normalisation, standardised weights", "the recipe"),
    ("group normalisation, standardised weights", "group normalisation"),
    ("crops and flips, one view", "the recipe"),
    ("crops and flips, four views", "the recipe"),
    ("crops and flips, one view", BATCH),
    ("crops and flips, four views", BATCH),
)
"""Of each pair, the later row of the table first."""
ALSO_DEEPER = (("without normalisation", "the network"), ("crops and flips, one view", "the network"))

PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "trust-matrix": lambda: matrix("trust_models"),
        "records": lambda: records("docs/comparisons.md"),
    },
    "docs/results.md": {"records": lambda: records("comparisons.md")},
    "docs/trust_models.md": {
        "trust-models": trust_models,
        "methods": methods,
        "trust-noise": lambda: noise("trust_models"),
        "trust-comparison": lambda: comparison("trust_models"),
    },
    "docs/data_owners.md": {"odds": lambda: odds()},
    "docs/comparisons.md": {
        "minutes": minutes,
        "holders": lambda: comparison("holders", [HOLDERS]),
        "holders-law": by_seed.holders_law,
        "label-skew": lambda: comparison("label_skew", [HOLDERS]),
        "sizes": lambda: comparison("sizes", [HOLDERS]),
        "dropout-rates": lambda: comparison("dropout_rates", [*COSTS, "survivors needed"]),
        "offline-holders": lambda: comparison("offline_holders", [HOLDERS]),
        "local-steps": lambda: comparison("local_steps", [HOLDERS]),
        "fashion-records": lambda: comparison("fashion_records"),
        "end-to-end": lambda: by_seed.ablation("end_to_end", ALSO_END_TO_END),
        "deeper": lambda: by_seed.ablation("deeper", ALSO_DEEPER),
        "kurakin-law": lambda: comparison("kurakin_law"),
    },
    "docs/layers.md": {
        "layers": lambda: tables.layers("layers.json"),
        "bound": lambda: tables.bound("bound.json"),
        "bound-reduced": lambda: tables.bound("bound_reduced.json"),
    },
    "docs/benchmarks.md": {
        "gradients-cpu": lambda: tables.gradients("gradients_cpu.json"),
        "gradients-cpu-readings": lambda: tables.readings("gradients_cpu.json"),
        "gradients-cpu-as-installed": lambda: tables.gradients("gradients_cpu_as_installed.json"),
        "memory-cpu": lambda: tables.memory("memory_cpu.json"),
        "versions-cpu": lambda: tables.versions("versions_cpu.json"),
        "captioner-cpu": lambda: tables.captioner("captioner_cpu.json"),
        "launches": lambda: tables.launches("launches.json"),
        "gradients-gpu": lambda: tables.gradients("gradients_gpu.json"),
        "memory-gpu": lambda: tables.memory("memory_gpu.json"),
        "rounds-cpu": lambda: tables.rounds("rounds_cpu.json"),
    },
    "docs/heads.md": {
        "heads": heads_table.heads,
        "heads-laws": heads_table.laws,
        "head-costs": heads_table.costs,
        "compare-heads": lambda: comparison("heads_trust", COSTS),
    },
    "docs/captioning.md": {"captioning-law": captioning_table.law},
    "docs/pictures.md": {"streaming": lambda: tables.streaming("streaming.json")},
    "docs/guarantees.md": {"planted-defects": lambda: planted_defects()},
    "docs/tuning.md": {"search-price": tuning.price, "tuning-cost": tuning.page},
    "docs/mistakes.md": {"mistakes": mistakes.page},
}


def planted_defects() -> str:
    """By test file: what it guarantees, in its own first sentence, and the planted defects it caught."""
    held = load("planted.json")
    if held is None:
        return missing("python -m benchmarks.planted", "planted.json")
    caught: dict[str, list[str]] = {}
    for row in held["defects"]:
        verdict = row["name"] if row["caught"] else f"{row['name']} (NOT CAUGHT)"
        caught.setdefault(row["test"].split("::")[0], []).append(verdict)
    rows = [
        [_first_sentence(ROOT / path), f"[`{path}`](../{path})", "<br>".join(sorted(names))]
        for path, names in sorted(caught.items())
    ]
    count = f"\n{held['caught']} of {held['planted']} planted defects caught.\n"
    return table(["guarantee", "test", "defects planted"], rows) + count + provenance(held)


def _first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, without its full stop."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"\.(?:\s|$)", " ".join(said.split()), maxsplit=1)[0]


def _guarded(files: Mapping[str, Parts]) -> dict[str, Parts]:
    """Return what makes the parts, where a result of another shape is an error that names the files read."""

    def guarded(make: Callable[[], str]) -> Callable[[], str]:
        def made() -> str:
            with tables.reading() as read:
                try:
                    return make()
                except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
                    raise InputError(
                        f"{' or '.join(dict.fromkeys(map(str, read)))}: a result of another shape than its "
                        f"table needs ({type(error).__name__}: {error}). Make it again, or move it away."
                    ) from error

        return made

    return {name: {part: guarded(make) for part, make in parts.items()} for name, parts in files.items()}


# Not compared by --check: their bytes depend on the version of matplotlib.
PICTURES = {
    "docs/trust_models.svg": (["trust_models.json"], pictures.budgets),
    "docs/holders.svg": (["holders.json", "holders_law.json"], pictures.holders),
    "docs/kurakin_law.svg": (["kurakin_law.json"], pictures.batch_law),
    "docs/captioning_law.svg": (["captioning_law.json"], captioning_table.picture),
    "docs/heads.svg": (["heads.json"], heads_table.picture),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring all files up to date, or say which are not; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    try:
        written = update(ROOT, _guarded(PARTS), check=check)
        if not check:
            for name, (sources, draw) in PICTURES.items():
                held = [found for source in sources if (found := load(source)) is not None]
                if len(held) == len(sources):
                    pictures.write(draw(*held), ROOT / name)
    except FedsimError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"written: {', '.join(written)}" if written else "up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
