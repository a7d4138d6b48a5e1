"""Starting from public weights, and keeping part of a model fixed.

Frozen parameters are no part of the flat vector: they have no gradient, no noise, no epsilon, and are not
sent. Every process builds them from the same file, so the file is public data of the run; the private data
must have had no part in it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedsim import validate
from fedsim.config import ModelConfig
from fedsim.validate import InputError


def pinned(config: ModelConfig) -> ModelConfig:
    """Return `config` with the sha256 of the file it starts from, so that other processes check theirs.

    Raises:
        InputError: the file is missing or is not the one `init_sha256` names.
    """
    if config.init_from is None:
        return config
    return dataclasses.replace(config, init_sha256=_sha256(config))


def load(model: nn.Module, config: ModelConfig) -> None:
    """Overwrite the model's values by those of `config.init_from`, if it names a file.

    Patterns are those of shell file names over parameter and buffer names, as "head.*". Without `reset`, the
    file must hold exactly the model's tensors; what a `reset` pattern names keeps its fresh values and may be
    missing in the file, have another shape there, or be there only.

    Args:
        model: initialised, on the CPU; changed in place. Values are converted to its dtype.
        config: init_from, init_sha256, reset.

    Raises:
        InputError: a file that is missing, damaged, not the pinned one, or does not fit the model outside
            `reset`; a pattern that names nothing.
    """
    if config.init_from is not None:
        _sha256(config)
        _load(model, Path(config.init_from), config.reset)


def freeze(model: nn.Module, config: ModelConfig) -> None:
    """Exclude the parameters that the patterns of `config.freeze` name from training, in place.

    Raises:
        InputError: a pattern that names nothing, or nothing left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = _matching(config.freeze, names, "model.freeze")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if names and len(frozen) == len(names):
        validate.conflicts(
            f"model.freeze={list(config.freeze)} names every parameter of {config.name}.",
            "Leave out the head, or whatever shall be trained.",
        )


def _load(model: nn.Module, path: Path, reset: Sequence[str]) -> None:
    held = _read(path)
    own = model.state_dict()
    firsts: dict[tuple[int, ...], str] = {}
    for name, tensor in list(own.items()):  # of names tied to one tensor the first stands for all
        same = (tensor.data_ptr(), *tensor.shape)
        if tensor.numel() and firsts.setdefault(same, name) != name:
            del own[name]
            held.pop(name, None)
    fresh = _matching(reset, {*own, *held}, "model.reset")
    missing = sorted(own.keys() - held.keys() - fresh)
    extra = sorted(held.keys() - own.keys() - fresh)
    wrong = [
        f"{name} {tuple(held[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted((own.keys() & held.keys()) - fresh)
        if held[name].shape != own[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("not of this model", extra), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise InputError(
            f"{path} must hold the weights of this model; {'; '.join(problems)}. Use the model and options "
            "the weights were trained with, and name what shall start afresh in model.reset, as [head.*]."
        )
    with torch.no_grad():
        for name in own.keys() - fresh:
            own[name].copy_(held[name])


def _matching(patterns: Sequence[str], names: Collection[str], setting: str) -> set[str]:
    """Return the names that some pattern fits; each pattern must fit one."""
    found: set[str] = set()
    for pattern in patterns:
        fits = fnmatch.filter(names, pattern)
        if not fits:
            raise InputError(
                f"{setting}: the pattern {pattern!r} names no parameter. "
                f"{validate.did_you_mean(pattern, names) or 'Names: ' + ', '.join(sorted(names)[:8])}"
            )
        found.update(fits)
    return found


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"model.init_from: {path} must be a safetensors file. {error}") from error
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise InputError(f"model.init_from: {path} holds values that are not finite in {broken[0]}.")
    return tensors


def _sha256(config: ModelConfig) -> str:
    assert config.init_from is not None
    try:
        with open(config.init_from, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"model.init_from must be a safetensors file of weights, got {config.init_from}: {error}. "
            "final.safetensors in the folder of a finished run is one."
        ) from error
    if config.init_sha256 not in (None, digest):
        raise InputError(
            f"model.init_from: {config.init_from} has sha256 {digest}, but model.init_sha256 is "
            f"{config.init_sha256}. Use the file the run was made for."
        )
    return digest
