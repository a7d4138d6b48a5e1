"""Files of images as arrays of bytes, for every source that reads some.

Whatever lies in a file becomes 8-bit RGB with the values it shows, or is refused by name: no value is cut
off, no transparency or second frame dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data.sources.base import Source
from fedsim.rules import SET, read_with
from fedsim.validate import InputError

EIGHT_BIT = {"1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"}
SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}
WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ImageFiles(Source):
    """A source whose examples are files of images, brought to one size by a rule.

    Attributes:
        size: edge of the square that every image becomes: its shorter edge is scaled to `size`, bilinearly
            with antialiasing, and the middle is cut out (as ImageNet is evaluated). None: all images must
            have the size of the first.
        fit: with size: "crop" as said; "squeeze": both edges are scaled to `size`, nothing is cut.
        mean, std: three numbers each, taken off and divided by on the [0, 1] scale, red first: those the
            public weights were trained with that a model starts from. Empty: 0.5.
    """

    size: int | None = None
    fit: str = field(default="crop", metadata=read_with(size=SET))
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        validate.one_of(self.fit, ("crop", "squeeze"), "data.options.fit")
        if self.size is not None:
            validate.positive(self.size, "data.options.size")
        for name in ("mean", "std"):
            given = getattr(self, name)
            if len(given) not in (0, 3) or any(not 0.0 <= x <= 1.0 for x in given):
                raise InputError(f"data.options.{name} must be three numbers in 0 .. 1, got {given}.")
        if 0.0 in self.std:
            raise InputError(f"data.options.std must be positive, got {self.std}.")

    @property
    def constants(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, as `ArrayDataset` takes them."""
        return tuple(self.mean) or HALF, tuple(self.std) or HALF

    def read(self, path: Path) -> NDArray[np.uint8]:
        """Return one image (H, W, 3), of `size` where one is set.

        Raises:
            InputError: see `decoded`.
        """
        found = decoded(path)
        if self.size is None:
            return found
        from PIL import Image

        return np.asarray(fitted(Image.fromarray(found), (self.size, self.size), self.fit))

    def stack(
        self,
        files: Sequence[Path],
        shape: tuple[int, ...] | None,
        placed: Callable[[int, InputError], InputError],
        whole: str,
    ) -> NDArray[np.uint8]:
        """Decode images once, in their order, into (N, H, W, 3).

        Args:
            files: N of them, one at least.
            shape: (H, W, 3) that all have; None: that of the first.
            placed: given an image's place and what is wrong with it, the error to raise.
            whole: where all of them are from, for messages.

        Raises:
            InputError: an image that is none, or of another size; too many for the memory.
        """

        def fitting(place: int, shape: tuple[int, ...] | None) -> NDArray[np.uint8]:
            try:
                return self._fitting(files[place], shape)
            except InputError as error:
                raise placed(place, error) from error

        first = fitting(0, shape)
        inputs = empty(len(files), first.shape, whole)
        inputs[0] = first
        for place in range(1, len(files)):
            inputs[place] = fitting(place, first.shape)
        return inputs

    def _fitting(self, path: Path, shape: tuple[int, ...] | None) -> NDArray[np.uint8]:
        image = self.read(path)
        if shape is not None and image.shape != shape:
            raise InputError(
                f"every image must be {shape[1]} x {shape[0]} pixels like the first one, got "
                f"{image.shape[1]} x {image.shape[0]} in {path}. Set data.options.size to bring all to one."
            )
        return image


def empty(count: int, shape: tuple[int, ...], whole: str) -> NDArray[np.uint8]:
    """Return an array (count, *shape) to fill.

    Raises:
        InputError: it does not fit into memory; `whole` says whose images they are.
    """
    try:
        return np.empty((count, *shape), dtype=np.uint8)
    except MemoryError as error:
        gib = count * shape[0] * shape[1] * shape[2] / 2**30
        raise InputError(
            f"the {count} images of {whole} must fit into memory, which takes {gib:.1f} GiB. Use fewer or "
            "smaller ones."
        ) from error


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
    image = fitted(Image.fromarray(decoded(path)), (high, wide), fit)
    return np.asarray(image.convert("L"))[..., None] if channels == 1 else np.asarray(image)


def decoded(path: Path) -> NDArray[np.uint8]:
    """Return an image as (H, W, 3) uint8, of the size it has.

    Raises:
        InputError: the file is no image with a plain 8-bit meaning.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return rgb(image, path)
    except InputError:
        raise
    except Exception as error:  # a decoder of a damaged file may raise anything
        raise InputError(
            f"{path} must be a readable image. {str(error) or type(error).__name__}. Mend or remove it."
        ) from error


def rgb(image: Any, path: Path | str) -> NDArray[np.uint8]:
    """Return a Pillow image as (H, W, 3) uint8, with the values it shows.

    Raises:
        InputError: it has several frames, transparency, or no plain 8-bit meaning.
    """
    if getattr(image, "n_frames", 1) != 1:
        raise InputError(f"{path} must be one image, got {image.n_frames} frames. Save them apart.")
    if image.mode in SIXTEEN_BIT:
        grey = np.asarray(image).astype(np.uint32)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        if np.asarray(image.convert("RGBA"))[..., 3].min(initial=255) < 255:
            raise InputError(
                f"{path} must not be transparent: what lies behind is not said. Put it on a "
                "background beforehand."
            )
        return np.asarray(image.convert("RGBA"))[..., :3].copy()
    if image.mode not in EIGHT_BIT:
        raise InputError(
            f"{path} must have 8 or 16 whole bits a channel, got Pillow's mode {image.mode}, "
            "whose range is not said. Convert it beforehand."
        )
    return np.asarray(image.convert("RGB"))
