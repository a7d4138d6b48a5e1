"""Files of images for every source that reads some: as an array of bytes, or decoded where they are needed.

What lies in a file becomes 8-bit RGB by `fedsim.data.pictures.decode`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data.examples import Inputs
from fedsim.data.pictures import building
from fedsim.data.pictures.decode import MOST_PIXELS, Encoded, check_pixels, fitted
from fedsim.data.pictures.packed import packed
from fedsim.data.pictures.pictures import Fit, InFiles, Pictures
from fedsim.data.pictures.shown import Undecodable
from fedsim.data.pictures.stores import Files, Store
from fedsim.data.sources.base import Source
from fedsim.rules import SET, read_with
from fedsim.validate import InputError

HALF = (0.5, 0.5, 0.5)
AT_ONCE, ON_DEMAND, PACKED = DECODE = ("at_once", "on_demand", "packed")


@dataclass(frozen=True)
class ImageFiles(Source):
    """A source whose examples are files of images, brought to one size by a rule.

    Attributes:
        size: edge of the square that every image becomes: its shorter edge is scaled to `short_side`,
            bilinearly with antialiasing, and the middle is cut out (as ImageNet is evaluated). None: all
            images must have the size of the first.
        fit: with size: "crop" as said; "squeeze": both edges are scaled to `size`, nothing is cut.
        short_side: with size and crop, what the shorter edge is scaled to before the middle is cut out; None:
            `size`. With packed, what it is scaled to once for all.
        mean, std: three numbers each, taken off and divided by on the [0, 1] scale, red first: those the
            public weights were trained with that a model starts from. Empty: 0.5.
        decode: "at_once": all when a run starts, into memory; a file that is no image is refused.
            "on_demand": each when it is drawn, so that memory does not grow with their number, and
            random_resized_crop takes parts of the image as it is. "packed": likewise, of images whose shorter
            edge was scaled to `short_side` once and that are kept as pixels on disk. With both, what is no
            image contributes nothing, and is counted.
        most_pixels: files of more are no images: a small one may say that it has thousands of millions.
    """

    size: int | None = None
    fit: str = field(default="crop", metadata=read_with(size=SET))
    short_side: int | None = field(default=None, metadata=read_with(size=SET))
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    decode: str = AT_ONCE
    most_pixels: int = MOST_PIXELS

    def __post_init__(self) -> None:
        validate.one_of(self.fit, ("crop", "squeeze"), "data.options.fit")
        validate.one_of(self.decode, DECODE, "data.options.decode")
        check_pixels(self.most_pixels)
        if self.size is not None:
            validate.positive(self.size, "data.options.size")
        elif self.decode != AT_ONCE:
            raise InputError(
                f"data.options.size must say what images become with decode={self.decode}, which looks at "
                "none of them to find out. Set it, to 224 for example."
            )
        if self.short_side is not None:
            least = self.size or 1
            validate.in_range(self.short_side, least, 2**15, "data.options.short_side", "At least size.")
            if self.fit == "squeeze" and self.decode != PACKED:
                validate.conflicts(
                    "data.options.fit=squeeze scales both edges to size, but short_side is set.",
                    "Leave it out.",
                )
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

    @property
    def rule(self) -> Fit:
        """How a whole image becomes one of `size`."""
        assert self.size is not None
        return Fit(self.size, self.fit, self.short_side or self.size)

    def read(self, path: Path) -> NDArray[np.uint8]:
        """Return one image (H, W, 3), of `size` where one is set.

        Raises:
            InputError: the file is no image with a plain 8-bit meaning, or has too many pixels.
        """
        picture = _picture(path, self.most_pixels)
        with _named(path):
            return np.asarray(picture.image()) if self.size is None else self.rule.of(picture)

    def stored(self, store: Store) -> Pictures:
        """Return the images of a store, decoded on demand or packed, as the options say."""
        files = InFiles(store, self.most_pixels)
        if self.decode == PACKED:
            return Pictures(packed(files, self.rule.short), self.rule)
        return Pictures(files, self.rule)

    def images(
        self,
        root: Path,
        groups: Sequence[Callable[[], Sequence[Path]]],
        shape: tuple[int, ...] | None,
        placed: Callable[[int, InputError], InputError],
        whole: str,
    ) -> tuple[Inputs, list[int]]:
        """Return the images of files below `root` in their order, as `decode` says, and how many each group
        has.

        Args:
            root: where their names start.
            groups: functions that list them, such as those of one class; called more than once.
            shape, placed, whole: as of `stack`.
        """
        if self.decode == AT_ONCE:
            files = [group() for group in groups]
            stacked = self.stack([path for some in files for path in some], shape, placed, whole)
            return stacked, [len(some) for some in files]
        found = building.of_files(root, groups)
        return self.stored(Files(root, found)), found.meta["groups"]

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


def pixels(
    path: Path, shape: tuple[int, ...], fit: str = "crop", short: int | None = None
) -> NDArray[np.uint8]:
    """Return one image (H, W, C) in the shape (C, H, W) that a model was trained on, C of 1 or 3; `fitted`.

    Raises:
        InputError: the file is no image with a plain 8-bit meaning.
    """
    from PIL import Image

    channels, high, wide = shape
    picture = _picture(path, MOST_PIXELS)
    with _named(path):
        if high == wide:
            image = Image.fromarray(picture.fitted(high, fit, max(high, short or 0)))
        else:
            image = fitted(picture.image(), (high, wide), fit)
    return np.asarray(image.convert("L"))[..., None] if channels == 1 else np.asarray(image)


def _picture(path: Path, most_pixels: int) -> Encoded:
    with _named(path):
        return Encoded(path.read_bytes(), most_pixels)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file it is that cannot be read or is no image."""
    try:
        yield
    except Undecodable as error:
        raise InputError(f"{path} {str(error).removesuffix('.')}. Mend or remove it.") from error
    except OSError as error:
        raise InputError(f"{path} must be a readable image. {error}. Mend or remove it.") from error
