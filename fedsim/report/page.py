"""The page of a comparison: one file that any browser shows without a network, and that prints."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedsim.report import claim, figures, markers
from fedsim.report.cells import Cell, Group, groups
from fedsim.report.findings import findings, promise
from fedsim.report.table import COSTS, RESULTS, costs, note, table

STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --quiet: #595959; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --quiet: #a6a6a6; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem; }
.lead { font-size: 1.25rem; max-width: 48rem; }
ul.lead { font-size: 1.1rem; padding-left: 1.2em; } li, dd, p { max-width: 48rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; break-inside: avoid; } figure svg { width: 100%; height: auto; }
figure svg text { fill: currentColor; } figcaption, .quiet { color: var(--quiet); font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3em .6em; text-align: left; vertical-align: top; }
dt { font-weight: 600; margin-top: .6em; } dd { margin-left: 0; }
body { overflow-wrap: break-word; } code { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class About:
    """What a comparison was asked to do.

    Attributes:
        title: heading of the page.
        recipe: configuration every cell starts from.
        overrides: "key=value" strings for all cells.
        command: what makes the page again.
        runs: how many there are to be; None: those that are there.
        chosen: what is to be known of settings that a search chose, in sentences.
        left_out: runs without a score, which are left out: name and why, such as "diverged".
        inputs: whose models see other inputs of the judged examples, in a sentence.
        taken_up: which runs were finished before by other settings than were asked for, in a sentence.
    """

    title: str
    recipe: str = ""
    overrides: Sequence[str] = field(default_factory=tuple)
    command: str = ""
    runs: int | None = None
    chosen: str = ""
    left_out: Sequence[tuple[str, str]] = field(default_factory=tuple)
    inputs: str = ""
    taken_up: str = ""

    def below(self, note: str) -> str:
        """Return what stands below the table: the note, and what is to be known beside it."""
        return " ".join(filter(None, (note, self.inputs, self.chosen)))


def page(cells: Sequence[Cell], about: About) -> str:
    """Return the page: what came out, plots, promises, costs, the table, and how it was made."""
    found, rows = groups(cells), table(cells)
    found_out = findings(cells)
    plots = "".join(
        f"<figure>{figures.svg(figure, caption)}<figcaption>{_text(caption)}</figcaption></figure>"
        for caption, figure in figures.figures(cells)
    )
    promises = "".join(f"<dt>{_text(_name(group))}</dt><dd>{_text(promise(group))}</dd>" for group in found)
    read = about.below(note(cells))
    title = _text(about.title or "Comparison")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{_warned(cells, about)}"
        + (
            f'<p class="lead">{_text(found_out[0])}</p>'
            if len(found_out) == 1
            else f'<ul class="lead">{"".join(f"<li>{_text(line)}</li>" for line in found_out)}</ul>'
        )
        + f'<section class="plots">{plots}</section>'
        + f"<h2>What each row promises</h2><dl>{promises}</dl>"
        + f"<h2>Costs</h2>{_table(COSTS, costs(cells))}"
        + f"<h2>Results</h2>{_table(RESULTS, rows)}<p class='quiet'>{_text(read)}</p>"
        + f"<h2>How it was made</h2><dl>{_made(cells, about)}</dl></body></html>\n"
    )


def _warned(cells: Sequence[Cell], about: About) -> str:
    return "".join(f"<p><strong>{_text(line)}</strong></p>" for line in missing(cells, about))


def missing(cells: Sequence[Cell], about: About) -> list[str]:
    """Return a sentence for runs that are not there yet, and one for each reason of being left out."""
    lines = []
    if about.runs not in (None, len(cells) + len(about.left_out)):
        lines.append(f"Unfinished: {len(cells)} of {about.runs} runs are there.")
    reasons: dict[str, list[str]] = {}
    for name, why in about.left_out:
        reasons.setdefault(why, []).append(name)
    lines += [f"{why[:1].upper()}{why[1:]}, and left out: {'; '.join(n)}." for why, n in reasons.items()]
    return lines


def _made(cells: Sequence[Cell], about: About) -> str:
    results, found = [cell.result for cell in cells], groups(cells)
    facts = [
        ("Command", [about.command]),
        ("Taken up", [about.taken_up]),
        ("Recipe and settings of all rows", [about.recipe, *about.overrides]),
        *(
            (f"Settings of {_name(group)}{of}", list(settings))
            for group in found
            for of, settings in _settings(group)
        ),
        ("Seeds", [", ".join(str(seed) for seed in sorted({cell.seed for cell in cells}))]),
        ("Epsilon", list(dict.fromkeys(map(_basis, found)))),
        ("Machine", list(dict.fromkeys(markers.machine(r["hardware"]) for r in results))),
        ("Commit", list(dict.fromkeys(r["commit"] for r in results))),
    ]
    return "".join(
        f"<dt>{_text(name)}</dt><dd>{' '.join(f'<code>{_text(line)}</code>' for line in lines)}</dd>"
        for name, lines in facts
        if any(lines)
    )


def _basis(group: Group) -> str:
    spent = group.claimed
    return f"at {claim.delta(spent)}, {spent['relation']}, {spent['accountant']}" if spent else ""


def _settings(group: Group) -> list[tuple[str, tuple[str, ...]]]:
    """Settings of a row's runs, with whose they are where the runs do not have the same."""
    found: dict[tuple[str, ...], list[int]] = {}
    for cell in group.cells:
        found.setdefault(tuple(cell.settings), []).append(cell.seed)
    if len(found) == 1:
        return [("", one) for one in found]
    return [(f", seed {', '.join(map(str, sorted(seeds)))}", one) for one, seeds in found.items()]


def _table(columns: Sequence[str], rows: Sequence[dict[str, str]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(row[column])}</td>" for column in columns) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _name(group: Group) -> str:
    return group.variant if group.epsilon is None else f"{group.variant}, epsilon {group.epsilon:g}"


def _text(value: str) -> str:
    return html.escape(value)
