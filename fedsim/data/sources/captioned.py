"""What sources of pictures with captions share: the public captions, and tokens of all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data import byte_pairs, plain_text
from fedsim.data.sources.image_files import AT_ONCE, ImageFiles
from fedsim.data.targets import Targets
from fedsim.rules import read_with
from fedsim.validate import InputError

LEARNED = "learned"


@dataclass(frozen=True)
class Captioned(ImageFiles):
    """A source whose examples are pictures with captions, for task=captioning.

    Attributes:
        tokenizer: "learned": byte pairs, learned from the public captions when data are loaded; or a
            tokenizer.json below data.root, made from public texts, whose tokens 0, 1 and 2 are padding,
            begin and end.
        vocabulary: of "learned": tokens up to which pairs are joined; every letter of the public captions has
            one besides.
        places: tokens a caption has, its end among them; longer ones are cut, and count as cut.
    """

    tokenizer: str = LEARNED
    vocabulary: int = field(default=4096, metadata=read_with(tokenizer=(LEARNED,)))
    places: int = 40

    in_files: ClassVar[bool] = False
    """Whether pictures stay in their files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.in_range(self.places, 2, 2**16, "data.options.places")
        if self.decode != AT_ONCE and not self.in_files:
            validate.conflicts(
                "pictures with captions of a folder or table, and scenes, are decoded at the start, got "
                f"data.options.decode={self.decode}.",
                f"Use {AT_ONCE}, or data.name=caption_shards: tar files, decoded on demand.",
            )

    def assumed_public(self) -> tuple[str, ...]:
        """See `Source.assumed_public`."""
        return (*super().assumed_public(), "the captions or texts that the tokenizer was learned from")

    def tokens(self, root: Path, public: Iterable[str]) -> Any:
        """Return the tokenizer.

        Args:
            root: data.root.
            public: captions it may be learned from; not read where it is from a file.

        Raises:
            InputError: as `byte_pairs.learned` and `read`.
        """
        if self.tokenizer != LEARNED:
            return byte_pairs.read(root / self.tokenizer)
        return byte_pairs.learned(public, self.vocabulary)

    def targets(self, tokenizer: Any, captions: list[str]) -> tuple[NDArray[np.int64], Targets]:
        """Return the target tokens (N, places) of captions, and their declaration, which names the tokens."""
        named = byte_pairs.names(tokenizer)
        return byte_pairs.targets(tokenizer, captions, self.places), Targets("tokens", len(named), named)


@dataclass(frozen=True)
class WithPublicTexts(Captioned):
    """A source of pictures with captions that others wrote; public ones are in files apart.

    Attributes:
        train, test: where the examples are, below data.root.
        public: text files below data.root, a public caption a line, which the tokenizer is learned from.
    """

    train: str = "train"
    test: str = "test"
    public: list[str] = field(default_factory=list, metadata=read_with(tokenizer=(LEARNED,)))
    size: int | None = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is None:
            raise InputError(
                "data.options.size must be the edge in pixels that every picture is brought to, got null."
            )
        if self.tokenizer == LEARNED and not self.public:
            raise InputError(
                "data.options.public must list files of public captions to learn the vocabulary from, got "
                "none: one learned from private captions would tell what they hold. Or set "
                "data.options.tokenizer to a tokenizer.json made from public texts."
            )

    def private_files(self, root: Path) -> Iterable[Path]:
        """Return files and folders that the training examples lie in, as far as they are there."""
        return [root / self.train]

    def public_captions(self, root: Path) -> Iterator[str]:
        """Yield the public captions, a line each.

        Raises:
            InputError: a file that cannot be read, or that is one of the training examples' or in their
                folder, by whatever name and link.
        """
        if self.public:
            self._check_apart(root)
        for name in self.public:
            try:
                with open(root / name, "rb") as handle:
                    start = handle.read(plain_text.LONGEST)
                with open(root / name, encoding=plain_text.encoding_of(start), errors="replace") as lines:
                    yield from lines
            except OSError as error:
                raise InputError(f"{root / name} must be a file of public captions: {error}.") from error

    def _check_apart(self, root: Path) -> None:
        """Refuse public files that are private ones: a vocabulary learned from them would tell of them."""
        inodes: set[tuple[int, int]] = set()
        folders: list[Path] = []
        for path in self.private_files(root):
            with contextlib.suppress(OSError):  # what is not there is said by who reads it
                status, real = os.stat(path), Path(os.path.realpath(path))
                inodes.add((status.st_dev, status.st_ino))
                folders.append(real)
        for name in self.public:
            real = Path(os.path.realpath(root / name))
            try:
                status = os.stat(real)
            except OSError:
                continue
            if (status.st_dev, status.st_ino) in inodes or any(real.is_relative_to(f) for f in folders):
                raise InputError(
                    "data.options.public must not name the training examples, which are private, and "
                    f"{name} is among them or in their folder. Put public captions elsewhere."
                )
