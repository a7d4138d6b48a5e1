"""Images in folders: ROOT/train/CLASS/FILE and ROOT/test/CLASS/FILE.

The folders in train are the classes, empty ones too: their list is public, which images they hold is not.
Whatever lies there becomes 8-bit RGB with the values it shows, or is refused by name: no file is skipped,
no value cut off, no transparency or second frame dropped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.sources import SOURCES
from fedsim.data.sources.base import Source
from fedsim.data.targets import Targets
from fedsim.partitions.base import as_numbers
from fedsim.rules import SET, read_with
from fedsim.validate import InputError

EIGHT_BIT = {"1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"}
SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}
WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
HALF = (0.5, 0.5, 0.5)


@SOURCES.register("image_folder")
@dataclass(frozen=True)
class ImageFolder(Source):
    """Images in folders, ROOT/train/CLASS/FILE and ROOT/test/CLASS/FILE, brought to one size by a rule.

    Attributes:
        classes: number of classes, to be checked; None: the folders in train.
        size: edge of the square that every image becomes: its shorter edge is scaled to `size`, bilinearly
            with antialiasing, and the middle is cut out (as ImageNet is evaluated). None: all images must
            have the size of the first.
        fit: with size: "crop" as said; "squeeze": both edges are scaled to `size`, nothing is cut.
        owners: what ROOT/train/CLASS/OWNER/FILE means: True: the folder below a class is the natural owner.
    """

    classes: int | None = None
    size: int | None = None
    fit: str = field(default="crop", metadata=read_with(size=SET))
    owners: bool = False

    def __post_init__(self) -> None:
        validate.one_of(self.fit, ("crop", "squeeze"), "data.options.fit")
        if self.size is not None:
            validate.positive(self.size, "data.options.size")

    def load(self, root: Path) -> Splits:
        """See `Source.load`: decodes every image once, in the order of class and path.

        Raises:
            InputError: folders that are missing, empty or do not fit together, and files that are no image,
                of another size than the first where no size is set, or without a plain 8-bit meaning; names
                the file.
        """
        names = _classes(root / "train")
        if self.classes not in (None, len(names)):
            raise InputError(
                f"data.options.classes must be {len(names)}, the class folders in {root / 'train'}, or null, "
                f"got {self.classes}. A class without training images is an empty folder there."
            )
        if unknown := sorted(set(_classes(root / "test")) - set(names)):
            raise InputError(
                f"image_folder: {root}/test must have class folders of {root}/train only, got "
                f"{', '.join(unknown)} more. Remove them, or add them to train (empty folders will do)."
            )
        train = self._decode(root / "train", names, None)
        return Splits(train, self._decode(root / "test", names, train.inputs.shape[1:]))

    def _decode(self, folder: Path, names: Sequence[str], shape: tuple[int, ...] | None) -> ArrayDataset:
        """Decode every image into (N, H, W, 3); all have `shape`, by default that of the first."""
        files = [(path, label) for label, name in enumerate(names) for path in _files(folder / name)]
        if not files:
            raise InputError(
                f"image_folder: {folder} must hold at least one image at CLASS/FILE, got none. Set data.root "
                "to a folder with train and test, each with one folder per class."
            )
        first = _pixels(files[0][0], self)
        shape = first.shape if shape is None else shape
        inputs = _room(len(files), shape, folder)
        for row, (path, _) in enumerate(files):
            image = _pixels(path, self) if row else first
            if image.shape != shape:
                raise InputError(
                    f"image_folder: every image must be {shape[1]} x {shape[0]} pixels like the first one, "
                    f"got {image.shape[1]} x {image.shape[0]} in {path}. Set data.options.size to bring all "
                    "to one."
                )
            inputs[row] = image
        labels = np.array([label for _, label in files], dtype=np.int64)
        groups = self._owners(folder, [path for path, _ in files]) if self.owners else None
        declared = Targets("class", len(names), tuple(names))
        return ArrayDataset("image_folder", inputs, labels, groups, declared, HALF, HALF)

    def _owners(self, folder: Path, files: Sequence[Path]) -> NDArray[np.int64]:
        """The number of each file's owner among the sorted names of the folders below the classes."""
        parts = [path.relative_to(folder).parts for path in files]
        if short := [path for path, found in zip(files, parts, strict=True) if len(found) < 3]:
            raise InputError(
                f"image_folder: with data.options.owners files must lie at CLASS/OWNER/FILE, got {short[0]}."
            )
        return as_numbers([found[1] for found in parts])


