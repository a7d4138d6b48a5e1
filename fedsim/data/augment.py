"""Augmented views of examples, keyed by (step key, example id, view).

Gradients are averaged over the K views of an example before clipping (augmentation multiplicity, De et al.
2022, s. 3.2), so the views are part of the mechanism's input: they must not change with the physical batch,
the node or the order of examples. Each view therefore draws its randomness from a fixed place in the step's
key stream that depends on its example's global id and its own index alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds, validate
from fedsim.augmentations import AUGMENTATIONS, Augmentation
from fedsim.augmentations.base import Part
from fedsim.data.pictures.pictures import Pictures
from fedsim.registry import check_choice
from fedsim.validate import InputError

# Key-stream layout: example id, then view (2**16 of them), then the augmentation's place in the list.
MAX_AUGMENTATIONS = 16
MAX_VIEWS = 2**16

Words = NDArray[np.uint64]


def check(names: Sequence[Any], example: NDArray[Any]) -> list[Augmentation]:
    """Return the augmentations that are named, each by a name or {name, options}.

    Args:
        names: of them, in their order.
        example: one element of the inputs.

    Raises:
        InputError: unknown name (with the nearest known one), images too small, or features.
    """
    made = [AUGMENTATIONS.make(check_choice(name, "train.augmentations")) for name in names]
    if len(names) > MAX_AUGMENTATIONS:
        raise InputError(
            f"train.augmentations must name at most {MAX_AUGMENTATIONS}, got {len(names)}. Remove some."
        )
    if names and (example.dtype != np.uint8 or example.ndim != 3):
        raise InputError(
            "train.augmentations must be empty for data that is not uint8 images of shape (H, W, C), got "
            f"{list(names)} for {example.dtype} of shape {example.shape}. Set train.augmentations=[]."
        )
    if late := [name for name, one in zip(names[1:], made[1:], strict=True) if isinstance(one, Part)]:
        raise InputError(
            f"train.augmentations must start with {late[0]}, which takes a part of the picture as it is in "
            f"its file, got {list(names)}. Put it first, and once."
        )
    for augmentation in made:
        augmentation.check(example.shape)
    return made


def views(
    inputs: NDArray[Any],
    ids: NDArray[np.int64],
    multiplicity: int,
    key: bytes,
    names: Sequence[Any],
) -> NDArray[Any]:
    """Return K views of each example.

    Args:
        inputs: (B, H, W, C) uint8 images, or (B, ...) float features with no augmentations.
        ids: (B,) int64 global example ids, 0 or above.
        multiplicity: K, views per example (`augment_multiplicity`).
        key: 32 bytes, the step's augment key.
        names: augmentations, applied in this order.

    Returns:
        (B, K, H, W, C), the dtype of `inputs`. View k of an example is a function of (its pixels, its id, k,
        key, names): the same for every K > k, batch and node. Without names the K views are equal, and one
        view is a reshape that shares memory with `inputs`.

    Raises:
        InputError: unknown augmentation, inputs it does not fit, or shapes that do not go together.
    """
    if ids.shape != inputs.shape[:1]:
        raise InputError(f"ids must be {len(inputs)} example ids, got shape {ids.shape}.")
    words = _words(ids, multiplicity, key, len(names))
    made = check(names, np.empty(inputs.shape[1:], inputs.dtype))
    return _changed(inputs[:, None], made, words, 0)


def views_of(
    pictures: Pictures,
    ids: NDArray[np.int64],
    multiplicity: int,
    key: bytes,
    names: Sequence[Any],
    workers: int | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Return K views of each of these pictures, as `views` does of an array of images.

    A `Part` takes its part of the picture as it lies in the file; without one, the picture is first made to
    fit.

    Args:
        pictures: of a data set.
        ids: (B,) int64 global example ids: their rows.
        multiplicity, key, names: as of `views`.
        workers: threads that decode; None: one a core.

    Returns:
        (B, K, H, W, 3), and (B,) which pictures could be decoded; None: all. The others are zero.

    Raises:
        InputError: as `views`.
        RunError: a file cannot be read, or is another than it was.
    """
    words = _words(ids, multiplicity, key, len(names))
    made = check(names, np.empty(pictures.shape[1:], pictures.dtype))
    if made and isinstance(made[0], Part):
        out, whole = pictures.views(ids, made[0], words[:, :, 0], workers)
        out = _changed(out, made, words, 1)
    else:
        out, whole = pictures.read(ids, workers)
        out = _changed(out[:, None], made, words, 0)
    return out, None if whole.all() else whole


def _changed(out: NDArray[Any], made: Sequence[Augmentation], words: Words, begun: int) -> NDArray[Any]:
    """Return images (B, 1 or K, ...) after all augmentations from the one at `begun` on, (B, K, ...)."""
    if len(out):
        for place in range(begun, len(made)):
            out = made[place].views(out, words[:, :, place])
    if out.shape[1] != words.shape[1]:
        out = np.repeat(out, words.shape[1], axis=1)
    return out


def _words(ids: NDArray[np.int64], multiplicity: int, key: bytes, used: int) -> Words:
    """(B, K, MAX_AUGMENTATIONS) key-stream words; one AES call per example, about 15 us each.

    None are made where no augmentation uses any.
    """
    validate.in_range(int(multiplicity), 1, MAX_VIEWS, "train.augment_multiplicity")
    if ids.size and ids.min() < 0:
        raise InputError(f"ids must be example ids of 0 or above, got minimum {ids.min()}.")
    per_example = multiplicity * MAX_AUGMENTATIONS
    if not used:
        return np.zeros((len(ids), multiplicity, 0), dtype=np.uint64)
    out = np.empty((len(ids), per_example), dtype=np.uint64)
    for row, example in enumerate(ids.tolist()):
        out[row] = seeds.words(key, example * MAX_VIEWS * MAX_AUGMENTATIONS, per_example)
    return out.reshape(len(ids), multiplicity, MAX_AUGMENTATIONS)
