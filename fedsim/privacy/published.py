"""Privacy settings of published systems, and what our accountants say of them.

The table (published.csv) holds population, batch, steps, noise multiplier and delta of each setting, the
epsilon its authors state, and RDP and PLD values computed once with dp_accounting 0.6.0; a golden test
recomputes them. `source` and `status` say where a row was read and how far it is confirmed.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

import dp_accounting as dp

from fedsim.privacy import accountant, events
from fedsim.privacy.accountant import EpsilonResult

AGREEMENT = 0.02  # published epsilons are rounded to one or two digits


@dataclass(frozen=True)
class PublishedSetting:
    """One row of the table.

    Attributes:
        paper, setting: what it is.
        population, batch, steps: N, expected batch size, number of releases.
        noise_multiplier, delta: as published, derived or calibrated (see `status`).
        epsilon_published: None where the authors give none.
        epsilon_rdp, epsilon_pld: the golden values.
        neighbouring, source, status: relation and sampling; where it was read; how far it is confirmed.
    """

    paper: str
    setting: str
    population: int
    batch: int
    steps: int
    noise_multiplier: float
    delta: float
    epsilon_published: float | None
    epsilon_rdp: float
    epsilon_pld: float
    neighbouring: str
    source: str
    status: str

    @property
    def sampling_rate(self) -> float:
        """Return batch / population."""
        return self.batch / self.population

    @property
    def uses_objax(self) -> bool:
        """Return whether the authors accounted with Objax (Kurakin et al. 2022)."""
        return self.paper.startswith("Kurakin")

    def event(self) -> dp.DpEvent:
        """Return the event of all steps."""
        return events.composed(events.gaussian_step(self.noise_multiplier, self.sampling_rate), self.steps)


@dataclass(frozen=True)
class PublishedComparison:
    """A row with the epsilons computed now.

    `differs` is True where the published value is more than 2 % from what its authors' kind of accounting
    gives today (`rdp`, for Kurakin et al. also `rdp_objax`, the nearer of the two); `note` then says by how
    much, and always how far the row itself is confirmed.
    """

    row: PublishedSetting
    rdp: EpsilonResult
    pld: EpsilonResult
    rdp_objax: EpsilonResult | None
    differs: bool
    note: str


@functools.cache
def rows() -> tuple[PublishedSetting, ...]:
    """Return the table in its order."""
    text = resources.files("fedsim.privacy").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(_row(entry) for entry in csv.DictReader(text.splitlines()))


def compare(settings: Iterable[PublishedSetting] | None = None) -> list[PublishedComparison]:
    """Return each setting (all of the table by default) with its epsilons computed now."""
    return [_compare(row) for row in (rows() if settings is None else settings)]


def _row(entry: dict[str, str]) -> PublishedSetting:
    stated = entry["eps_published"]
    return PublishedSetting(
        paper=entry["paper"],
        setting=entry["setting"],
        population=int(entry["N"]),
        batch=int(entry["batch"]),
        steps=int(entry["steps"]),
        noise_multiplier=float(entry["sigma"]),
        delta=float(entry["delta"]),
        epsilon_published=None if stated == "not given" else float(stated),
        epsilon_rdp=float(entry["eps_rdp_computed"]),
        epsilon_pld=float(entry["eps_pld_computed"]),
        neighbouring=entry["neighbouring"],
        source=entry["source"],
        status=entry["status"],
    )


def _compare(row: PublishedSetting) -> PublishedComparison:
    event = row.event()

    def spent(kind: str) -> EpsilonResult:
        return accountant.epsilon(event, row.delta, kind).among(row.population)

    rdp, pld = spent("rdp"), spent("pld")
    objax = spent("rdp_objax") if row.uses_objax else None
    if row.epsilon_published is None:
        return PublishedComparison(row, rdp, pld, objax, False, row.status)
    stated = row.epsilon_published
    methods = [result for result in (rdp, objax) if result is not None and result.value is not None]
    offs = {result.accountant: float(result.value or 0.0) / stated - 1.0 for result in methods}
    nearest = min(offs, key=lambda name: abs(offs[name]))
    differs = abs(offs[nearest]) > AGREEMENT
    note = f"{nearest} gives {stated * (1.0 + offs[nearest]):.4g}, {offs[nearest]:+.1%}; " if differs else ""
    return PublishedComparison(row, rdp, pld, objax, differs, note + row.status)
