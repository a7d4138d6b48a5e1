"""Composed scenes with captions, as many as are asked for."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data import cache
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.named_pictures import NamedPictures
from fedsim.data.scenes import Scenes
from fedsim.data.sources import SOURCES
from fedsim.data.sources.captioned import Captioned
from fedsim.data.sources.named import Named
from fedsim.rules import SET, read_with
from fedsim.validate import InputError

FEWEST = 4  # pictures a scene can have
_log = logging.getLogger(__name__)


@SOURCES.register("scenes")
@dataclass(frozen=True)
class ComposedScenes(Named, Captioned):
    """Scenes of two to four pictures on a background; the caption says which, where and on what.

    The tokenizer is learned from captions of scenes with public pictures alone; training and test scenes have
    those of `side`. Scenes are drawn once, into a file that is mapped into memory, and the same in every
    process.

    Attributes:
        train, test: scenes in each split.
        public: captions that the tokenizer is learned from.
        size: edge of a scene in pixels.
        owners: natural owners of the training scenes, for federation.partition=natural: each has an album of
            pictures, and scenes of these alone; 0: there are none, and every scene can have any picture.
        album: pictures of an owner.
    """

    train: int = 10_000
    test: int = 1_000
    public: int = 5_000
    size: int | None = 32
    owners: int = 0
    album: int = field(default=12, metadata=read_with(owners=SET))

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.in_range(self.owners, 0, self.train, "data.options.owners", "Each has a scene at least.")
        validate.in_range(self.album, FEWEST, 2**20, "data.options.album")
        self.checked()
        for name in ("train", "test", "public"):
            validate.in_range(getattr(self, name), 1, 2**40, f"data.options.{name}")
        if self.size is None or not 8 <= self.size <= 1024:
            raise InputError(
                f"data.options.size must be 8 .. 1024 pixels, the edge of a scene, got {self.size}."
            )

    def load(self, root: Path) -> Splits:
        """See `Source.load`.

        Raises:
            InputError: pictures that are missing, too few of a side, or a cache that cannot be written.
        """
        pictures = self.both(root)
        public, own = pictures["public"], pictures[self.side]
        for name in ("public", self.side):
            if len(pictures[name]) < FEWEST:
                raise InputError(
                    f"scenes need at least {FEWEST} {name} pictures, got {len(pictures[name])} of "
                    f"{sum(map(len, pictures.values()))}. Change data.options.public_share or "
                    "public_categories, or use more categories."
                )
        if self.owners and self.album > len(own):
            raise InputError(
                f"data.options.album must be at most the {len(own)} {self.side} pictures, got {self.album}."
            )
        tokenizer = self.tokens(root, Scenes(public, self.scenes_seed, "public").captions(self.public))
        return Splits(*(self._split(own, split, tokenizer) for split in ("train", "test")))

    def _split(self, own: NamedPictures, split: str, tokenizer: object) -> ArrayDataset:
        count, owners = (self.train, self.owners) if split == "train" else (self.test, 0)
        made = Scenes(own, self.scenes_seed, split, owners, self.album if owners else 0)
        inputs, captions = self._drawn(made, count)
        targets, declared = self.targets(tokenizer, captions)
        groups = made.owners_of(0, count) if owners else None
        return ArrayDataset("scenes", inputs, targets, groups, declared, *self.constants)

    def _drawn(self, made: Scenes, count: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Return scenes (count, size, size, 3), mapped from a file, and their captions."""
        assert self.size is not None
        named = hashlib.sha256(f"{made.digest()} {count} {self.size}".encode()).hexdigest()[:32]
        path = cache.folder() / f"scenes-{named}.npy"
        said = path.with_name(f"{path.stem}-captions.txt")
        try:
            with cache.locked(path):
                if not path.exists():
                    _log.info("drawing %d scenes into %s", count, path)
                    self._draw(made, count, path, said)
            captions = said.read_text(encoding="utf-8").splitlines()
            inputs = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: the cache of drawn scenes must be readable and writable: {error}. Delete the file, "
                f"or set {cache.FOLDER_VARIABLE} to a folder with room."
            ) from error
        if inputs.shape != (count, self.size, self.size, 3) or len(captions) != count:
            raise InputError(f"{path} is damaged. Delete it; it is made again.")
        return inputs, captions

    def _draw(self, made: Scenes, count: int, path: Path, said: Path) -> None:
        """Write the scenes a block at a time, and their captions first: the pictures' file says that both
        are there."""
        assert self.size is not None
        captions: list[str] = []
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, self.size, self.size, 3)}
        with cache.written(path) as handle:
            np.lib.format.write_array_header_1_0(handle, header)
            for start in range(0, count, BLOCK):
                block = np.empty((min(BLOCK, count - start), self.size, self.size, 3), np.uint8)
                made.fill(block, captions, start)
                handle.write(block.tobytes())
            with cache.written(said) as words:
                words.write("\n".join(captions).encode())


BLOCK = 1024  # scenes
