"""Examples handed in from Python: any indexable data set, or arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import digest
from fedsim.data import rows
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.handed import as_array
from fedsim.data.pictures.shown import rgb
from fedsim.data.sources.arrays import check_channels_last, finite
from fedsim.data.sources.base import declared_one
from fedsim.data.targets import Targets
from fedsim.partitions.base import as_numbers
from fedsim.validate import InputError

NAME = "data from Python"
LOOKED_AT = 8
"""Items that are asked for twice: random ones are rarely the same so often."""


class Data:
    """A training and an evaluation split from Python, as `fedsim.train` takes them.

    Args:
        train: a data set with a length whose items are (input, target), such as torch.utils.data.Dataset, or
            a pair of arrays (inputs, targets). Every item is read once, and must be the same whenever it is
            asked for: draw augmented views by train.augmentations, not in the data set.
        test: likewise, public: other examples than those of training.
        classes, labels, values, tokens: exactly one declares the targets, as `data.options` of arrays do:
            classes there can be; labels an example can have (targets of 0 and 1); values it has; tokens.
        vocabulary: number of tokens there can be, where inputs are integer tokens of one length.
        names: of the classes, labels or values; targets may then be these words.
        holders: (N,) natural owner of each training example, any words or numbers. They are the holders,
            unless the call or its configuration says another partition.
        mean, std: of image channels on the [0, 1] scale, published constants: one number for all or one a
            channel; default 0.5.

    Inputs are uint8 images (H, W, C), PIL images, uint8 tensors (C, H, W), float arrays or tensors of any one
    shape, or tokens. Floats are taken as they are.

    Raises:
        InputError: items of different shapes or types, or what does not fit the declarations.

    Examples:
        >>> import numpy as np
        >>> inputs, words = np.zeros((4, 8), np.float32), np.array(["cat", "dog", "dog", "cat"])
        >>> train, test = (inputs, words), (inputs[:2], words[:2])
        >>> data = Data(train, test, classes=2, names=["cat", "dog"], holders=list("AABB"))
        >>> data.holders, data.splits.train.targets.tolist()
        (2, [0, 1, 1, 0])
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        *,
        classes: int | None = None,
        labels: int | None = None,
        values: int | None = None,
        tokens: int | None = None,
        vocabulary: int | None = None,
        names: Sequence[str] = (),
        holders: Any = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ) -> None:
        targets = declared_one("fedsim.Data", classes=classes, labels=labels, values=values, tokens=tokens)
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise InputError(f"fedsim.Data: names must be a list of words, got {names!r}.")
        declared = Targets(targets.kind, targets.size, tuple(names))
        groups = None
        if holders is not None:
            if isinstance(holders, Mapping | int):
                raise InputError(
                    "fedsim.Data: holders must name the owner of each training example, (N,) words or "
                    f"numbers, got {type(holders).__name__}. The number of holders is federation.holders."
                )
            groups = as_numbers(holders)

        def split(where: str, examples: Any, owners: NDArray[np.int64] | None) -> ArrayDataset:
            inputs, wanted = _arrays(where, examples)
            if wanted.dtype.kind == "U":
                wanted = rows.classes_of_words(wanted, declared, f"{where}: targets")
            elif wanted.dtype.kind == "b" and declared.kind == "class":
                wanted = wanted.astype(np.int64)
            if owners is not None and len(owners) != len(inputs):
                raise InputError(
                    f"fedsim.Data: holders must name an owner for each of {len(inputs)} training examples, "
                    f"got {len(owners)}. Give one for every example, in their order."
                )
            image = inputs.dtype == np.uint8 and inputs.ndim == 4 and vocabulary is None
            if inputs.dtype.kind == "f":
                finite(inputs, f"{where}: inputs")
            if image:
                check_channels_last(f"{where}: inputs", inputs.shape)
            channels = inputs.shape[-1] if image else 0
            center, scale = _by_channel("mean", mean, channels), _by_channel("std", std, channels)
            return ArrayDataset(NAME, inputs, wanted, owners, declared, center, scale, vocabulary)

        if test is train:
            raise InputError(
                "fedsim.Data: test must hold other examples than train, which scores on them would call "
                "public. Give public ones, or judge by training examples that are held out: "
                "data.holdout_examples."
            )
        self.splits = Splits(split("train", train, groups), split("test", test, None))

    @property
    def holders(self) -> int | None:
        """The number of natural owners of training examples, None where none were named."""
        groups = self.splits.train.groups
        return None if groups is None else int(groups.max()) + 1

    def digest(self) -> str:
        """Return a sha256 of everything the splits hold and declare."""
        found = hashlib.sha256()
        for data in (self.splits.train, self.splits.test):
            found.update(repr((data.declared, data.mean, data.std, data.vocabulary)).encode())
            for array in (data.inputs, data.targets, data.groups):
                if array is not None:
                    found.update(digest.of_array(np.ascontiguousarray(array)))
        return found.hexdigest()


