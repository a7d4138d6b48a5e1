"""Scenes: as their captions say, the same again, public and private pictures apart (budget: 10 s)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedsim.config import DataConfig, FederationConfig
from fedsim.data import byte_pairs, cache, datasets, named_pictures, scenes
from fedsim.data.named_pictures import COLOURS, NamedPictures
from fedsim.data.partition import partition
from fedsim.data.scenes import ALONE, BACKGROUNDS, GRAIN, LAYOUTS, Scenes
from fedsim.merging import Choice
from fedsim.partitions import Material
from fedsim.validate import InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "cache"))


def few(count: int = 8) -> NamedPictures:
    """One picture a colour: solid squares, so that each can be found in a scene by its colour."""
    chosen = [f"{colour} square" for colour in list(COLOURS)[:count]]
    held = named_pictures.shapes()
    return held.among(np.array([name in chosen for name in held.names]))


def test_scenes_are_the_same_again_and_a_larger_corpus_begins_with_the_smaller() -> None:
    first, again = (Scenes(named_pictures.shapes(), 3, "train") for _ in range(2))
    small, large = np.empty((4, 24, 24, 3), np.uint8), np.empty((9, 24, 24, 3), np.uint8)
    said: list[str] = []
    more: list[str] = []
    first.fill(small, said)
    again.fill(large[:7], more)
    again.fill(large[7:], more, first=7)
    np.testing.assert_array_equal(small, large[:4])
    assert said == more[:4]
    assert more == list(first.captions(9))
    np.testing.assert_array_equal(large[8], first.draw(first.plan(8), 24))
    assert list(Scenes(named_pictures.shapes(), 4, "train").captions(4)) != said
    assert list(Scenes(named_pictures.shapes(), 3, "test").captions(4)) != said


def test_owners_have_albums_of_their_own_and_each_a_scene() -> None:
    """A scene has pictures of its owner's album alone."""
    held, owners, album, count = named_pictures.shapes(), 7, 9, 400
    made = Scenes(held, 3, "train", owners, album)
    whose = made.owners_of(0, count)
    assert whose[:owners].tolist() == list(range(owners))
    assert np.array_equal(made.owners_of(5, 40), whose[5:45]), "each scene can be asked for alone"
    used: dict[int, set[int]] = {owner: set() for owner in range(owners)}
    for number, owner in enumerate(whose.tolist()):
        used[owner] |= set(made.plan(number).pictures)
    assert all(len(pictures) == album for pictures in used.values()), "all of it is used, and nothing else"
    assert len({frozenset(pictures) for pictures in used.values()}) == owners
    again = Scenes(held, 3, "train", owners, album)
    assert again.plan(123).caption == made.plan(123).caption
    assert np.bincount(whose).min() > count / owners / 2
    plain = Scenes(held, 3, "train")
    assert made.digest() != plain.digest() != Scenes(held, 3, "train", owners, 10).digest()
    assert plain.digest() == Scenes(held, 3, "train", 0, 0).digest()


def test_natural_holders_of_scenes_are_their_owners(tmp_path: Path) -> None:
    options = {"size": 16, "places": 16, "vocabulary": 96, "train": 60, "test": 10, "public": 50, "owners": 6}
    splits = datasets.load(DataConfig("scenes", options, str(tmp_path)))
    groups = splits.train.groups
    assert groups is not None
    assert splits.test.groups is None
    chosen = FederationConfig(holders=6, partition=Choice("natural"))
    found = partition(Material(60, None, groups), chosen, 0)
    assert np.array_equal(found.holder_of, groups)
    for wrong, said in (
        ({"owners": 61}, "data.options.owners"),
        ({"album": 3}, "data.options.album"),
        ({"album": 10_000}, "must be at most the"),
        ({"owners": 0, "album": 8}, "data.options.album"),
    ):
        with pytest.raises(InputError, match=said):
            datasets.load(DataConfig("scenes", options | wrong, str(tmp_path)))


def centre(scene: NDArray[np.uint8], colour: str) -> tuple[float, float, int]:
    """Mean place (across, down) and number of a colour's pixels."""
    same = (np.abs(scene.astype(int) - np.array(COLOURS[colour])) <= 1).all(2)
    down, across = np.nonzero(same)
    return float(across.mean()), float(down.mean()), len(across)


