"""Composed scenes: two to four pictures on a background, and a caption that says which, where and on what.

"a small dog left of a red apple on grass". Scene i of a corpus follows from (seed, purpose, i) alone, so a
larger corpus begins with the smaller one, and any scene can be made on its own. Everything is drawn from
counter-based streams and put together in integers: the same bytes wherever Pillow resizes alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds
from fedsim.data.named_pictures import NamedPictures

VERSION = 1
BACKGROUNDS = {
    "grass": (96, 158, 72),
    "sand": (222, 200, 150),
    "water": (70, 140, 190),
    "snow": (236, 240, 246),
    "asphalt": (90, 92, 98),
    "wood": (150, 108, 66),
    "brick": (168, 84, 64),
    "a night sky": (24, 28, 60),
}
GRAIN = 12  # largest change of a background's pixel
SIZES = {"small ": (0.50, 0.62), "": (0.72, 0.84), "large ": (0.94, 1.0)}
"""What is said of a picture, and the range of its edge as a share of its cell."""
ALONE = (0.35, 0.70)  # range of the edge of a picture that stands alone, as a share of the whole


@dataclass(frozen=True)
class Layout:
    """Where pictures stand, and how that is said.

    Attributes:
        cells: (left, top, edge) of each picture's square, as shares of the scene's edge.
        said: ways to say it; {0}, {1}, ... are the pictures.
    """

    cells: tuple[tuple[float, float, float], ...]
    said: tuple[str, ...]


_HALF, _THIRD = 0.5, 1.0 / 3.0
LAYOUTS = (
    Layout(((0.0, 0.25, _HALF), (_HALF, 0.25, _HALF)), ("{0} left of {1}", "{1} right of {0}")),
    Layout(((0.25, 0.0, _HALF), (0.25, _HALF, _HALF)), ("{0} above {1}", "{1} below {0}")),
    Layout(((0.25, 0.0, _HALF), (0.0, _HALF, _HALF), (_HALF, _HALF, _HALF)), ("{0} above {1} and {2}",)),
    Layout(((0.0, 0.0, _HALF), (_HALF, 0.0, _HALF), (0.25, _HALF, _HALF)), ("{2} below {0} and {1}",)),
    Layout(
        ((0.0, _THIRD, _THIRD), (_THIRD, _THIRD, _THIRD), (2 * _THIRD, _THIRD, _THIRD)),
        ("{1} between {0} and {2}",),
    ),
    Layout(
        ((0.0, 0.0, _HALF), (_HALF, 0.0, _HALF), (0.0, _HALF, _HALF), (_HALF, _HALF, _HALF)),
        ("{0} and {1} above {2} and {3}",),
    ),
)


@dataclass(frozen=True)
class Plan:
    """What a scene shows, before it is drawn.

    Attributes:
        background: a key of BACKGROUNDS.
        layout: where pictures stand.
        pictures: numbers of them.
        sizes: keys of SIZES.
        boxes: (left, top, edge) of each picture, as shares of the scene's edge.
        caption: in words.
        key: of the background's grain.
    """

    background: str
    layout: Layout
    pictures: tuple[int, ...]
    sizes: tuple[str, ...]
    boxes: tuple[tuple[float, float, float], ...]
    caption: str
    key: bytes


@dataclass(frozen=True, eq=False)
class Scenes:
    """A corpus of scenes of some pictures.

    Attributes:
        pictures: that scenes can have.
        seed: of all draws.
        purpose: keeps its draws apart from those of other corpora.
        owners: natural owners of the scenes, each with an album of its own; 0: there are none, and every
            scene can have any picture.
        album: pictures of an owner.
    """

    pictures: NamedPictures
    seed: int
    purpose: str
    owners: int = 0
    album: int = 0
    _albums: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    _sizes: dict[tuple[int, int], NDArray[np.uint32]] = field(default_factory=dict)

    def plan(self, number: int) -> Plan:
        """Return what scene `number` shows."""
        key = seeds.derive(self.seed, f"scenes {self.purpose}", number)
        draw = seeds.generator(key)
        layout = LAYOUTS[_kind(draw)]
        count = len(layout.cells)
        own = self._album_of(number)
        some = draw.choice(len(self.pictures) if own is None else len(own), count, replace=False)
        chosen = tuple((some if own is None else own[some]).tolist())
        sizes = tuple(list(SIZES)[place] for place in draw.integers(0, len(SIZES), count))
        boxes = []
        for (left, top, edge), size in zip(layout.cells, sizes, strict=True):
            high = edge * float(draw.uniform(*SIZES[size]))
            spare = edge - high
            boxes.append((left + spare * float(draw.random()), top + spare * float(draw.random()), high))
        background = list(BACKGROUNDS)[int(draw.integers(len(BACKGROUNDS)))]
        things = [
            with_article(f"{size}{self.pictures.names[picture]}")
            for picture, size in zip(chosen, sizes, strict=True)
        ]
        said = layout.said[int(draw.integers(len(layout.said)))].format(*things)
        caption = f"{said} on {background}"
        return Plan(background, layout, chosen, sizes, tuple(boxes), caption, key)

    def alone(self, number: int) -> Plan:
        """Return picture `number` of those that stand alone: one, of any size, anywhere, without words."""
        key = seeds.derive(self.seed, f"scenes {self.purpose}: alone", number)
        draw = seeds.generator(key)
        picture, background = int(draw.integers(len(self.pictures))), int(draw.integers(len(BACKGROUNDS)))
        edge = float(draw.uniform(*ALONE))
        left, top = (float(draw.random()) * (1.0 - edge) for _ in range(2))
        box = (left, top, edge)
        return Plan(list(BACKGROUNDS)[background], Layout((box,), ()), (picture,), ("",), (box,), "", key)

    def owners_of(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the owners (count,) of scenes from `first` on: one of the first scenes each, others drawn
        evenly."""
        places = np.arange(first, first + count)
        words = seeds.words(seeds.derive(self.seed, f"scenes {self.purpose}: owners"), first, count)
        drawn = (words % np.uint64(self.owners)).astype(np.int64)
        return np.where(places < self.owners, places, drawn)

    def _album_of(self, number: int) -> NDArray[np.int64] | None:
        """Return the pictures of the owner of a scene; None where there are no owners."""
        if not self.owners:
            return None
        owner = int(self.owners_of(number, 1)[0])
        if owner not in self._albums:
            draw = seeds.stream(self.seed, f"scenes {self.purpose}: album", owner)
            self._albums[owner] = np.sort(draw.choice(len(self.pictures), self.album, replace=False))
        return self._albums[owner]

    def captions(self, count: int) -> Iterator[str]:
        """Yield the captions of scenes 0 .. count - 1."""
        return (self.plan(number).caption for number in range(count))

    def draw(self, plan: Plan, edge: int) -> NDArray[np.uint8]:
        """Return the scene as (edge, edge, 3)."""
        grain = seeds.words(plan.key, 0, -(-edge * edge // 8)).view(np.uint8)[: edge * edge]
        shade = grain.reshape(edge, edge, 1).astype(np.int64) * (2 * GRAIN + 1) // 256 - GRAIN
        scene = np.clip(np.array(BACKGROUNDS[plan.background], np.int64) + shade, 0, 255)
        for picture, (left, top, own) in zip(plan.pictures, plan.boxes, strict=True):
            small = self._at(picture, max(1, round(own * edge)))
            x, y = (min(round(place * edge), edge - len(small)) for place in (left, top))
            behind = scene[y : y + len(small), x : x + len(small)]
            behind *= 255 - small[..., 3:]
            behind += small[..., :3].astype(np.int64) * 255 + 127  # covered shares of colours are in them
            behind //= 255
        return np.minimum(scene, 255).astype(np.uint8)

    def _at(self, picture: int, edge: int) -> NDArray[np.uint32]:
        """Return a picture (edge, edge, 4), its colours multiplied by what they cover."""
        if (picture, edge) not in self._sizes:
            from PIL import Image

            whole = Image.fromarray(np.ascontiguousarray(self.pictures.pixels[picture])).convert("RGBa")
            small = whole.resize((edge, edge), Image.Resampling.BOX)
            channels = np.frombuffer(small.tobytes(), np.uint8).reshape(edge, edge, 4)
            self._sizes[picture, edge] = channels.astype(np.uint32)
        return self._sizes[picture, edge]

    def fill(self, out: NDArray[np.uint8], captions: list[str], first: int = 0) -> None:
        """Draw scenes `first` and on into (n, edge, edge, 3), and add their captions to the list."""
        for place in range(len(out)):
            plan = self.plan(first + place)
            out[place] = self.draw(plan, out.shape[1])
            captions.append(plan.caption)

    def digest(self) -> str:
        """Return what the scenes follow from, Pillow's version among it."""
        import PIL

        held = f"{VERSION} {PIL.__version__} {self.seed} {self.purpose} {self.pictures.digest()}"
        held += f" {self.owners} albums of {self.album}" if self.owners else ""
        return hashlib.sha256(held.encode()).hexdigest()


def _kind(draw: np.random.Generator) -> int:
    """Two pictures in half of the scenes, three in three tenths, four in the rest."""
    return int(draw.choice(len(LAYOUTS), p=(0.25, 0.25, 0.1, 0.1, 0.1, 0.2)))


def with_article(thing: str) -> str:
    """Return "a dog" or "an apple"."""
    return f"{'an' if thing[:1] in 'aeiou' else 'a'} {thing}"


def sides(
    pictures: NamedPictures, public_share: float, public_categories: Collection[str] = ()
) -> tuple[NamedPictures, NamedPictures]:
    """Return public and private pictures: each by a hash of its own name, so that no other one moves it, or
    by its category where some are public."""
    if public_categories:
        cut = np.array([kind in public_categories for kind in pictures.categories])
    else:
        cut = np.array([_place(name) < public_share for name in pictures.names])
    return pictures.among(cut), pictures.among(~cut)


def _place(name: str) -> float:
    return int.from_bytes(hashlib.sha256(f"fedsim scenes {name}".encode()).digest()[:8], "big") / 2**64
