"""From the bytes of a file to the pixels of a picture, or of a part of it.

Whatever lies in a file becomes 8-bit RGB with the values it shows, the way up it is shown, or is refused: no
value is cut off, no transparency or second frame dropped (`fedsim.data.pictures.shown`). What is refused
follows from the bytes alone, so it is the same in every process and at every time.

A JPEG that is shrunk much is decoded at a half, a quarter or an eighth of its size, which libjpeg does from
the coefficients: 20 to 50 % faster. How much follows from the wanted part and size alone, never from other
views.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data.pictures.shown import SEVERAL, SIDEWAYS, Undecodable, as_rgb, opened, orientation_of, turned

MOST_PIXELS = 2**26
"""Pictures of more pixels are refused unless told otherwise: a file of kilobytes may say that it has
billions. Below Pillow's own limit."""

SPARE = 2
"""A decoded picture has at least so many times the wanted edge, as Pillow's `thumbnail` has it. A view of one
that was decoded smaller is not bit for bit that of the whole: on noisy pictures pixels differed by 3.8 levels
on average in the worst view, by 20 at most."""

SCALES = (8, 4, 2)

Box = tuple[int, int, int, int]  # top, left, height, width


class Picture(Protocol):
    """A picture whose parts can be had in any size."""

    size: tuple[int, int]
    """Height and width in pixels."""

    def cut(self, box: Box, edge: int) -> NDArray[np.uint8]:
        """Return a part (edge, edge, 3), scaled bilinearly with antialiasing."""
        ...

    def fitted(self, edge: int, fit: str, short: int) -> NDArray[np.uint8]:
        """Return all of it or its middle, (edge, edge, 3); see `fedsim.data.pictures.decode.fitted`."""
        ...


class Encoded:
    """A picture as the bytes of a file. Each scale is decoded once.

    Args:
        content: of the file.
        most_pixels: it may have; None: any number.

    Raises:
        Undecodable: also later, where the header was right and the rest is not.
    """

    def __init__(self, content: bytes, most_pixels: int | None = MOST_PIXELS) -> None:
        self._content = content
        self._decoded: dict[int, Any] = {}
        with opened(content) as image:
            wide, high = image.size
            self._orientation = orientation_of(image, content)
            self.size = (wide, high) if self._orientation >= SIDEWAYS else (high, wide)
            self._scales = image.format in ("JPEG", SEVERAL)
        if most_pixels is not None and high * wide > most_pixels:
            raise Undecodable(
                f"must have at most {most_pixels} pixels (data.options.most_pixels), got {wide} x {high}"
            )

    def cut(self, box: Box, edge: int) -> NDArray[np.uint8]:
        """See `Picture.cut`: at full scale exactly the part, cut out and then scaled."""
        top, left, high, wide = box
        scale = self._scale(min(high, wide), edge)
        image = self.image(scale)
        if scale == 1:
            return part_of(image, box, edge)
        bounds = (left, top, left + wide, top + high)
        within = tuple(min(place / scale, side) for place, side in zip(bounds, image.size * 2, strict=True))
        return np.asarray(_shrunk(image, (edge, edge), within))

    def fitted(self, edge: int, fit: str, short: int) -> NDArray[np.uint8]:
        """See `Picture.fitted`."""
        scale = self._scale(min(self.size), short if fit == "crop" else edge)
        return np.asarray(fitted(self.image(scale), (edge, edge), fit, short, self.size))

    def image(self, scale: int = 1) -> Any:
        """Return a Pillow image in RGB, each side 1 / scale of the file's, rounded up.

        Raises:
            Undecodable: the file is damaged, or what it holds has no plain 8-bit meaning.
            RuntimeError: the decoder gives another size than it promised, so that places would be others.
        """
        if scale not in self._decoded:
            with opened(self._content) as image:
                if scale > 1:
                    image.draft(image.mode, (image.size[0] // scale, image.size[1] // scale))
                self._decoded[scale] = turned(as_rgb(image, self._content), self._orientation)
            wanted = tuple(-(-side // scale) for side in reversed(self.size))
            if self._decoded[scale].size != wanted:
                raise RuntimeError(f"a picture must decode to {wanted}, got {self._decoded[scale].size}")
        return self._decoded[scale]

    def scale_for(self, short: int) -> int:
        """Return how much smaller it may be decoded where its shorter side becomes `short`."""
        return self._scale(min(self.size), short)

    def _scale(self, side: int, wanted: int) -> int:
        fine = (scale for scale in SCALES if side >= SPARE * scale * wanted)
        return next(fine, 1) if self._scales else 1


class Pixels:
    """A picture that is decoded: (H, W, 3) uint8."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        from PIL import Image

        self.size = (pixels.shape[0], pixels.shape[1])
        self._image = Image.fromarray(pixels)

    def cut(self, box: Box, edge: int) -> NDArray[np.uint8]:
        """See `Picture.cut`."""
        return part_of(self._image, box, edge)

    def fitted(self, edge: int, fit: str, short: int) -> NDArray[np.uint8]:
        """See `Picture.fitted`."""
        return np.asarray(fitted(self._image, (edge, edge), fit, short))


def part_of(image: Any, box: Box, edge: int) -> NDArray[np.uint8]:
    """Return a part of a Pillow image as (edge, edge, 3): cut out, then scaled."""
    top, left, high, wide = box
    return np.asarray(_shrunk(image.crop((left, top, left + wide, top + high)), (edge, edge)))


def fitted(
    image: Any,
    size: tuple[int, int],
    fit: str = "crop",
    short: int | None = None,
    whole: tuple[int, int] | None = None,
) -> Any:
    """Return a Pillow image of 8 bits as (height, width) `size`, scaled bilinearly with antialiasing.

    Args:
        image: the image.
        size: wanted height and width.
        fit: "crop": scaled so that it covers the size, the middle cut out; "squeeze": nothing is cut.
        short: with crop and a square, the edge that the shorter side gets before the middle is cut out, at
            least that of the square; None: the square's own.
        whole: height and width that its proportions are taken from, where it was decoded smaller.
    """
    high, wide = size
    of_high, of_wide = (image.size[1], image.size[0]) if whole is None else whole
    least = (high, wide) if short is None else (short, short)
    scale = max(least[1] / of_wide, least[0] / of_high)
    shape = (wide, high)
    if fit == "crop":
        shape = (max(least[1], round(of_wide * scale)), max(least[0], round(of_high * scale)))
    if image.size != shape:
        image = _shrunk(image, shape)
    left, top = (shape[0] - wide) // 2, (shape[1] - high) // 2
    return image.crop((left, top, left + wide, top + high))


def shrunk_to(image: Any, short: int, whole: tuple[int, int]) -> Any:
    """Return a Pillow image whose shorter side is `short`, as `fitted` has it before the middle is cut out;
    or the image itself where it is no longer. `whole`: height and width it had before it was decoded
    smaller."""
    high, wide = whole
    if min(wide, high) <= short:
        return image
    scale = max(short / wide, short / high)
    return _shrunk(image, (max(short, round(wide * scale)), max(short, round(high * scale))))


def _shrunk(image: Any, size: tuple[int, int], box: tuple[float, ...] | None = None) -> Any:
    """Return a Pillow image as (width, height) `size`, bilinearly; it antialiases where it shrinks."""
    from PIL import Image

    return image.resize(size, Image.Resampling.BILINEAR, box)


def check_pixels(most: int | None) -> None:
    """Raise InputError unless `most` is a number of pixels that a picture can have."""
    if most is not None:
        validate.in_range(most, 1, MOST_PIXELS, "data.options.most_pixels")