def test_a_caption_says_where_its_pictures_are() -> None:
    """By the pixels: of each square's own colour, after the caption alone."""
    made, seen, sized = Scenes(few(), 0, "train"), set(), 0
    for number in range(150):
        plan = made.plan(number)
        scene, where, on = made.draw(plan, 48), *plan.caption.rsplit(" on ", 1)
        assert on == plan.background
        words = where.replace("a large ", "a ").replace("a small ", "a ").replace("an ", "a ")
        colours = [word for word in words.split() if word in COLOURS]
        places = [centre(scene, colour) for colour in colours]
        for size, (_, _, pixels) in zip(where.split("square")[:-1], places, strict=True):
            if len(colours) == 2 and "small" in size:
                assert pixels < 0.8**2 * 24**2 * 0.45
            if len(colours) == 2 and "large" in size:
                assert pixels > 0.8**2 * 24**2 * 0.75
                sized += 1
        (x, y), rest = zip(*(place[:2] for place in places), strict=True), where
        for relation in ("left of", "right of", "above", "below", "between"):
            if relation in rest:
                seen.add((relation, len(colours)))
                first = rest.split(relation)[0].count("square")
                if relation == "left of":
                    assert x[0] < x[1]
                elif relation == "right of":
                    assert x[0] > x[1]
                elif relation == "above":
                    assert max(y[:first]) < min(y[first:])
                elif relation == "below":
                    assert min(y[:first]) > max(y[first:])
                else:
                    assert x[1] < x[0] < x[2]
    assert sized > 10
    assert seen == {
        ("left of", 2), ("right of", 2), ("above", 2), ("below", 2),
        ("above", 3), ("below", 3), ("between", 3), ("above", 4),
    }  # fmt: skip
    assert {len(layout.cells) for layout in LAYOUTS} == {2, 3, 4}


def scene_config(root: Path, **options: object) -> DataConfig:
    given = {"train": 30, "test": 10, "public": 50, "size": 16, "vocabulary": 200, **options}
    return DataConfig(name="scenes", root=str(root), options=given)


def test_the_source_draws_once_and_its_sides_share_no_picture(tmp_path: Path) -> None:
    found = datasets.load(scene_config(tmp_path))
    files = sorted((tmp_path / "cache").glob("*.npy"))
    assert len(files) == 2
    stamps = [file.stat().st_mtime_ns for file in files]
    datasets._load.cache_clear()
    again = datasets.load(scene_config(tmp_path))
    np.testing.assert_array_equal(found.train.inputs, again.train.inputs)
    np.testing.assert_array_equal(found.train.targets, again.train.targets)
    assert [file.stat().st_mtime_ns for file in files] == stamps
    public, private = scenes.sides(named_pictures.shapes(), 0.3)
    assert not set(public.names) & set(private.names)
    assert 0.2 < len(public) / len(named_pictures.shapes()) < 0.4
    named = found.train.declared.names
    for side, held in (("private", private), ("public", public)):
        split = datasets.load(scene_config(tmp_path, side=side)).train
        assert split.declared.names == named, "the vocabulary is that of public captions"
        for row in split.targets:
            caption = byte_pairs.words(row.tolist(), named)
            assert any(name in caption for name in held.names)
    caption = byte_pairs.words(found.train.targets[0].tolist(), named)
    assert caption == next(Scenes(private, 0, "train").captions(1))


def test_the_vocabulary_of_scenes_does_not_depend_on_private_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = datasets.load(scene_config(tmp_path)).train.declared
    held = named_pictures.shapes()
    public, _ = scenes.sides(held, 0.3)
    renamed = NamedPictures(
        held.pixels,
        tuple(name if name in public.names else f"{name} zebra" for name in held.names),
        held.categories,
    )
    datasets._load.cache_clear()
    monkeypatch.setattr(scenes, "sides", lambda *_: (public, renamed))
    assert datasets.load(scene_config(tmp_path)).train.declared == before


