"""Settings that no search may choose, with the reason: the search itself fixes them, or a score must not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedsim import validate
from fedsim.config import FREE, Config

_PROMISE = "what a run promises is not chosen by its score: budgets to tune at are `epsilons`"
_JUDGED = (
    "trials are compared by one score on the same held-out examples: variants and `overrides` choose that"
)
_SEEDS = "the runs of a trial have the seeds of `seeds`"
_HELD_OUT = "trials are judged by all of `holdout_examples`"
FIXED: Mapping[str, str] = {
    "seed": _SEEDS,
    "data.holdout_examples": _HELD_OUT,
    "data.test_examples": _HELD_OUT,
    "tuning": "the search writes there how it chose",
    "privacy.target_epsilon": _PROMISE,
    "privacy.stop_at_epsilon": _PROMISE,
    "privacy.delta": _PROMISE,
    "privacy.accountant": _PROMISE,
    "data.name": _JUDGED,
    "task.name": _JUDGED,
    "task.options.headline": _JUDGED,
    **{
        name: "it changes no result, so no score can tell its values apart"
        for name in FREE
        if name != "preset"
    },
}
"""Of every search. A preset is among what is free, but stands for axes that are not."""

_ASKED = "all trials ask the same holders for the same examples"
_MECHANISM = "all trials are runs of one mechanism"
FIXED_PRIVATE: Mapping[str, str] = {
    "privacy.noise_source": "all trials draw their noise alike",
    "privacy.noise_multiplier": _MECHANISM,
    "preset": _MECHANISM,
    "strategy": _MECHANISM,
    "query.name": _MECHANISM,
    "sampler": _MECHANISM,
    "noise": _MECHANISM,
    "federation": _ASKED,
    "data.options": _ASKED,
    "data.train_examples": _ASKED,
}
"""Of a private search, beside those: what its bound takes to be one for all trials."""


def refuse(searched: Iterable[str], where: str, *, private: bool = False) -> None:
    """Refuse a space over settings that a search fixes, or that a score must not decide.

    Args:
        searched: dotted names of the settings of the space.
        where: what holds them, for the message.
        private: the search is one that epsilon counts.

    Raises:
        InputError: names the setting, and why.
    """
    reasons = {**FIXED, **(FIXED_PRIVATE if private else {})}
    for name in searched:
        for fixed, why in reasons.items():
            if overlap(name, fixed):
                kind = "a private search" if private and fixed in FIXED_PRIVATE else "a search"
                validate.conflicts(
                    f"{where}: {name} must not be searched by {kind}: {why}.", "Leave it out of the space."
                )


def refuse_noise(
    searched: Iterable[str], where: str, epsilons: Sequence[float], config: Callable[[], Config]
) -> None:
    """Refuse a choice of the noise where it would be one of the epsilon.

    Args:
        searched, where: as of `refuse`.
        epsilons: budgets to tune at.
        config: gives the configuration that is tuned; asked only where the noise is searched.

    Raises:
        InputError: no budget ends the run.
    """
    if not any(overlap(name, "privacy.noise_multiplier") for name in searched):
        return
    if epsilons or config().privacy.stop_at_epsilon is None:
        validate.conflicts(
            f"{where}: privacy.noise_multiplier must not be searched where it decides what a run promises: "
            "the noise follows from the budgets, which are `epsilons`.",
            "Leave it out of the space, or give a budget by privacy.stop_at_epsilon and no epsilons.",
        )


def refuse_overrides(overrides: Sequence[str], searched: Iterable[str]) -> None:
    """Refuse settings for all trials that would come in place of what is searched, or of what judges trials.

    Raises:
        InputError: names the setting.
    """
    always = {name: FIXED[name] for name in ("data.holdout_examples", "data.test_examples", "tuning")}
    held = dict.fromkeys(searched, "it is searched, and would have this value in every trial") | always
    for item in overrides:
        given = item.partition("=")[0]
        for name, why in held.items():
            if overlap(given, name):
                validate.conflicts(
                    f"{given} must not be set for all trials: {why if given == name else f'{name}: {why}'}.",
                    "Leave it out, or change the tuning file.",
                )


def overlap(one: str, other: str) -> bool:
    """Whether two dotted names are of one setting, or one of a part of the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
