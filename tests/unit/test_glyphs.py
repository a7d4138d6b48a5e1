"""Rendered fonts as a data set, on fonts that matplotlib ships (budget: 15 s)."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from fedsim.config import DataConfig
from fedsim.data import datasets, glyphs
from fedsim.validate import InputError
from tests.conftest import small, train

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TEXT = [
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "STIXGeneral.ttf",
    "cmr10.ttf",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    datasets._load.cache_clear()
    return tmp_path / "cache"


def folder(root: Path, names: list[str]) -> Path:
    root.mkdir(parents=True)
    for name in names:
        shutil.copyfile(FONTS / name, root / name)
    return root


def test_every_font_gives_every_character(tmp_path: Path) -> None:
    root = folder(tmp_path / "fonts", TEXT)
    splits = datasets.load(DataConfig("glyphs", {}, str(root)))
    train_set, test_set = splits.train, splits.test
    assert (len(train_set), len(test_set)) == (5 * 62, 62)
    assert train_set.declared.size == 62
    assert train_set.example_shape == (1, 28, 28)
    assert train_set.groups is not None
    assert test_set.groups is not None
    assert not set(train_set.groups) & set(test_set.groups)  # fonts of the test set are unseen
    for font in np.unique(train_set.groups):
        assert sorted(train_set.targets[train_set.groups == font]) == list(range(62))
    images = train_set.inputs[..., 0]
    inked = images > 0
    # first to last inked row and column; the outermost ones may be too faint to show
    sides = [28 - inked.any(a).argmax(1) - inked.any(a)[:, ::-1].argmax(1) for a in (1, 2)]
    longest = np.maximum(*sides)
    assert longest.max() == 20
    assert longest.min() >= 18
    margins = [inked[:, :4].any(), inked[:, 24:].any(), inked[:, :, :4].any(), inked[:, :, 24:].any()]
    assert not any(margins)
    assert images.max() > 200


def test_images_show_the_character(tmp_path: Path) -> None:
    """Shapes known beforehand: I is narrow, - like strokes of L and T lie where they should."""
    root = folder(tmp_path / "fonts", TEXT)
    drawn = glyphs._draw(root / "DejaVuSans.ttf", glyphs.CHARACTERS["glyphs"])
    at = glyphs.CHARACTERS["glyphs"].index
    widths = {c: int((drawn[at(c)] > 0).any(0).sum()) for c in "IW"}
    assert widths["I"] < 6 < 15 < widths["W"]
    ell, tee = drawn[at("L")].astype(float), drawn[at("T")].astype(float)
    assert ell[20:24].sum() > 2 * ell[4:8].sum()
    assert tee[4:8].sum() > 2 * tee[20:24].sum()
    oh = drawn[at("O")]
    assert oh[14, 14] == 0
    assert oh[14].max() > 200


def test_rendering_is_the_same_again_and_cached(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = glyphs.load("glyphs_a_to_j", folder(tmp_path / "a", TEXT[:4]))
    assert first["train_inputs"].shape == (3 * 10, 28, 28, 1)
    (path,) = cache.glob("*.npz")
    path.unlink()
    renamed = tmp_path / "b" / "deep"
    renamed.mkdir(parents=True)
    for place, name in enumerate(reversed(TEXT[:4])):
        shutil.copyfile(FONTS / name, renamed / f"{place}.TTF")
    shutil.copyfile(FONTS / TEXT[0], renamed / "copy.ttf")  # the same content once more
    second = glyphs.load("glyphs_a_to_j", tmp_path / "b")  # other names and places, same fonts
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    monkeypatch.setattr(glyphs, "_render", None)  # what is cached is not rendered
    again = glyphs.load("glyphs_a_to_j", tmp_path / "a")
    assert all(np.array_equal(first[key], again[key]) for key in first)


def test_fonts_without_letters_are_left_out(tmp_path: Path) -> None:
    odd = ["DejaVuSansDisplay.ttf", "STIXSizFourSymReg.ttf", "LastResortHE-Regular.ttf"]
    root = folder(tmp_path / "fonts", TEXT[:3] + odd)
    (root / "broken.ttf").write_bytes(b"not a font")
    arrays = glyphs.load("glyphs", root)
    fonts = set(arrays["train_groups"]) | set(arrays["test_groups"])
    assert fonts == {0, 1, 2}
    for name in odd:
        assert glyphs._draw(FONTS / name, glyphs.CHARACTERS["glyphs"]) == {}


def test_a_folder_without_fonts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"at least 2 fonts.*got 0 of 0"):
        datasets.load(DataConfig("glyphs", {}, str(tmp_path / "empty")))
    one = folder(tmp_path / "one", TEXT[:1])
    with pytest.raises(InputError, match="got 1 of 1"):
        datasets.load(DataConfig("glyphs", {}, str(one)))


def test_a_damaged_cache_is_refused_and_made_again(tmp_path: Path, cache: Path) -> None:
    root = folder(tmp_path / "fonts", TEXT[:2])
    datasets.load(DataConfig("glyphs_a_to_j", {}, str(root)))
    (held,) = cache.glob("*.npz")
    held.write_bytes(held.read_bytes()[:200])
    datasets._load.cache_clear()
    with pytest.raises(InputError, match=r"is damaged.*Delete it"):
        datasets.load(DataConfig("glyphs_a_to_j", {}, str(root)))
    held.unlink()
    assert datasets.load(DataConfig("glyphs_a_to_j", {}, str(root))).train.declared.size == 10


def test_a_font_that_is_no_font_is_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "fonts", TEXT[:3])
    (root / "empty.ttf").write_bytes(b"")
    (root / "noise.otf").write_bytes(bytes(range(256)) * 9)
    splits = datasets.load(DataConfig("glyphs_a_to_j", {}, str(root)))
    assert len(splits.train) + len(splits.test) == 30


def test_fonts_are_natural_owners(tmp_path: Path) -> None:
    root = folder(tmp_path / "fonts", TEXT)
    config = small(
        "data.name=glyphs", f"data.root={root}", "data.train_examples=null", "data.test_examples=null",
        "federation.partition=natural", "federation.holders=5", "privacy.noise_multiplier=0.01",
        "privacy.clip_norm=5.0", "train.expected_batch_size=150", "train.steps=12",
        "optimizer.learning_rate=0.2",
    )  # fmt: skip
    result = train(config, tmp_path / "run")
    assert result["holders"] == 5
    assert result["accuracy"] > 5 / 62  # chance is 1 / 62
