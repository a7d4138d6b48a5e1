"""Pictures with captions in tar files, as WebDataset lays them out: the members KEY.jpg, KEY.txt are one
example.

Nothing of them is in memory: an index says where picture and text of each are, and a file has the tokens.
Both are made when the tar files are first seen. A picture that is none adds nothing to any sum, nor does a
caption that is missing, empty or unreadable; either keeps its place, and is counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedsim.data import byte_pairs, token_rows
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.pictures import building
from fedsim.data.pictures.building import Sample
from fedsim.data.pictures.stores import Shards
from fedsim.data.pictures.tar import BLOCK
from fedsim.data.sources import SOURCES, tar_files
from fedsim.data.sources.captioned import WithPublicTexts
from fedsim.data.sources.image_files import ON_DEMAND
from fedsim.data.targets import Targets
from fedsim.validate import InputError

TEXT_START, TEXT_SIZE = "text_start", "text_size"


@SOURCES.register("caption_shards")
@dataclass(frozen=True)
class CaptionShards(WithPublicTexts):
    """Pictures with captions in tar files, KEY.jpg beside KEY.txt or KEY.json, decoded on demand.

    Attributes:
        train, test: tar files below data.root, as a pattern with * and ?.
        caption: ending of the member that is the caption; or json.FIELD for a field of KEY.json.
        picture: ending of the picture, where a key has several; null: any of jpg, png, webp, ...
        holder: ending, or json.FIELD, of the number of the natural owner, from 0, for
            federation.partition=natural; null: there are none.
        decode: on_demand or packed, see the base; never at_once.
    """

    decode: str = ON_DEMAND
    train: str = "train*.tar"
    test: str = "test*.tar"
    caption: str = "txt"
    picture: str | None = None
    holder: str | None = None

    in_files: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        tar_files.check("caption_shards", self.decode, self.picture, caption=self.caption, holder=self.holder)

    def load(self, root: Path) -> Splits:
        """See `Source.load`; reads every tar file once where there is no index of it.

        Raises:
            InputError: no tar file, one that is damaged, or public captions without a word.
            PrivateInputError: samples that are not in the form, or an owner that is no number.
        """
        tokenizer = self.tokens(root, self.public_captions(root))
        train, test = ((self.train, True), (self.test, False))
        return Splits(self._split(root, *train, tokenizer), self._split(root, *test, tokenizer))

    def private_files(self, root: Path) -> Iterable[Path]:
        """See `WithPublicTexts.private_files`."""
        return tar_files.found(root, self.train, "caption_shards")

    def _split(self, root: Path, pattern: str, own: bool, tokenizer: Any) -> ArrayDataset:
        shards = tar_files.found(root, pattern, "caption_shards")
        holder = self.holder if own else None
        texts = sorted({tar_files.ending(given) for given in (self.caption, holder) if given is not None})
        told = json.dumps(["captions", tar_files.ending(self.caption), holder])
        reader = _Places(self.caption, holder)
        index = building.of_shards(root, shards, tar_files.pictures(self.picture), texts, reader, told)
        if TEXT_START not in index:
            raise InputError(f"caption_shards: {root}/{pattern} must hold at least one example, got none.")
        texts_of = Shards(root, index, TEXT_START, TEXT_SIZE)

        def said(places: range) -> list[str]:
            return [self._caption(texts_of.read(place)) for place in places]

        from_text = f"{index.path.stem} {self.caption}"
        targets = token_rows.kept(tokenizer, said, len(texts_of), self.places, from_text)
        named = byte_pairs.names(tokenizer)
        declared = Targets("tokens", len(named), named)
        groups = index.column("owner") if holder is not None else None
        inputs = self.stored(Shards(root, index))
        return ArrayDataset("caption_shards", inputs, targets, groups, declared, *self.constants)

    def _caption(self, content: bytes) -> str:
        """The caption that a member holds, in one line; "" where it has none."""
        return " ".join((tar_files.word(content, self.caption) or "").split())


class _Places:
    """Where the text of a key is, and whose the key is.

    Args:
        caption, holder: where they stand, as the options have it; no owner: None.
    """

    def __init__(self, caption: str, holder: str | None) -> None:
        self._ending, self._holder = tar_files.ending(caption), holder

    def __call__(self, shard: str, sample: Sample) -> dict[str, int]:
        """Return the place of a sample's text, 0 and 0 where it has none, and its owner."""
        text = sample.members.get(self._ending)
        found = {
            TEXT_START: 0 if text is None else text.start // BLOCK,
            TEXT_SIZE: 0 if text is None else text.size,
        }
        if self._holder is None:
            return found
        return found | {"owner": tar_files.owner(shard, sample, self._holder)}