def test_pictures_are_read_from_files_and_chosen_by_category(tmp_path: Path) -> None:
    held = named_pictures.shapes()
    folder = tmp_path / "some"
    folder.mkdir()
    np.save(folder / named_pictures.PIXELS, held.pixels)
    with open(folder / named_pictures.NAMES, "w", newline="") as handle:
        table = csv.writer(handle)
        table.writerows([("name", "category"), *zip(held.names, held.categories, strict=True)])
    assert named_pictures.read(folder).digest() == held.digest()
    found = datasets.load(scene_config(tmp_path, pictures="some", categories=["ring", "moon"]))
    named = found.train.declared.names
    for row in found.train.targets:
        caption = byte_pairs.words(row.tolist(), named)
        assert "ring" in caption or "moon" in caption
        assert "square" not in caption
    with pytest.raises(InputError, match="square"):
        datasets.load(scene_config(tmp_path, categories=["squares"]))
    with pytest.raises(InputError, match="at least 4"):
        datasets.load(scene_config(tmp_path, categories=["moon"], public_share=0.01))
    np.save(folder / named_pictures.PIXELS, held.pixels[1:])
    with pytest.raises(InputError, match="a picture for every row"):
        named_pictures.read(folder)


def test_a_damaged_cache_is_refused_by_name(tmp_path: Path) -> None:
    datasets.load(scene_config(tmp_path))
    for file in (tmp_path / "cache").glob("*-captions.txt"):
        file.write_text("a dog")
    datasets._load.cache_clear()
    with pytest.raises(InputError, match="is damaged"):
        datasets.load(scene_config(tmp_path))


def test_public_categories_divide_pictures_in_place_of_a_share(tmp_path: Path) -> None:
    kinds = ["circle", "square"]
    for side in ("public", "private"):
        found = datasets.load(scene_config(tmp_path, side=side, public_categories=kinds)).train
        for row in found.targets:
            caption = byte_pairs.words(row.tolist(), found.declared.names)
            said = caption.replace("half circle", "half")
            assert any(kind in said for kind in kinds) == (side == "public"), caption
    for wrong, said in (
        ({"public_categories": ["squares"]}, "square"),
        ({"public_categories": kinds, "public_share": 0.5}, "data.options.public_share"),
        ({"public_categories": kinds, "categories": kinds}, "at least 4 private"),
    ):
        with pytest.raises(InputError, match=said):
            datasets.load(scene_config(tmp_path, **wrong))


def alone(root: Path, **options: object) -> datasets.Splits:
    return datasets.load(DataConfig(name="named_pictures", root=str(root), options=options))


def test_a_picture_alone_has_the_class_of_its_category(tmp_path: Path) -> None:
    """By the pixels: of the colour that stands out, and how much of its box a shape covers."""
    kinds = ["column", "square"]
    found = alone(tmp_path, categories=kinds, public_share=0.01, size=48, train=80, test=20)
    assert found.train.declared.names == ("column", "square")
    assert sorted(set(found.train.targets.tolist())) == [0, 1]
    ground = np.array(list(BACKGROUNDS.values()))
    for picture, label in zip(found.train.inputs, found.train.targets, strict=True):
        behind = ground[np.abs(ground - np.median(picture, (0, 1))).sum(1).argmin()]
        seen = np.abs(picture.astype(int) - behind).max(2) > GRAIN + 2
        if seen.sum() < 40:  # white on snow
            continue
        down, across = np.nonzero(seen)
        high, wide = np.ptp(down) + 1, np.ptp(across) + 1
        assert (wide < 0.6 * high) == (label == 0)
        assert ALONE[0] * 48 * 0.7 < high < ALONE[1] * 48 + 1


def test_pictures_alone_are_of_one_side_and_their_splits_are_other_draws(tmp_path: Path) -> None:
    kinds = ["circle", "square", "ring"]
    public = alone(tmp_path, side="public", public_categories=kinds, train=50, test=50)
    private = alone(tmp_path, public_categories=kinds, train=50, test=50)
    assert public.train.declared.names == tuple(sorted(kinds))
    assert private.train.declared.size == 12 - len(kinds)
    assert not np.array_equal(public.train.inputs, public.test.inputs)
    larger = alone(tmp_path, side="public", public_categories=kinds, train=60, test=50)
    np.testing.assert_array_equal(larger.train.inputs[:50], public.train.inputs)
    with pytest.raises(InputError, match="at least 2 categories"):
        alone(tmp_path, side="public", public_categories=["ring"])
    with pytest.raises(InputError, match=r"data\.options\.test"):
        alone(tmp_path, test=0)
