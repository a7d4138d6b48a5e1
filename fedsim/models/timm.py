"""Image models of timm (pytorch-image-models) by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedsim import references
from fedsim.models.cnn import image_shape
from fedsim.models.libraries import check_architecture, check_free, library


@dataclass(frozen=True)
class TimmOptions:
    """Options of `timm_model`.

    Attributes:
        architecture: a name of `timm.list_models()`, with a tag of pretrained weights or without.
        pretrained: load the published weights; the head is drawn anew where it has another width.
        options: further arguments of `timm.create_model`, such as img_size.
    """

    architecture: str = ""
    pretrained: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def timm_model(input_shape: tuple[int, ...], outputs: int, options: TimmOptions) -> nn.Module:
    """Return a model of timm that maps (n, channels, height, width) to logits (n, outputs).

    Its number of input channels is that of the data, and its image size too where it needs one.

    Raises:
        InputError: timm is not installed, has no such architecture, or refuses the options.
    """
    timm = library("timm", "timm", "model.name=timm")
    name = options.architecture
    check_architecture(name.split(".")[0], timm.list_models(), "a model of timm", "timm.list_models()")
    channels, *size = image_shape(input_shape, "timm", smallest=1)
    decided = {
        "num_classes": "the data decide the number of outputs",
        "in_chans": "the data decide the number of channels",
        "pretrained": "model.options.pretrained says it",
    }
    check_free(options.options, decided, "model.options.options")
    known = {"model_name": name, "pretrained": options.pretrained, "num_classes": outputs}
    sized = {"img_size": tuple(size)} if timm.get_pretrained_cfg_value(name, "fixed_input_size") else {}
    given = {**known, "in_chans": channels, **sized, **options.options}
    return references.called(timm.create_model, given, {}, "model.options")