def fitted(image: Any, size: tuple[int, int], fit: str = "crop") -> Any:
    """Return a Pillow image of 8 bits as (height, width) `size`, scaled bilinearly with antialiasing.

    Args:
        image: the image.
        size: wanted height and width.
        fit: "crop": scaled so that it covers the size, the middle cut out; "squeeze": nothing is cut.
    """
    from PIL import Image

    high, wide = size
    scale = max(wide / image.size[0], high / image.size[1])
    shape = (wide, high)
    if fit == "crop":
        shape = (max(wide, round(image.size[0] * scale)), max(high, round(image.size[1] * scale)))
    if image.size != shape:
        image = image.resize(shape, Image.Resampling.BILINEAR)  # antialiases where it shrinks
    left, top = (shape[0] - wide) // 2, (shape[1] - high) // 2
    return image.crop((left, top, left + wide, top + high))


def pixels(path: Path, shape: tuple[int, ...], fit: str = "crop") -> NDArray[np.uint8]:
    """Return one image (H, W, C) in the shape (C, H, W) that a model was trained on, C of 1 or 3; `fitted`.

    Raises:
        InputError: the file is no image with a plain 8-bit meaning.
    """
    from PIL import Image

    channels, high, wide = shape
    image = fitted(Image.fromarray(_decoded(path)), (high, wide), fit)
    return np.asarray(image.convert("L"))[..., None] if channels == 1 else np.asarray(image)


def _classes(folder: Path) -> list[str]:
    """The folders in `folder`, sorted; hidden ones are not looked at."""
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise InputError(
            f"image_folder: expected images at {folder}/CLASS/FILE (png, jpg, ...), got: {error}. "
            "Set data.root to a folder with train and test, each with one folder per class."
        ) from error
    names = [p.name for p in entries if p.is_dir()]
    if not names or len(names) != len(entries):
        found = next((p.name for p in entries if not p.is_dir()), "nothing")
        raise InputError(
            f"image_folder: {folder} must hold one folder per class and nothing else, got {found}. "
            "Images belong at CLASS/FILE."
        )
    return names


def _room(count: int, shape: tuple[int, ...], folder: Path) -> NDArray[np.uint8]:
    try:
        return np.empty((count, *shape), dtype=np.uint8)
    except MemoryError as error:
        gib = count * shape[0] * shape[1] * shape[2] / 2**30
        raise InputError(
            f"image_folder: the {count} images of {folder} must fit into memory, which takes {gib:.1f} GiB. "
            "Use fewer or smaller ones."
        ) from error


def _files(folder: Path) -> list[Path]:
    """All files below a class folder, of any depth, links followed, hidden ones left out, sorted by path."""
    found: list[Path] = []
    seen = {os.path.realpath(folder)}

    def refuse(error: OSError) -> None:
        raise InputError(f"image_folder: {error.filename} must be readable. {error}.") from error

    if not folder.is_dir():
        return []
    for here, below, files in os.walk(folder, followlinks=True, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in below:
            real = os.path.realpath(os.path.join(here, name))
            if real in seen:
                raise InputError(
                    f"image_folder: {os.path.join(here, name)} leads to a folder that was there already, "
                    "so its images would count twice. Remove the link."
                )
            seen.add(real)
        found += [Path(here, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _pixels(path: Path, source: ImageFolder) -> NDArray[np.uint8]:
    """Return an image as (H, W, 3) uint8, of the source's size."""
    decoded = _decoded(path)
    if source.size is None:
        return decoded
    from PIL import Image

    return np.asarray(fitted(Image.fromarray(decoded), (source.size, source.size), source.fit))


def _decoded(path: Path) -> NDArray[np.uint8]:
    """Return an image as (H, W, 3) uint8."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return rgb(image, path)
    except InputError:
        raise
    except Exception as error:  # a decoder of a damaged file may raise anything
        raise InputError(
            f"image_folder: {path} must be a readable image. {str(error) or type(error).__name__}. "
            "Mend or remove it; files whose name starts with a dot are not looked at."
        ) from error


def rgb(image: Any, path: Path | str) -> NDArray[np.uint8]:
    """Return a Pillow image as (H, W, 3) uint8, with the values it shows.

    Raises:
        InputError: it has several frames, transparency, or no plain 8-bit meaning.
    """
    if getattr(image, "n_frames", 1) != 1:
        raise InputError(
            f"image_folder: {path} must be one image, got {image.n_frames} frames. Save them apart."
        )
    if image.mode in SIXTEEN_BIT:
        grey = np.asarray(image).astype(np.uint32)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        if np.asarray(image.convert("RGBA"))[..., 3].min(initial=255) < 255:
            raise InputError(
                f"image_folder: {path} must not be transparent: what lies behind is not said. Put it on a "
                "background beforehand."
            )
        return np.asarray(image.convert("RGBA"))[..., :3].copy()
    if image.mode not in EIGHT_BIT:
        raise InputError(
            f"image_folder: {path} must have 8 or 16 whole bits a channel, got Pillow's mode {image.mode}, "
            "whose range is not said. Convert it beforehand."
        )
    return np.asarray(image.convert("RGB"))
