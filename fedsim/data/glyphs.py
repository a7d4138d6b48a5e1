"""Images of characters, rendered from any folder of fonts: public data with natural owners, the fonts.

Like notMNIST, but built on the spot: white on black, 28x28, the ink scaled into 20x20 and centred, as MNIST
is. Fonts are told apart by content, so copies count once. A font that has too few of the characters, or
draws the same picture for many of them (most symbol and fallback fonts), is left out; one that has other
pictures in the letters' places cannot be recognised and does not belong into the folder. The images depend
on the fonts and on the versions of Pillow and FreeType alone.
"""

from __future__ import annotations

import hashlib
import logging
import string
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds, validate
from fedsim.data import cache
from fedsim.validate import InputError

EDGE = 28
INK = 20
RENDER_SIZE = 80  # points; several pixels of the rendering make one of the image
TEST_SHARE = 0.2  # of the fonts
MIN_SHARE = 0.5  # of the characters that a font must draw, and draw differently
CHARACTERS: Mapping[str, str] = {
    "glyphs": string.digits + string.ascii_uppercase + string.ascii_lowercase,
    "glyphs_a_to_j": "ABCDEFGHIJ",
}
_SUFFIXES = {".ttf", ".otf"}
_MISSING = "\U0010fffd"  # private use: what a font draws for it is its picture of a missing character
_VERSION = 1

_log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


def load(name: str, root: Path) -> Arrays:
    """Return the images of all fonts below `root`, rendered by the first process that asks.

    Args:
        name: a key of CHARACTERS.
        root: folder searched for .ttf and .otf files, at any depth.

    Returns:
        train_inputs (N, 28, 28, 1) uint8, train_labels (N,) int64 places in CHARACTERS[name], train_groups
        (N,) int64 fonts, and the same with test_ for the fonts held out (every fifth, by a fixed shuffle).
        A font's images stand together.

    Raises:
        InputError: fewer than two usable fonts, or a cache that cannot be written.
    """
    with validate.failures_as(
        InputError, f"{name}: the fonts in {root} cannot be read", "Mend or remove them."
    ):
        fonts = _fonts(root)
    path = cache.folder() / f"{name}-{_digest(fonts, CHARACTERS[name])}.npz"
    try:
        with cache.locked(path):
            if not path.exists():
                _log.info("rendering %s of %d fonts into %s", name, len(fonts), path)
                arrays = _render(fonts, CHARACTERS[name], root)
                with cache.written(path) as handle:
                    np.savez_compressed(handle, allow_pickle=False, **arrays)
        with np.load(path, allow_pickle=False) as held:
            return dict(held)
    except InputError:
        raise
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged: {error}. Delete it; it is made again.") from error
    except OSError as error:
        raise InputError(
            f"{path}: the cache of rendered fonts must be writable: {error}. Set {cache.FOLDER_VARIABLE} to "
            "a folder that is."
        ) from error


def _fonts(root: Path) -> dict[str, Path]:
    """Return one path for every different font file, by the sha256 of its content, sorted by it."""
    found: dict[str, Path] = {}
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file()):
        found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    return dict(sorted(found.items()))


def _digest(fonts: Mapping[str, Path], characters: str) -> str:
    import PIL
    from PIL import features

    kind = f"{_VERSION} {PIL.__version__} {features.version('freetype2')} {characters}"
    return hashlib.sha256("\n".join([kind, *fonts]).encode()).hexdigest()[:32]


def _render(fonts: Mapping[str, Path], characters: str, root: Path) -> Arrays:
    usable = [drawn for path in fonts.values() if len(drawn := _draw(path, characters))]
    if len(usable) < 2:
        raise InputError(
            f"glyphs: data.root must hold at least 2 fonts (.ttf or .otf) with most of {characters!r}, got "
            f"{len(usable)} of {len(fonts)} font files in {root}. Set data.root to a folder of fonts, such "
            "as /usr/share/fonts."
        )
    order = seeds.stream(0, "glyphs").permutation(len(usable))
    test = set(order[: max(1, round(TEST_SHARE * len(usable)))].tolist())
    arrays: Arrays = {}
    for split, fits in (("train", lambda f: f not in test), ("test", lambda f: f in test)):
        rows = [
            (image, label, font)
            for font, drawn in enumerate(usable)
            if fits(font)
            for label, image in drawn.items()
        ]
        arrays[f"{split}_inputs"] = np.stack([image for image, _, _ in rows])[..., None]
        arrays[f"{split}_labels"] = np.array([label for _, label, _ in rows], dtype=np.int64)
        arrays[f"{split}_groups"] = np.array([font for _, _, font in rows], dtype=np.int64)
    return arrays


def _draw(path: Path, characters: str) -> dict[int, NDArray[np.uint8]]:
    """Return label -> (28, 28) for the characters a font has, or nothing for a font that is left out."""
    from PIL import ImageFont

    try:
        # The basic layout: another one is used where a library happens to be installed.
        font = ImageFont.truetype(str(path), RENDER_SIZE, layout_engine=ImageFont.Layout.BASIC)
        missing = _picture(font, _MISSING)
        drawn = {}
        for label, character in enumerate(characters):
            picture = _picture(font, character)
            if picture is not None and (missing is None or not np.array_equal(picture, missing)):
                drawn[label] = picture
    except (OSError, ValueError) as error:
        _log.info("left out %s: %s", path, error)
        return {}
    different = {picture.tobytes() for picture in drawn.values()}
    if len(different) < MIN_SHARE * len(characters):
        _log.info("left out %s: %d different characters", path, len(different))
        return {}
    return drawn


def _picture(font: Any, character: str) -> NDArray[np.uint8] | None:
    """Return the character's ink in the middle of (28, 28), or None where there is no ink."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character)
    if right <= left or bottom <= top or max(right - left, bottom - top) > 20 * RENDER_SIZE:
        return None
    canvas = Image.new("L", (int(right - left), int(bottom - top)), 0)
    ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=font)
    box = canvas.getbbox()
    if box is None:
        return None
    ink = canvas.crop(box)
    scale = INK / max(ink.size)
    size = tuple(max(1, round(edge * scale)) for edge in ink.size)
    small = ink.resize((size[0], size[1]), Image.Resampling.BOX)
    image = Image.new("L", (EDGE, EDGE), 0)
    image.paste(small, ((EDGE - size[0]) // 2, (EDGE - size[1]) // 2))
    return np.asarray(image, dtype=np.uint8)
