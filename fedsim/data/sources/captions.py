"""Pictures with captions in files: a folder with texts beside the pictures, or a table.

A picture that cannot be read, or has another size where none is set, stays in its place as a blank one with
an empty caption: it adds nothing to any sum, no other example's number moves, and the run counts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data import rows
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.pictures.decode import Encoded
from fedsim.data.sources import SOURCES
from fedsim.data.sources.captioned import WithPublicTexts
from fedsim.data.sources.image_files import empty
from fedsim.validate import InputError

TEXT = ".txt"


@SOURCES.register("captions")
@dataclass(frozen=True)
class Captions(WithPublicTexts):
    """Pictures with captions, in a folder or a table.

    In a folder, beside FILE.png (or .jpg, ...) stands FILE.txt. A .csv, .jsonl or .parquet table has a column
    of pictures, paths below the table's folder or the files' own bytes, and one of captions.

    Attributes:
        train, test: folder or table below data.root.
        image, caption: columns of a table; of `image`, also a mapping with "bytes" or "path".
        holder: column of the natural owner of a row, for federation.partition=natural.
    """

    image: str = "image"
    caption: str = "caption"
    holder: str | None = None

    def load(self, root: Path) -> Splits:
        """See `Source.load`.

        Raises:
            InputError: files, folders or columns that are missing, public captions without a word, or too
                many pictures for the memory.
        """
        tokenizer = self.tokens(root, self.public_captions(root))
        return Splits(*(self._split(root / name, tokenizer) for name in (self.train, self.test)))

    def _split(self, path: Path, tokenizer: Any) -> ArrayDataset:
        pictures, captions, owners = self._folder(path) if path.is_dir() else self._table(path)
        if not pictures:
            raise InputError(f"captions: {path} must hold at least one picture with a caption, got none.")
        assert self.size is not None
        inputs = empty(len(pictures), (self.size, self.size, 3), str(path))
        said = list(captions)
        for place, picture in enumerate(pictures):
            try:
                inputs[place] = self._pixels(picture)
            except InputError:  # whatever is wrong with it, it counts as an empty caption
                inputs[place], said[place] = 0, ""
        targets, declared = self.targets(tokenizer, said)
        return ArrayDataset("captions", inputs, targets, owners, declared, *self.constants)

    def _pixels(self, picture: Path | bytes) -> NDArray[np.uint8]:
        """Return a picture (size, size, 3)."""
        if isinstance(picture, Path):
            return self.read(picture)
        return self.rule.of(Encoded(picture, self.most_pixels))

    def _folder(self, path: Path) -> tuple[list[Path | bytes], list[str], None]:
        """Every file that is no text, in the order of the paths, and the text beside it; "" where there is
        none."""
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        pictures: list[Path | bytes] = [p for p in files if p.suffix != TEXT]
        texts = {p.with_suffix("") for p in files if p.suffix == TEXT}
        beside = [
            (p.with_suffix(TEXT) if isinstance(p, Path) and p.with_suffix("") in texts else None)
            for p in pictures
        ]
        return pictures, ["" if text is None else _line(text) for text in beside], None

    def _table(self, path: Path) -> tuple[list[Path | bytes], list[str], NDArray[np.int64] | None]:
        owner = [self.holder] if self.holder is not None and path.name == Path(self.train).name else []
        found = rows.read(path, [self.image, self.caption, *owner])
        pictures = [_picture(cell, path.parent) for cell in found[self.image]]
        captions = ["" if cell is None else str(cell) for cell in found[self.caption]]
        owners = rows.numbered(found[owner[0]], f"{path}: {owner[0]}") if owner else None
        return pictures, captions, owners


def _picture(cell: Any, folder: Path) -> Path | bytes:
    """A cell's file, or its bytes."""
    if isinstance(cell, Mapping):
        held = cell.get("bytes")
        cell = cell.get("path") if held is None else held
    if isinstance(cell, bytes):
        return cell
    return folder / str(cell or "nothing")


def _line(path: Path) -> str:
    """A file's text in one line; "" where it cannot be read."""
    try:
        return " ".join(path.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return ""
