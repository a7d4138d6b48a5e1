"""Examples as files: what a finished model can be tried on."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fedsim.data.examples import ArrayDataset
from fedsim.validate import InputError

ARRAY = "examples.npy"


def write(data: ArrayDataset, folder: Path, count: int) -> list[Path]:
    """Write the first examples of a split into a folder, as `fedsim predict` reads them; return the files.

    Grey and RGB images are PNG files of their own, named by row and, where there are names, class. Anything
    else is one array, `ARRAY`. Images that cannot be decoded are left out.

    Args:
        data: the split, without feature maps.
        folder: where; it must not exist, or be empty, since all of a folder is predicted.
        count: how many; all, where there are fewer.

    Raises:
        InputError: the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out must be a new or empty folder, and {folder} holds something. Name another.")
    inputs, there = data.read(slice(0, min(count, len(data))))
    rows = np.arange(len(inputs)) if there is None else np.flatnonzero(there)
    folder.mkdir(parents=True, exist_ok=True)
    if not (data.is_image and inputs.shape[-1] in (1, 3)):
        np.save(folder / ARRAY, inputs[rows])
        return [folder / ARRAY]
    from PIL import Image

    digits, kinds = max(2, len(str(len(inputs) - 1))), _kinds(data, len(inputs))
    files = [folder / f"{row:0{digits}d}{kinds[row]}.png" for row in rows]
    for row, file in zip(rows, files, strict=True):
        image = inputs[row]
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file)
    return files


def _kinds(data: ArrayDataset, count: int) -> list[str]:
    """The classes of the first rows as parts of files' names."""
    if data.declared.kind != "class" or not data.declared.names:
        return [""] * count
    words = ["-" + re.sub(r"[^\w]+", "-", name).strip("-") for name in data.declared.names]
    return [words[kind] for kind in data.wanted_of(slice(0, count))]
