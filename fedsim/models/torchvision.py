"""Image classifiers of torchvision by name."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsim import references
from fedsim.models.cnn import image_shape
from fedsim.models.libraries import check_architecture, check_free
from fedsim.validate import InputError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TorchvisionOptions:
    """Options of `torchvision_model`.

    Attributes:
        architecture: a classifier of `torchvision.models.list_models(module=torchvision.models)`.
        weights: absolute path of a .pth or .safetensors file of its state dict, as torchvision publishes
            them; the head is drawn anew where it has another width there.
        options: further arguments of its constructor, such as image_size.
    """

    architecture: str = ""
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def torchvision_model(input_shape: tuple[int, ...], outputs: int, options: TorchvisionOptions) -> nn.Module:
    """Return a classifier of torchvision that maps (n, 3, height, width) to logits (n, outputs).

    Raises:
        InputError: no such architecture, images without 3 channels, options that its constructor refuses, or
            a file that does not hold its weights.
    """
    from torchvision import models

    names = models.list_models(module=models)
    full_list = "torchvision.models.list_models()"
    check_architecture(options.architecture, names, "a classifier of torchvision", full_list)
    if image_shape(input_shape, "torchvision", smallest=1)[0] != 3:
        raise InputError(
            f"model.name=torchvision takes images of 3 channels, got examples of shape {input_shape}. Use "
            "model.name=timm, which makes models of any number."
        )
    decided = {
        "num_classes": "the data decide the number of outputs",
        "weights": "model.options.weights says it, as a file",
    }
    check_free(options.options, decided, "model.options.options")
    given = {"name": options.architecture, "num_classes": outputs, **options.options}
    model: nn.Module = references.called(models.get_model, given, {}, "model.options")
    if options.weights is not None:
        _load(model, Path(options.weights).expanduser(), outputs)
    return model


def _load(model: nn.Module, path: Path, outputs: int) -> None:
    held, own = _read(path), model.state_dict()
    # An output layer of another width differs in its first axis alone; nothing else may differ.
    fresh = {
        name
        for name in held.keys() & own.keys()
        if held[name].shape != own[name].shape
        and held[name].shape[1:] == own[name].shape[1:]
        and own[name].shape[0] == outputs
    }
    try:
        found = model.load_state_dict({n: t for n, t in held.items() if n not in fresh}, strict=False)
    except RuntimeError as error:
        raise InputError(f"{_expected(path)} {error}") from error
    missing = sorted(set(found.missing_keys) - fresh)
    if missing or found.unexpected_keys:
        raise InputError(f"{_expected(path)} Missing: {missing[:5]}, unknown: {found.unexpected_keys[:5]}.")
    if fresh:
        _log.info("%s holds a head of another width; drawn anew: %s", path.name, ", ".join(sorted(fresh)))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_absolute():  # processes of a run work in other folders
        raise InputError(
            f"model.options.weights must be an absolute path, got {str(path)!r}. Write it in full."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged file leads to
        raise InputError(
            f"model.options.weights must be a .pth or .safetensors file of weights, got {path}: {error}"
        ) from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise InputError(f"model.options.weights: {path} must hold a state dict, got {type(held).__name__}.")
    return held


def _expected(path: Path) -> str:
    return (
        f"model.options.weights: {path} must hold the weights of model.options.architecture, but for a head "
        "of another width. Use the file of this architecture."
    )
