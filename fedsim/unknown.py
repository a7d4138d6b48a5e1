"""What to say of a setting that does not exist: the one that was meant, or what the file is for."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from fedsim import validate

ELSEWHERE = {
    "batch": "train.expected_batch_size",
    "batch_size": "train.expected_batch_size",
    "clients": "federation.holders",
    "criterion": "task.name",
    "epochs": "train.steps",
    "epsilon": "privacy.target_epsilon",
    "eps": "privacy.target_epsilon",
    "gpus": "engine.gpus_per_node",
    "loss": "task.name",
    "loss_fn": "task.name",
    "lr": "optimizer.learning_rate",
    "max_grad_norm": "privacy.clip_norm",
    "num_clients": "federation.holders",
    "num_rounds": "train.steps",
    "rounds": "train.steps",
    "sampling_rate": "train.expected_batch_size",
    "sigma": "privacy.noise_multiplier",
}
"""What other libraries call it: the setting here."""
_A_LOSS = "a loss of your own is the method `loss` of a class that derives from fedsim.Task"
_WHY = {
    "criterion": _A_LOSS,
    "epochs": "an epoch is examples / expected_batch_size steps",
    "loss": _A_LOSS,
    "loss_fn": _A_LOSS,
    "sampling_rate": "the rate is expected_batch_size / examples",
}
_A_METHOD = "preset={}, a choice on every axis"
_OPTIONS = ("backend", "json", "out", "resume")
"""Of commands: no settings."""
_CHOICES = {
    "strategy.name": {
        "central_dp": "central",
        "cdp": "central",
        "distributed": "shares",
        "fedavg": _A_METHOD.format("dp_fedavg"),
        "fedprox": _A_METHOD.format("dp_fedavg"),
        "ldp": "local",
        "local_dp": "local",
        "secagg": "shares",
        "secagg+": "shares",
        "secaggplus": "shares",
        "secure_aggregation": "shares",
        "secure_sum": "shares",
    },
}
"""By setting, what others call a choice: the choice here."""
_KINDS = {
    "a search for settings, which `fedsim tune` makes": {"space", "spaces", "trials"},
    "a comparison, which `fedsim compare` runs": {"recipe", "variants"},
    "a recipe, which `fedsim run` trains": {"data", "model", "federation", "privacy", "train", "optimizer"},
}
"""What YAML files there are, and keys that only they have."""
_FEW = 12
_SURE = 0.8  # of difflib's ratio: a slip of the finger


def remedy(key: str, valid: Collection[str]) -> str:
    """Return a sentence on an unknown dotted key: its name here, those it may stand for, or all there are.

    Args:
        key: as written.
        valid: dotted names of what there is.
    """
    last = key.rpartition(".")[2].lower()
    if key in _OPTIONS:
        return f"It is an option of the command: --{key}."
    if (known := ELSEWHERE.get(last)) in valid:
        return f"Here it is '{known}'{f': {_WHY[last]}' if last in _WHY else ''}."
    if alike := difflib.get_close_matches(key, valid, n=1, cutoff=_SURE):
        return f"Did you mean '{alike[0]}'?"
    parts = {name: name.rpartition(".")[2].split("_") for name in valid}
    holding = sorted(name for name, words in parts.items() if _within(last.split("_"), words))
    if holding:
        return f"Did you mean {' or '.join(map(repr, holding[:3]))}?"
    if meant := validate.did_you_mean(key, valid):
        return meant
    if not valid:
        return "There are no options."
    return f"There are {', '.join(sorted(valid))}." if len(valid) <= _FEW else ""


def choice(setting: str, name: str) -> str:
    """Return a sentence on what is no choice of a setting but goes by that name elsewhere, "" for others."""
    here = _CHOICES.get(setting, {}).get(name.lower())
    return f"Here it is {here}." if here else ""


def another_kind(keys: Collection[str], valid: Collection[str]) -> str:
    """Return what kind of file has these keys at its top, "" for the kind whose keys are `valid`."""
    for kind, own in _KINDS.items():
        if own & set(keys) and not own & set(valid):
            return kind
    return ""


def _within(few: list[str], many: list[str]) -> bool:
    """Whether words stand beside each other within others."""
    return any(many[at : at + len(few)] == few for at in range(len(many)))
