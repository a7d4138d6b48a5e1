"""Pictures with names, alone on a background: classes to look at what an encoder of scenes has learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedsim import validate
from fedsim.data import named_pictures, scenes
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.named_pictures import NamedPictures
from fedsim.data.scenes import Scenes
from fedsim.data.sources import SOURCES
from fedsim.data.sources.base import Source
from fedsim.data.sources.image_files import HALF
from fedsim.data.targets import Targets
from fedsim.rules import read_with
from fedsim.validate import InputError

SHAPES = "shapes"
SIDES = ("private", "public")


@dataclass(frozen=True)
class Named(Source):
    """What sources of pictures with names share: which pictures there are, and which of them are public.

    Attributes:
        pictures: "shapes": drawn here, in colours; or a folder below data.root with pictures.npy and
            pictures.csv, such as `emoji` after python -m fedsim.data.fetch emoji.
        categories: of the pictures that are used; none: all.
        public_share: of the pictures, that is public: each by its own name.
        public_categories: whose pictures are public, and all others private; none: by public_share.
        side: which pictures are shown: "private" or "public".
        scenes_seed: of all draws; another one gives other scenes of the same pictures.
    """

    pictures: str = SHAPES
    categories: list[str] = field(default_factory=list)
    public_share: float = field(default=0.3, metadata=read_with(public_categories=([],)))
    public_categories: list[str] = field(default_factory=list)
    side: str = "private"
    scenes_seed: int = 0

    def checked(self) -> None:
        """Refuse options out of range.

        Raises:
            InputError: names the option.
        """
        validate.one_of(self.side, SIDES, "data.options.side")
        validate.in_range(self.public_share, 1e-6, 1.0 - 1e-6, "data.options.public_share")

    def assumed_public(self) -> tuple[str, ...]:
        """See `Source.assumed_public`."""
        return (*super().assumed_public(), "the pictures of the public side")

    def both(self, root: Path) -> dict[str, NamedPictures]:
        """Return the pictures of each side.

        Raises:
            InputError: pictures that are missing, or a category that none has.
        """
        named = self.pictures
        held = named_pictures.shapes() if named == SHAPES else named_pictures.read(root / named)
        if self.categories:
            for kind in self.categories:
                validate.one_of(kind, sorted(set(held.categories)), "every one of data.options.categories")
            held = held.among(np.array([kind in self.categories for kind in held.categories]))
        for kind in self.public_categories:
            known = sorted(set(held.categories))
            validate.one_of(kind, known, "every one of data.options.public_categories")
        public, private = scenes.sides(held, self.public_share, self.public_categories)
        return {"public": public, "private": private}


@SOURCES.register("named_pictures")
@dataclass(frozen=True)
class SinglePictures(Named):
    """One picture of a side on a background of scenes, of any size and anywhere; its class is its category.

    Attributes:
        train, test: examples in each split, other draws of the same pictures.
        size: edge of an example in pixels.
    """

    train: int = 2000
    test: int = 2000
    size: int = 32

    def __post_init__(self) -> None:
        self.checked()
        validate.in_range(self.size, 8, 1024, "data.options.size")
        for split in ("train", "test"):
            validate.in_range(getattr(self, split), 1, 2**31, f"data.options.{split}")

    def load(self, root: Path) -> Splits:
        """See `Source.load`.

        Raises:
            InputError: also where the side has fewer than two categories, which are no classes.
        """
        own = self.both(root)[self.side]
        kinds = sorted(set(own.categories))
        if len(kinds) < 2:
            raise InputError(
                f"classes need at least 2 categories of {self.side} pictures, got {len(kinds)}. Change "
                "data.options.categories, public_categories or public_share."
            )
        return Splits(*(self._split(own, kinds, split) for split in ("train", "test")))

    def _split(self, own: NamedPictures, kinds: list[str], split: str) -> ArrayDataset:
        made, count = Scenes(own, self.scenes_seed, split), getattr(self, split)
        images = np.empty((count, self.size, self.size, 3), np.uint8)
        labels = np.empty(count, np.int64)
        for number in range(count):
            plan = made.alone(number)
            images[number] = made.draw(plan, self.size)
            labels[number] = kinds.index(own.categories[plan.pictures[0]])
        declared = Targets("class", len(kinds), tuple(kinds))
        return ArrayDataset("named_pictures", images, labels, None, declared, HALF, HALF)
