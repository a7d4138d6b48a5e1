"""A trial of a sampler from outside: what it draws against what it says, before anything is private.

Not a proof: a sampler may behave on the trial's keys and not on others. It catches what is honestly wrong.
"""

from __future__ import annotations

import math

import numpy as np

from fedsim import seeds, validate
from fedsim.samplers.base import Draw, Participation, Sampler
from fedsim.validate import InputError

_STEPS, _UNITS = 96, 4096
_ANSWERS = 2_000_000  # of all steps together: a second or two
_ALARM = 6.0  # standard deviations


def check(sampler: Sampler, says: Participation, units: int) -> None:
    """Draw over some cycles with keys of the trial's own, and refuse what contradicts `says`.

    Args:
        sampler: from outside.
        says: its participation.
        units: of the run; so many, or 4,096 if there are more, are asked about.

    Raises:
        InputError: a mask of another shape or dtype, an answer that depends on who else is asked about, two
            participations in a cycle or closer than stated, or units that take part more often than stated.
    """
    count = units if says.sample is not None else min(units, _UNITS)
    ids = np.arange(min(count, units), dtype=np.int64)
    most_steps = max(2, min(_STEPS, _ANSWERS // max(1, len(ids))))
    steps = min(most_steps, max(1, most_steps // says.period) * says.period)
    rows = []
    for step in range(steps):
        try:
            draw = Draw(step, says.share, units, sampler.keys(seeds.derive(0, "trial of a sampler"), step))
            mask = sampler.selected(draw, ids)
        except Exception as error:
            raise InputError(
                f"sampler {type(sampler).__name__} fails by {type(error).__name__}: {error}. Mend it."
            ) from error
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != ids.shape:
            _refuse(f"selected() must give a mask of shape {ids.shape}, got {type(mask).__name__}")
        if not np.array_equal(sampler.selected(draw, ids[::-1].copy())[::-1], mask):
            _refuse("selected() must answer for an id alone, whoever else is asked about")
        rows.append(mask)
    taken = np.stack(rows)
    whole = len(taken) // says.period * says.period
    cycles = taken[:whole].reshape(-1, says.period, len(ids)).sum(axis=1)
    if cycles.max(initial=0) > 1 or taken.sum(axis=0).max() > -(-steps // says.period):
        _refuse(f"a unit took part more than once in a cycle of {says.period} steps")
    who, when = np.argwhere(taken.T).T
    gaps = np.diff(when)[np.diff(who) == 0]
    if gaps.min(initial=steps) < says.separation:
        _refuse(f"a unit took part {gaps.min()} steps apart, stated are {says.separation}")
    trials = len(ids) * -(-steps // says.period)
    most = says.rate * trials + _ALARM * math.sqrt(trials * says.rate * (1.0 - says.rate)) + 1e-6
    if taken.sum() > most and says.rate < 1.0:
        _refuse(
            f"units took part {int(taken.sum())} times, the stated rate {says.rate:.4g} allows {most:.0f}"
        )
    if says.sample is not None and len(ids) == units and (taken.sum(axis=1) != says.sample[1]).any():
        _refuse(f"a draw of {says.sample[1]} units took another number of them")


def _refuse(problem: str) -> None:
    validate.conflicts(
        f"the sampler draws otherwise than its participation says: {problem}.",
        "Correct selected() or participation(): the event, and epsilon, follow from the latter.",
    )
