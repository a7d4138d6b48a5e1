"""What is public about the standard data sets, so that a recipe can be planned where they are not at hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from fedsim import validate
from fedsim.config import Config
from fedsim.data.feature_maps import FEATURES
from fedsim.merging import parse_options
from fedsim.rules import SET, read_with
from fedsim.validate import InputError


@dataclass(frozen=True)
class Size:
    """Public sizes of one data set.

    Attributes:
        train, test: examples in each split.
        shape: of one example as a model sees it: (C, H, W) for images.
        classes: number of classes, or of labels an example can have, or of tokens there are.
        places: of the tokens that a target has; 0: targets are no tokens.
    """

    train: int
    test: int
    shape: tuple[int, ...]
    classes: int
    places: int = 0


SIZES: dict[str, Size] = {
    "fashion_mnist_subset": Size(10_000, 2_000, (1, 28, 28), 10),
    "fashion_mnist": Size(60_000, 10_000, (1, 28, 28), 10),
    "mnist": Size(60_000, 10_000, (1, 28, 28), 10),
    "cifar10": Size(50_000, 10_000, (3, 32, 32), 10),
    "cifar100": Size(50_000, 10_000, (3, 32, 32), 100),
}


SQUARED = (
    "caption_shards",
    "captions",
    "cifar10",
    "cifar100",
    "image_folder",
    "image_shards",
    "image_table",
    "scenes",
)
"""Sources that bring images to a square of data.options.size."""


@dataclass(frozen=True)
class _Stated:
    """`reference.data` of a recipe whose images are a folder."""

    name: str = ""
    train: int = 0
    test: int = 0
    shape: list[int] = field(default_factory=list)
    classes: int = 0
    tokens: int = 0
    places: int = field(default=0, metadata=read_with(tokens=SET))


def of(config: Config) -> Size | None:
    """Return the sizes that `config` would train on, after its cuts and its feature map; None if unknown.

    Standard sets have the sizes above; a recipe for an image folder or arrays states them in
    `reference.data`: name, train, test, shape (C, H, W), and classes, or tokens and places of captions.

    Raises:
        InputError: a cut takes more examples than there are, or the statement is malformed.
    """
    data = config.data
    known = SIZES.get(data.name)
    if known is None:
        known = _stated(config.reference.get("data"))
        option, declared = _declared(data.options)
        if known is not None and declared not in (None, known.classes):
            raise InputError(
                f"data.options.{option} must be reference.data.classes {known.classes}, got {declared}."
            )
    if known is None:
        return None
    if data.name in SQUARED and isinstance(edge := data.options.get("size"), int):
        known = replace(known, shape=(known.shape[0], edge, edge))
    if data.holdout_examples >= known.train:
        raise InputError(
            f"data.holdout_examples must be below the {known.train} training examples, "
            f"got {data.holdout_examples}."
        )
    if data.holdout_examples:
        known = replace(known, train=known.train - data.holdout_examples, test=data.holdout_examples)
    if data.train_examples is not None:
        validate.in_range(data.train_examples, 1, known.train, "data.train_examples")
        known = replace(known, train=data.train_examples)
    if data.test_examples is not None:
        validate.in_range(data.test_examples, 1, known.test, "data.test_examples")
        known = replace(known, test=data.test_examples)
    if data.features is not None:
        channels, height, width = known.shape
        shape = FEATURES.make(data.features).output_shape((height, width, channels))
        known = replace(known, shape=tuple(shape))
    return known


def _declared(options: dict[str, Any]) -> tuple[str, Any]:
    """Which option of a source declares its classes or labels, and how many; None where none does."""
    option = "labels" if options.get("labels") else "classes"
    found = options.get(option)
    return option, len(found) if isinstance(found, list) else found


def _stated(given: Any) -> Size | None:
    if given is None:
        return None
    if not isinstance(given, dict):
        raise InputError(f"reference.data must be a mapping, got {given!r}.")
    stated = parse_options(given, _Stated, "reference.data")
    outputs = ("tokens", "places") if stated.tokens else ("classes",)
    for name in ("train", "test", *outputs):
        validate.positive(getattr(stated, name), f"reference.data.{name}")
    if stated.tokens and stated.classes:
        raise InputError("reference.data must state classes, or tokens and places, and states both.")
    if not stated.shape or len(stated.shape) != 3:
        raise InputError(f"reference.data.shape must be [channels, height, width], got {stated.shape}.")
    size = stated.tokens or stated.classes
    return Size(stated.train, stated.test, tuple(stated.shape), size, stated.places)