def _by_channel(what: str, given: float | Sequence[float] | None, channels: int) -> tuple[float, ...]:
    """Return one number a channel, 0.5 where none is said."""
    if given is None:
        return (0.5,) * channels
    try:
        found = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.empty((0, 0))
    if not channels or found.shape not in ((), (channels,)):
        wanted = f"one number, or {channels}, one a channel" if channels else "left out"
        why = "" if channels else ": it is for images of bytes, and other inputs are taken as they are"
        raise InputError(f"fedsim.Data: {what} must be {wanted}, got {given!r}{why}.")
    return tuple(np.broadcast_to(found, channels).tolist())


def _arrays(where: str, given: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return inputs and targets of a pair of arrays, or of a data set's items."""
    if isinstance(given, tuple | list) and len(given) == 2 and all(_is_array(part) for part in given):
        inputs, targets = (_array(part) for part in given)
        if len(inputs) != len(targets):
            raise InputError(
                f"{where} must have as many targets as inputs, got {len(inputs)} and {len(targets)}."
            )
        return _channels_last(inputs, isinstance(given[0], torch.Tensor), 4), targets
    try:
        count = len(given)
        items = [given[index] for index in range(count)]
        again = [given[index] for index in range(min(count, LOOKED_AT))]
    except Exception as error:
        raise InputError(
            f"{where} must be a pair of arrays (inputs, targets), or a data set with a length whose items "
            f"are (input, target), got {type(given).__name__}, which fails by {type(error).__name__}: "
            f"{error}.{_dataset_of(given)}"
        ) from error
    if not items:
        raise InputError(f"{where} must have items (input, target), got none.")
    for index, item in enumerate(items):
        if not isinstance(item, tuple | list) or len(item) != 2:
            size = f" of {len(item)}" if isinstance(item, tuple | list | dict) else ""
            raise InputError(
                f"{where} must have items (input, target), or be a pair of arrays (inputs, targets), got "
                f"{type(item).__name__}{size} as item {index}. Let its __getitem__ return the two, or give "
                "(numpy.array(inputs), numpy.array(targets))."
            )
    if not all(_same(one, other) for one, other in zip(items, again, strict=False)):
        raise InputError(
            f"{where} must give the same item whenever it is asked, and does not: every item is read once, "
            "so that what is drawn there would stay. Leave out random augmentation there, and name "
            "train.augmentations."
        )
    found = [_channels_last(_array(item[0]), isinstance(item[0], torch.Tensor), 3) for item in items]
    wanted = [_array(item[1]) for item in items]
    return _stacked(where, "inputs", found), _stacked(where, "targets", wanted)


def _same(one: Any, other: Any) -> bool:
    """Whether an item (input, target) is what it was."""

    def equal(part: Any, then: Any) -> bool:
        now = _array(part)
        return np.array_equal(now, _array(then), equal_nan=now.dtype.kind == "f")

    return all(map(equal, one, other))


def _dataset_of(given: Any) -> str:
    """What to give in place of a loader."""
    return " Give the data set that it loads from." if hasattr(given, "dataset") else ""


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray) and value.ndim > 0


def _array(value: Any) -> NDArray[Any]:
    if hasattr(value, "getbands"):  # an image of Pillow: grey stays, all others as image folders have them
        return np.asarray(value)[..., None] if value.mode == "L" else _rgb(value)
    return as_array(value, "fedsim.Data: inputs and targets")


def _rgb(image: Any) -> NDArray[np.uint8]:
    try:
        return rgb(image)
    except InputError as error:
        raise InputError(f"an image {error}") from error


def _channels_last(array: NDArray[Any], of_torch: bool, axes: int) -> NDArray[Any]:
    """Bytes of torch's image tensors have their channels first."""
    return (
        np.moveaxis(array, -3, -1) if of_torch and array.dtype == np.uint8 and array.ndim == axes else array
    )


def _stacked(where: str, what: str, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    first = arrays[0]
    for index, array in enumerate(arrays):
        if (
            array.shape != first.shape
            or array.dtype.kind != first.dtype.kind
            or array.dtype.kind not in "fiubU"
        ):
            raise InputError(
                f"{where}: {what} must be numbers of one shape and kind, got {first.dtype} of shape "
                f"{first.shape} first and {array.dtype} of shape {array.shape} in item {index}. Bring them "
                "to one form in the data set."
            )
    return np.stack(arrays)
