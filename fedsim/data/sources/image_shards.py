"""Images in tar files, as WebDataset lays them out: the members KEY.jpg, KEY.cls are one example.

The order of examples, and so their ids, is that of the tar files by name and of the members within. An index
says where each image is (`fedsim.data.pictures`); it is made when the files are first seen, by reading them
once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.pictures import building
from fedsim.data.pictures.building import Sample
from fedsim.data.pictures.stores import Shards
from fedsim.data.sources import SOURCES, tar_files
from fedsim.data.sources.image_files import ON_DEMAND, ImageFiles
from fedsim.data.targets import Targets, class_words
from fedsim.validate import InputError


@SOURCES.register("image_shards")
@dataclass(frozen=True)
class ImageShards(ImageFiles):
    """Images in tar files, KEY.jpg beside KEY.cls, KEY.txt or KEY.json, decoded on demand.

    Attributes:
        train, test: tar files below data.root, as a pattern with * and ?.
        classes: declared words in the order of their numbers, or how many there are, written as 0, 1, ...
        target: ending of the member that holds the class: cls or txt; or json.FIELD for a field of KEY.json.
        picture: ending of the image, where a key has several; null: any of jpg, png, webp, ...
        holder: ending, or json.FIELD, of the number of the natural owner, from 0, for
            federation.partition=natural; null: there are none.
        decode: on_demand or packed, see the base; never at_once.
    """

    decode: str = ON_DEMAND
    train: str = "train*.tar"
    test: str = "test*.tar"
    classes: Any = None
    target: str = "cls"
    picture: str | None = None
    holder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        tar_files.check("image_shards", self.decode, self.picture, target=self.target, holder=self.holder)
        if not self.words:
            raise InputError(
                "data.options.classes must list different words, or be a number above 0, for image_shards, "
                f"got {self.classes!r}. Which classes there can be is declared: which there are is private."
            )

    @property
    def words(self) -> tuple[str, ...]:
        """The declared classes; none where the declaration is no such thing."""
        return class_words(self.classes)

    def load(self, root: Path) -> Splits:
        """See `Source.load`; reads every tar file once where there is no index of it.

        Raises:
            InputError: no tar file, or one that is damaged.
            PrivateInputError: an example without a declared class, or an owner that is no number.
        """
        return Splits(self._split(root, self.train, own=True), self._split(root, self.test, own=False))

    def _split(self, root: Path, pattern: str, own: bool) -> ArrayDataset:
        shards = tar_files.found(root, pattern, "image_shards")
        holder = self.holder if own else None
        reader = _Labels(self.words, self.target, holder)
        texts = sorted({tar_files.ending(given) for given in (self.target, holder) if given is not None})
        told = json.dumps([self.words, self.target, holder])
        index = building.of_shards(root, shards, tar_files.pictures(self.picture), texts, reader, told)
        if "class" not in index:
            raise InputError(f"image_shards: {root}/{pattern} must hold at least one example, got none.")
        declared = Targets("class", len(self.words), self.words)
        groups = index.column("owner") if holder is not None else None
        inputs = self.stored(Shards(root, index))
        return ArrayDataset("image_shards", inputs, index.column("class"), groups, declared, *self.constants)


class _Labels:
    """What the members of a key say beside the image: its class, and its owner.

    Args:
        words: declared classes.
        target, holder: where they stand, as the options have it; no owner: None.
    """

    def __init__(self, words: Sequence[str], target: str, holder: str | None) -> None:
        self._places = {word: place for place, word in enumerate(words)}
        self._target, self._holder = target, holder

    def __call__(self, shard: str, sample: Sample) -> dict[str, int]:
        """Return class and owner of a sample.

        Raises:
            PrivateInputError: it lacks one, or has one that is not as declared.
        """
        said = tar_files.said(shard, sample, self._target)
        if (place := self._places.get(said)) is None:
            expected = (
                f"{self._target} of every key must be one of the declared classes (data.options.classes)"
            )
            raise tar_files.wrong(shard, sample, expected, said)
        if self._holder is None:
            return {"class": place}
        return {"class": place, "owner": tar_files.owner(shard, sample, self._holder)}
