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
    validate.in_range(int(multiplicity), 1, MAX_VIEWS, "train.augment_multiplicity")
    if ids.shape != inputs.shape[:1] or (ids.size and ids.min() < 0):
        raise InputError(
            f"ids must be {len(inputs)} example ids of 0 or above, got shape {ids.shape}"
            f"{f' with minimum {ids.min()}' if ids.size else ''}."
        )
    made = check(names, np.empty(inputs.shape[1:], inputs.dtype))
    out = inputs[:, None]
    if names and len(ids):
        words = _words(ids, multiplicity, key)
        for place, augmentation in enumerate(made):
            out = augmentation.views(out, words[:, :, place])
    if out.shape[1] != multiplicity:
        out = np.repeat(out, multiplicity, axis=1)
    return out


def _words(ids: NDArray[np.int64], multiplicity: int, key: bytes) -> Words:
    """(B, K, MAX_AUGMENTATIONS) key-stream words; one AES call per example, about 15 us each."""
    per_example = multiplicity * MAX_AUGMENTATIONS
    out = np.empty((len(ids), per_example), dtype=np.uint64)
    for row, example in enumerate(ids.tolist()):
        out[row] = seeds.words(key, example * MAX_VIEWS * MAX_AUGMENTATIONS, per_example)
    return out.reshape(len(ids), multiplicity, MAX_AUGMENTATIONS)
