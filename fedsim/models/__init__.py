"""Model families by name, built deterministically and checked for per-example gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedsim import references, seeds, validate
from fedsim.config import ModelConfig, parse_options
from fedsim.data.examples import ArrayDataset
from fedsim.models import weights
from fedsim.models.check import check, examples_are_independent, for_training
from fedsim.models.cnn import CifarCnn, CifarCnnOptions, SmallCnn, SmallCnnOptions
from fedsim.models.initialise import initialise
from fedsim.models.linear import Linear, LinearOptions, Mlp, MlpOptions
from fedsim.models.nf_resnet import NfResNet50, NfResNet50Options
from fedsim.models.resnet_v2 import ResNet18V2, ResNet18V2Options
from fedsim.models.scatter import ScatterCnn, ScatterCnnOptions, ScatterLinear, ScatterLinearOptions
from fedsim.models.vit import VisionTransformer, VisionTransformerOptions
from fedsim.models.wide_resnet import WideResNet, WideResNetOptions
from fedsim.validate import InputError

__all__ = [
    "FAMILIES",
    "Family",
    "build",
    "check",
    "examples_are_independent",
    "for_dataset",
    "for_training",
    "skeleton",
    "weights",
]


@dataclass(frozen=True)
class Family:
    """One entry of the registry: a frozen dataclass of options, and `make(input_shape, classes, options)`."""

    options: type[Any]
    make: Callable[[tuple[int, ...], int, Any], nn.Module]


FAMILIES: dict[str, Family] = {
    "small_cnn": Family(SmallCnnOptions, SmallCnn),
    "cifar_cnn": Family(CifarCnnOptions, CifarCnn),
    "linear": Family(LinearOptions, Linear),
    "mlp": Family(MlpOptions, Mlp),
    "nf_resnet_50": Family(NfResNet50Options, NfResNet50),
    "resnet_18_v2": Family(ResNet18V2Options, ResNet18V2),
    "scatter_cnn": Family(ScatterCnnOptions, ScatterCnn),
    "scatter_linear": Family(ScatterLinearOptions, ScatterLinear),
    "vit": Family(VisionTransformerOptions, VisionTransformer),
    "wide_resnet": Family(WideResNetOptions, WideResNet),
}

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def build(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, seed: seeds.Root) -> nn.Module:
    """Build the model `config` names, on the CPU, in train mode (`for_training`).

    The values depend on (config, input_shape, num_classes, seed) alone. Constructors run on the meta device,
    so no global generator is read or advanced. Values are drawn in `config.dtype`: float32 and float64
    models of one seed are different draws. Then public weights, where `config` names some, take their place,
    and what it freezes is not trained (fedsim.models.weights).

    A name with a colon is a model of the user's own: `_own`.

    Args:
        config: family name, options of that family, dtype.
        input_shape: shape of one example: (channels, height, width) or (features,).
        num_classes: width of the output.
        seed: root from which the initialisation stream is derived.

    Raises:
        InputError: unknown family, option or dtype (with the nearest valid one), a value out of range, an
            input shape the family cannot take, or a layer that `check` refuses.
    """
    if references.is_reference(config.name):
        return _own(config, input_shape, num_classes, seed)
    model = skeleton(config, input_shape, num_classes)
    try:
        # As Module.to_empty, whose empty_like imports torch's symbolic shapes: half a second.
        model = model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu"))
    except RuntimeError as error:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        raise InputError(
            f"model {config.name} takes {size / 2**30:.1f} GiB, more than this machine can give: {error}. "
            "Use smaller model.options."
        ) from error
    with torch.no_grad():
        initialise(model, seeds.torch_stream(seed, "model"))
    weights.load(model, config)
    return for_training(model)


def skeleton(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the model of `build` on the meta device: shapes and layers without values, in no time.

    Raises:
        InputError: as `build`.
    """
    references.check(config.name, FAMILIES, "model.name")
    if references.is_reference(config.name):
        return _own(config, input_shape, num_classes, 0).to("meta")
    validate.one_of(config.dtype, _DTYPES, "model.dtype")
    validate.positive(num_classes, "num_classes")
    for size in input_shape:
        validate.positive(size, "every entry of input_shape")
    family = FAMILIES[config.name]
    options = parse_options(config.options, family.options, "model.options")
    with torch.device("meta"):
        model = family.make(tuple(input_shape), num_classes, options)
    weights.freeze(model, config)
    check(model)
    return model.to(_DTYPES[config.dtype])


def _own(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, seed: seeds.Root) -> nn.Module:
    """Build a model of the user's own: what its constructor draws or loads is kept.

    The constructor gets `model.options`, and `input_shape` and `num_classes` if it has parameters of these
    names. While it runs, the global generators of torch, numpy and Python stand where `seed` says, so that
    every process draws the same; they are put back.

    Raises:
        InputError: as `references.resolve` and `references.called`; what is made is no module, or as `build`.
    """
    validate.one_of(config.dtype, _DTYPES, "model.dtype")
    make = references.resolve(config.name, "model.name")
    known = {"input_shape": tuple(input_shape), "num_classes": num_classes}
    with references.generators(seeds.derive(seed, "model")):
        model = references.called(make, config.options, known, "model.options")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model.name must name something that makes a torch.nn.Module, but {config.name} makes "
            f"{type(model).__name__}."
        )
    model = model.to("cpu", _DTYPES[config.dtype])
    weights.load(model, config)
    weights.freeze(model, config)
    model = for_training(model)
    check(model)
    return model


def for_dataset(config: ModelConfig, dataset: ArrayDataset, seed: seeds.Root) -> nn.Module:
    """Build the model for a data set's example shape and number of classes; see `build`."""
    return build(config, dataset.example_shape, dataset.declared.size, seed)
