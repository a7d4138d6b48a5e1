"""Pictures with captions in files: a folder with texts beside the pictures, or a table.

A picture that cannot be read or is not there stays in its place as a blank one with an empty caption: it adds
nothing to any sum, no other example's number moves, and the run counts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data import plain_text, rows
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.pictures.decode import Encoded
from fedsim.data.sources import SOURCES, folders
from fedsim.data.sources.captioned import WithPublicTexts
from fedsim.data.sources.image_files import empty
from fedsim.data.sources.tar_files import ENDINGS
from fedsim.validate import InputError, PrivateInputError

TEXT = ".txt"
NAMED = 5
"""Files that are named in a message."""


@SOURCES.register("captions")
@dataclass(frozen=True)
class Captions(WithPublicTexts):
    """Pictures with captions, in a folder or a table.

    In a folder, beside FILE.png (or .jpg, ...) stands FILE.txt; a text without a picture is an example whose
    picture cannot be read, and a picture without a text one with an empty caption. A .csv, .jsonl or .parquet
    table has a column of pictures, paths below the table's folder or the files' own bytes, and one of
    captions.

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
        parts = ((self.train, True), (self.test, False))
        return Splits(*(self._split(root / name, tokenizer, own) for name, own in parts))

    def private_files(self, root: Path) -> Iterable[Path]:
        """See `WithPublicTexts.private_files`."""
        path = root / self.train
        return [path, *folders.files(path, "captions")] if path.is_dir() else [path]

    def _split(self, path: Path, tokenizer: Any, own: bool) -> ArrayDataset:
        pictures, captions, owners = self._folder(path) if path.is_dir() else self._table(path, own)
        if not pictures:
            raise InputError(f"captions: {path} must hold at least one picture with a caption, got none.")
        assert self.size is not None
        inputs = empty(len(pictures), (self.size, self.size, 3), str(path))
        said, whole = list(captions), np.ones(len(pictures), np.bool_)
        for place, picture in enumerate(pictures):
            try:
                inputs[place] = self._pixels(picture)
            except InputError:  # whatever is wrong with it, no other example's number moves
                inputs[place], said[place], whole[place] = 0, "", False
        targets, declared = self.targets(tokenizer, said)
        return ArrayDataset("captions", inputs, targets, owners, declared, *self.constants, whole=whole)

    def _pixels(self, picture: Path | bytes) -> NDArray[np.uint8]:
        """Return a picture (size, size, 3)."""
        if isinstance(picture, Path):
            return self.read(picture)
        return self.rule.of(Encoded(picture, self.most_pixels))

    def _folder(self, path: Path) -> tuple[list[Path | bytes], list[str], None]:
        """Pictures and their texts in the order of their paths.

        Raises:
            PrivateInputError: files that are neither, or two texts of one name.
        """
        texts: dict[Path, Path] = {}
        others: list[Path] = []
        for file in folders.files(path, "captions"):
            if file.suffix.lower() != TEXT:
                others.append(file)
            elif (name := file.with_suffix("")) in texts:
                raise _wrong(
                    path, "a picture must have one text", f"{texts[name].name} and {file.name}", "one"
                )
            else:
                texts[name] = file
        if strange := [p for p in others if not _is_picture(p) and p.with_suffix("") not in texts]:
            listed = ", ".join(str(p.relative_to(path)) for p in strange[:NAMED])
            raise _wrong(
                path, f"files must be pictures ({', '.join(ENDINGS)}) and texts (txt)", listed, "them"
            )
        alone = set(texts.values()) - {texts.get(p.with_suffix("")) for p in others}
        files = sorted([*others, *alone])
        said = [_line(texts.get(p.with_suffix(""))) for p in files]
        return list[Path | bytes](files), said, None

    def _table(self, path: Path, own: bool) -> tuple[list[Path | bytes], list[str], NDArray[np.int64] | None]:
        owner = [self.holder] if self.holder is not None and own else []
        found = rows.read(path, [self.image, self.caption, *owner])
        pictures = [_picture(cell, path.parent) for cell in found[self.image]]
        captions = [rows.spoken(cell) or "" for cell in found[self.caption]]
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


def _is_picture(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in ENDINGS


def _wrong(path: Path, expected: str, got: str, what: str) -> PrivateInputError:
    said = f"captions: {path}: {expected}"
    return PrivateInputError(f"{said}, got {got}. Remove {what}, or hide it (.NAME).", f"{said}.")


def _line(path: Path | None) -> str:
    """A file's text in one line; "" where there is none, or it cannot be read."""
    try:
        return "" if path is None else " ".join(plain_text.decoded(path.read_bytes()).split())
    except OSError:
        return ""
