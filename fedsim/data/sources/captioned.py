"""What sources of pictures with captions share: the public captions, and tokens of all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data import byte_pairs
from fedsim.data.sources.image_files import AT_ONCE, ImageFiles
from fedsim.data.targets import Targets
from fedsim.rules import read_with

LEARNED = "learned"


@dataclass(frozen=True)
class Captioned(ImageFiles):
    """A source whose examples are pictures with captions, for task=captioning.

    Attributes:
        tokenizer: "learned": byte pairs, learned from the public captions when data are loaded; or a
            tokenizer.json below data.root, made from public texts, whose tokens 0, 1 and 2 are padding,
            begin and end.
        vocabulary: of "learned": tokens at most.
        places: tokens a caption has, its end among them; longer ones are cut, and count as cut.
    """

    tokenizer: str = LEARNED
    vocabulary: int = field(default=4096, metadata=read_with(tokenizer=(LEARNED,)))
    places: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.in_range(self.places, 2, 2**16, "data.options.places")
        if self.decode != AT_ONCE:
            validate.conflicts(
                f"pictures with captions are decoded at the start, got data.options.decode={self.decode}.",
                f"Use {AT_ONCE}.",
            )

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
