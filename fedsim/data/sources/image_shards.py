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

from fedsim import validate
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.pictures import building
from fedsim.data.pictures.building import Sample
from fedsim.data.pictures.stores import Shards
from fedsim.data.sources import SOURCES
from fedsim.data.sources.image_files import AT_ONCE, ON_DEMAND, ImageFiles
from fedsim.data.targets import Targets, class_words
from fedsim.validate import InputError, PrivateInputError

ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")


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
        if self.decode == AT_ONCE:
            raise InputError(
                "data.options.decode of image_shards must be on_demand or packed, got at_once. Leave it out."
            )
        if not self.words:
            raise InputError(
                "data.options.classes must list different words, or be a number above 0, for image_shards, "
                f"got {self.classes!r}. Which classes there can be is declared: which there are is private."
            )
        for name, given in (("target", self.target), ("holder", self.holder)):
            if given is not None and not _ending(given).isalnum():
                raise InputError(
                    f"data.options.{name} must be the ending of a member, such as cls, or json.FIELD, got "
                    f"{given!r}."
                )
        if self.picture is not None:
            validate.one_of(self.picture.lower(), ENDINGS, "data.options.picture")

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
        shards = self._found(root, pattern)
        holder = self.holder if own else None
        reader = _Labels(self.words, self.target, holder)
        texts = sorted({_ending(given) for given in (self.target, holder) if given is not None})
        endings = ENDINGS if self.picture is None else (self.picture.lower(),)
        told = json.dumps([self.words, self.target, holder])
        index = building.of_shards(root, shards, endings, texts, reader, told)
        if "class" not in index:
            raise InputError(f"image_shards: {root}/{pattern} must hold at least one example, got none.")
        declared = Targets("class", len(self.words), self.words)
        groups = index.column("owner") if holder is not None else None
        inputs = self.stored(Shards(root, index))
        return ArrayDataset("image_shards", inputs, index.column("class"), groups, declared, *self.constants)

    def _found(self, root: Path, pattern: str) -> Sequence[Path]:
        try:
            shards = sorted(path for path in root.glob(pattern) if path.is_file())
        except (ValueError, NotImplementedError) as error:  # an absolute pattern, or an empty one
            raise InputError(
                f"image_shards: {pattern!r} must be a pattern below data.root: {error}."
            ) from error
        if not shards:
            raise InputError(
                f"image_shards: expected tar files at {root}/{pattern}, got none. Set data.root, or "
                "data.options.train and test."
            )
        return shards


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
        said = _said(shard, sample, self._target)
        if (place := self._places.get(said)) is None:
            expected = (
                f"{self._target} of every key must be one of the declared classes (data.options.classes)"
            )
            raise _wrong(shard, sample, expected, said)
        if self._holder is None:
            return {"class": place}
        owner = _said(shard, sample, self._holder)
        if not owner.isdecimal() or int(owner) >= 2**32:
            raise _wrong(shard, sample, f"{self._holder} of every key must be the number of its owner", owner)
        return {"class": place, "owner": int(owner)}


def _ending(given: str) -> str:
    return given.partition(".")[0].lower()


def _said(shard: str, sample: Sample, where: str) -> str:
    """Return the word that a member, or a field of one, holds."""
    content = sample.texts.get(_ending(where))
    if content is None:
        raise _wrong(shard, sample, f"every key must have a member {_ending(where)}", "none")
    text = content.decode("utf-8", "replace").strip()
    field_name = where.partition(".")[2]
    if not field_name:
        return text
    try:
        return str(json.loads(text)[field_name])
    except (ValueError, KeyError, TypeError) as error:
        raise _wrong(
            shard, sample, f"the json of every key must have a field {field_name}", "none"
        ) from error


def _wrong(shard: str, sample: Sample, expected: str, got: str) -> PrivateInputError:
    return PrivateInputError(
        f"{shard}, {sample.key}: {expected}, got {got!r}. Mend it, or leave it out.",
        f"{shard}: {expected}. Mend it, or leave it out.",
    )
