"""Model families by name, built deterministically and checked for per-example gradients."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import references, seeds, validate
from fedsim.config import ModelConfig
from fedsim.merging import parse_options
from fedsim.models import weights
from fedsim.models.bag_of_words import BagOfWords, BagOfWordsOptions
from fedsim.models.captioner import Captioner, CaptionerOptions
from fedsim.models.check import check, examples_are_independent, for_training, refuse_uncopied
from fedsim.models.cnn import CifarCnn, CifarCnnOptions, SmallCnn, SmallCnnOptions
from fedsim.models.fix import fix, fixed
from fedsim.models.initialise import initialise
from fedsim.models.linear import Linear, LinearOptions, Mlp, MlpOptions
from fedsim.models.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderOptions
from fedsim.models.nf_resnet import NfResNet50, NfResNet50Options
from fedsim.models.resnet_v2 import ResNet18V2, ResNet18V2Options
from fedsim.models.scatter import ScatterCnn, ScatterCnnOptions, ScatterLinear, ScatterLinearOptions
from fedsim.models.timm import TimmOptions, timm_model
from fedsim.models.torchvision import TorchvisionOptions, torchvision_model
from fedsim.models.transformers import TransformersOptions, transformers_model
from fedsim.models.vit import VisionTransformer, VisionTransformerOptions
from fedsim.models.wide_resnet import WideResNet, WideResNetOptions
from fedsim.registry import entry_points
from fedsim.validate import InputError

__all__ = [
    "FAMILIES",
    "Family",
    "build",
    "check",
    "examples_are_independent",
    "fixed",
    "for_training",
    "skeleton",
    "weights",
]


@dataclass(frozen=True)
class Family:
    """One entry of the references.

    Attributes:
        options: a frozen dataclass.
        make: called with `options` and those of input_shape, outputs, num_classes (= outputs) and vocabulary
            that it has parameters for. A family whose data are token ids has a parameter vocabulary.
        keeps_values: what `make` draws or loads is kept. Otherwise it runs on the meta device, and
            `fedsim.models.initialise` draws the values.
    """

    options: type[Any]
    make: Callable[..., nn.Module]
    keeps_values: bool = False


FAMILIES: dict[str, Family] = {
    "bag_of_words": Family(BagOfWordsOptions, BagOfWords),
    "captioner": Family(CaptionerOptions, Captioner),
    "small_cnn": Family(SmallCnnOptions, SmallCnn),
    "cifar_cnn": Family(CifarCnnOptions, CifarCnn),
    "linear": Family(LinearOptions, Linear),
    "masked_autoencoder": Family(MaskedAutoencoderOptions, MaskedAutoencoder),
    "mlp": Family(MlpOptions, Mlp),
    "nf_resnet_50": Family(NfResNet50Options, NfResNet50),
    "resnet_18_v2": Family(ResNet18V2Options, ResNet18V2),
    "scatter_cnn": Family(ScatterCnnOptions, ScatterCnn),
    "scatter_linear": Family(ScatterLinearOptions, ScatterLinear),
    "timm": Family(TimmOptions, timm_model, keeps_values=True),
    "torchvision": Family(TorchvisionOptions, torchvision_model, keeps_values=True),
    "transformers": Family(TransformersOptions, transformers_model, keeps_values=True),
    "vit": Family(VisionTransformerOptions, VisionTransformer),
    "wide_resnet": Family(WideResNetOptions, WideResNet),
}

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def build(
    config: ModelConfig,
    input_shape: tuple[int, ...],
    outputs: int,
    seed: seeds.Root,
    vocabulary: int | None = None,
) -> nn.Module:
    """Build the model `config` names, on the CPU, in train mode (`for_training`).

    The values depend on (config, input_shape, outputs, vocabulary, seed) alone, and on the files `config`
    names. Constructors of our own families run on the meta device, and their values are drawn in
    `config.dtype`: float32 and float64 models of one seed are different draws. Models of libraries and of the
    user's own (a name with a colon, `package.module:Object`, which gets `model.options` as arguments) keep
    what their constructors draw or load. While those run, the global generators of torch, numpy and Python
    stand where `seed` says, so that every process draws the same; they are put back.

    Then `config.fix` replaces layers (fedsim.models.fix), public weights, where `config` names some, take the
    place of the values, and what it freezes is not trained (fedsim.models.weights).

    Args:
        config: family name, options of that family, dtype.
        input_shape: shape of one example: (channels, height, width), (features,), or (tokens,).
        outputs: width of the output.
        seed: root from which the initialisation stream is derived.
        vocabulary: where inputs are token ids, int64 in 0 .. vocabulary - 1, their number; else None.

    Raises:
        InputError: unknown family, option or dtype (with the nearest valid one), a value out of range, an
            input the family cannot take, a library that is not installed, a constructor that fails or makes
            no module, or a layer that `check` refuses.
    """
    config = _offered(config)
    model = _layers(config, input_shape, outputs, seed, vocabulary)
    if not _keeps_values(config):
        _draw(model, config, seed)
    weights.load(model, config)
    return model


def skeleton(
    config: ModelConfig, input_shape: tuple[int, ...], outputs: int, vocabulary: int | None = None
) -> nn.Module:
    """Return the model of `build` on the meta device: shapes and layers without values.

    In no time for families of our own; models of libraries and of the user's own are built first.

    Raises:
        InputError: as `build`.
    """
    return _to_meta(_layers(_offered(config), input_shape, outputs, 0, vocabulary))


def _layers(
    config: ModelConfig, input_shape: tuple[int, ...], outputs: int, seed: seeds.Root, vocabulary: int | None
) -> nn.Module:
    """The model as it is trained, checked; on the CPU with the values it keeps, or on the meta device."""
    references.check(config.name, [*FAMILIES, *entry_points("models")], "model.name")
    validate.one_of(config.dtype, _DTYPES, "model.dtype")
    validate.positive(outputs, "outputs")
    if vocabulary is not None:
        validate.positive(vocabulary, "vocabulary")
    for size in input_shape:
        validate.positive(size, "every entry of input_shape")
    shape = tuple(input_shape)
    known = {"input_shape": shape, "outputs": outputs, "num_classes": outputs, "vocabulary": vocabulary}
    make, given = _maker(config, vocabulary)
    if _keeps_values(config):
        with references.generators(seeds.derive(seed, "model")):
            model = references.called(make, given, known, "model.options")
    else:
        with torch.device("meta"):
            model = references.called(make, given, known, "model.options")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model.name must name something that makes a torch.nn.Module, but {config.name} makes "
            f"{type(model).__name__}."
        )
    if _keeps_values(config):
        refuse_uncopied(model)
    model = for_training(model)
    if config.fix:
        model = fix(model)
    weights.freeze(model, config)
    check(model)
    return model.to("cpu" if _keeps_values(config) else "meta", _DTYPES[config.dtype])


def _offered(config: ModelConfig) -> ModelConfig:
    """The configuration with what an installed package offers under its name by reference."""
    offered = {} if config.name in FAMILIES else entry_points("models")
    return dataclasses.replace(config, name=offered.get(config.name, config.name))


def _keeps_values(config: ModelConfig) -> bool:
    return references.is_reference(config.name) or FAMILIES[config.name].keeps_values


def _maker(config: ModelConfig, vocabulary: int | None) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What makes the model, and its own arguments."""
    if references.is_reference(config.name):
        make = references.resolve(config.name, "model.name")
        if not callable(make):
            raise InputError(f"model.name must name what makes a model, but {config.name} is {make!r}.")
        return make, config.options
    family = FAMILIES[config.name]
    if vocabulary is not None and "vocabulary" not in inspect.signature(family.make).parameters:
        validate.conflicts(
            f"model.name={config.name} takes numbers, but the data are ids of {vocabulary} tokens.",
            "Use model.name=bag_of_words or transformers, or a model of your own with an embedding.",
        )
    return family.make, {"options": parse_options(config.options, family.options, "model.options")}


def _draw(model: nn.Module, config: ModelConfig, seed: seeds.Root) -> None:
    """Give a model on the meta device its values, on the CPU, in place."""
    try:
        # As Module.to_empty, whose empty_like imports torch's symbolic shapes: half a second.
        model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu"))
    except RuntimeError as error:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        raise InputError(
            f"model {config.name} takes {size / 2**30:.1f} GiB, more than this machine can give: {error}. "
            "Use smaller model.options."
        ) from error
    with torch.no_grad():
        initialise(model, seeds.torch_stream(seed, "model"))


def _to_meta(model: nn.Module) -> nn.Module:
    """Move a model to the meta device in place; unlike by `Module.to`, what is tied stays tied."""
    moved: dict[int, Tensor | None] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None and id(value) not in moved:
                    meta = torch.empty_like(value, device="meta")
                    kept = isinstance(value, nn.Parameter)
                    moved[id(value)] = nn.Parameter(meta, value.requires_grad) if kept else meta
                held[name] = moved[id(value)] if value is not None else None  # type: ignore[assignment]
    return model
