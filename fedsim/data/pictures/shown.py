"""What a file shows: 8-bit RGB, the way up its camera held it, or nothing where that has no plain meaning.

Values of 16 bits are scaled to 8 and rounded, whatever the format. A picture is turned as the orientation in
its EXIF data says (tag 0x0112), in every format that has one; Pillow itself does that of TIFF alone.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.validate import InputError

EIGHT_BIT = {"1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"}
SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}
WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded: formats of pixels. Others of Pillow start programs, or stand for documents."""

SEVERAL = "MPO"
"""JPEGs in one file, as phones write them: the first is the picture, others are views or gains of it."""

ORIENTATION, UPRIGHT, SIDEWAYS = 0x0112, 1, 5  # from 5 on, height and width change places
WHITE_IS_ZERO = 0  # of TIFF's tag 262
_PNG = b"\x89PNG\r\n\x1a\n"
_OTHER = {
    "B": "L",
    "L": "B",
    "N": "B" if sys.byteorder == "little" else "L",
}  # which byte of 16 bits is taken


class Undecodable(InputError):
    """The bytes are no picture with a plain 8-bit meaning; its example contributes nothing.

    The message is what a sentence about the file goes on with: "must be a readable image".
    """


@contextlib.contextmanager
def opened(content: bytes) -> Iterator[Any]:
    """Open a Pillow image, whose header is read; in the block whatever a decoder raises is `Undecodable`."""
    from PIL import Image

    try:
        yield Image.open(io.BytesIO(content), formats=FORMATS)
    except (InputError, MemoryError):  # the second says nothing of the bytes
        raise
    except Exception as error:
        raise Undecodable(_reason(error)) from error


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":  # its message has an address in memory
        return "must be a readable image, and has no known format"
    return f"must be a readable image: {str(error) or type(error).__name__}"


def orientation_of(image: Any, content: bytes) -> int:
    """Return how a picture is to be turned, 1 .. 8 as EXIF numbers it; 1, not at all, where nothing sensible
    is said, and of TIFF, which Pillow turns. Nothing is decoded.

    Args:
        image: of Pillow, opened.
        content: of its file: PNG may say it after the pixels.
    """
    if image.format == "TIFF":
        return UPRIGHT
    said = image.info.get("exif") or (_chunk(content, b"eXIf") if image.format == "PNG" else b"")
    if not said:
        return UPRIGHT
    from PIL import Image

    found = Image.Exif()
    try:
        found.load(said)
        turned = found.get(ORIENTATION, UPRIGHT)
    except MemoryError:
        raise
    except Exception:  # damaged data beside a picture say nothing of it
        return UPRIGHT
    return turned if isinstance(turned, int) and UPRIGHT <= turned <= 8 else UPRIGHT


def turned(image: Any, orientation: int) -> Any:
    """Return a Pillow image the way up it is shown."""
    from PIL import Image

    ways = Image.Transpose
    way = {
        2: ways.FLIP_LEFT_RIGHT,
        3: ways.ROTATE_180,
        4: ways.FLIP_TOP_BOTTOM,
        5: ways.TRANSPOSE,
        6: ways.ROTATE_270,
        7: ways.TRANSVERSE,
        8: ways.ROTATE_90,
    }.get(orientation)
    return image if way is None else image.transpose(way)


def _chunk(content: bytes, kind: bytes) -> bytes:
    """Return the first chunk of a kind in a PNG, or nothing."""
    at = len(_PNG)
    while at + 8 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] == kind:
            return content[at + 8 : at + 8 + length]
        at += 12 + length
    return b""


def as_rgb(image: Any, content: bytes) -> Any:
    """Return a Pillow image in RGB with the values it shows, its pixels loaded; not turned.

    Args:
        image: opened, not loaded.
        content: of its file.

    Raises:
        Undecodable: as `rgb`.
    """
    from PIL import Image

    if image.mode in ("RGB", "RGBA") and (low := _of_sixteen_bits(image, content)) is not None:
        return Image.fromarray(low)
    if image.mode in ("RGB", "L") and "transparency" not in image.info and _frames(image) == 1:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    return Image.fromarray(rgb(image))


def _of_sixteen_bits(image: Any, content: bytes) -> NDArray[np.uint8] | None:
    """Return (H, W, 3) of a picture in colour, or with alpha, of 16 bits a channel; None: it has 8.

    Pillow keeps the upper byte of each alone; where it is told the other byte order, it keeps the lower one.
    """
    from PIL import Image

    modes = {_mode(tile.args) for tile in image.tile}
    mode = modes.pop() if len(modes) == 1 else ""
    if ";16" not in mode or "transparency" in image.info or _frames(image) != 1:
        return None
    image.load()
    upper = np.asarray(image).astype(np.uint32)
    with Image.open(io.BytesIO(content), formats=FORMATS) as again:
        # Grey with alpha has no other order; its four bytes are what four channels of 8 bits would be.
        other = "RGBA" if mode == "LA;16B" else mode[:-1] + _OTHER[mode[-1]]
        again.tile = [tile._replace(args=_with_mode(tile.args, other)) for tile in again.tile]
        again.load()
        read = np.asarray(again).astype(np.uint32)
    whole = upper * 256 + read
    if mode == "LA;16B":
        grey, alpha = read[..., 0] * 256 + read[..., 1], read[..., 2] * 256 + read[..., 3]
        whole = np.stack([grey, grey, grey, alpha], axis=-1)
    if whole.shape[-1] == 4 and whole[..., 3].min(initial=65535) < 65535:
        raise Undecodable(_TRANSPARENT)
    return ((whole[..., :3] + 128) // 257).astype(np.uint8)


def _mode(args: Any) -> str:
    """The raw mode among a tile's arguments."""
    return str(args[0]) if isinstance(args, tuple) and args else str(args)


def _with_mode(args: Any, mode: str) -> Any:
    return (mode, *args[1:]) if isinstance(args, tuple) else mode


_TRANSPARENT = "must not be transparent: what lies behind is not said. Put it on a background beforehand."


def _frames(image: Any) -> int:
    """How many pictures there are, of which none may be dropped."""
    return 1 if image.format == SEVERAL else int(getattr(image, "n_frames", 1))


def rgb(image: Any) -> NDArray[np.uint8]:
    """Return a Pillow image as (H, W, 3) uint8, with the values it shows; not turned.

    Raises:
        Undecodable: it has several frames, transparency, or no plain 8-bit meaning.
    """
    if _frames(image) != 1:
        raise Undecodable(f"must be one image, got {image.n_frames} frames. Save them apart.")
    if image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format == "PPM"):  # which scales to 16 bits
        grey = np.asarray(image).astype(np.uint32)
        if image.format == "TIFF" and image.tag_v2.get(262) == WHITE_IS_ZERO:  # Pillow turns over 8 bits
            grey = 65535 - grey
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        if np.asarray(image.convert("RGBA"))[..., 3].min(initial=255) < 255:
            raise Undecodable(_TRANSPARENT)
        return np.asarray(image.convert("RGBA"))[..., :3].copy()
    if image.mode not in EIGHT_BIT:
        raise Undecodable(
            f"must have 8 or 16 whole bits a channel, got Pillow's mode {image.mode}, "
            "whose range is not said. Convert it beforehand."
        )
    return np.asarray(image.convert("RGB"))
