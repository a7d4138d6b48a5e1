"""Captions: a vocabulary of public words alone, bad files that stay in their place (budget: 10 s)."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsim.config import DataConfig
from fedsim.data import byte_pairs, cache, datasets
from fedsim.data.targets import BEGIN, END, IGNORED, PADDING
from fedsim.validate import InputError

PUBLIC = ["a red apple left of a small dog on grass", "Two  DOGS and an apple", "a dog on sand below a cat"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "cache"))


# --- tokens ----------------------------------------------------------------------------------------------


def test_a_vocabulary_is_the_same_again_and_begins_with_the_special_tokens() -> None:
    first, again = (byte_pairs.learned(PUBLIC, 60) for _ in range(2))
    assert first.to_str() == again.to_str()
    named = byte_pairs.names(first)
    assert named[:4] == byte_pairs.SPECIAL
    assert (named[PADDING], named[BEGIN], named[END]) == ("<pad>", "<begin>", "<end>")
    assert len(named) <= 60


@given(words=st.lists(st.text("abcdefgilnoprst", min_size=1, max_size=9), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_caption_of_known_letters_comes_back_word_by_word(words: list[str]) -> None:
    tokenizer = byte_pairs.learned([*PUBLIC, "abcdefgilnoprst"], 80)
    named, places = byte_pairs.names(tokenizer), 80
    (found,) = byte_pairs.targets(tokenizer, [" ".join(words).upper()], places)
    assert byte_pairs.words(found.tolist(), named) == " ".join(words)
    length = int((found != IGNORED).sum())
    assert found[length - 1] == END
    assert bool((found[: length - 1] > END).all())
    assert bool((found[length:] == IGNORED).all())


def test_long_captions_are_cut_without_an_end_and_empty_ones_have_no_token() -> None:
    tokenizer = byte_pairs.learned(PUBLIC, 60)
    whole = byte_pairs.targets(tokenizer, [PUBLIC[0]], 40)[0]
    length = int((whole != IGNORED).sum())
    for places in range(2, length + 3):
        found = byte_pairs.targets(tokenizer, [PUBLIC[0], "", " \t "], places)
        np.testing.assert_array_equal(found[0, : min(places, length)], whole[: min(places, length)])
        assert (END in found[0]) is (places >= length)
        assert bool((found[1:] == IGNORED).all())


def test_what_has_no_token_is_unknown_and_special_words_are_none() -> None:
    tokenizer = byte_pairs.learned(PUBLIC, 60)
    (found,) = byte_pairs.targets(tokenizer, ["猫 <end> dog"], 20)
    assert byte_pairs.SPECIAL[3] in [byte_pairs.names(tokenizer)[t] for t in found if t != IGNORED]
    assert int((found == END).sum()) == 1, "the word <end> in a caption does not end it"


@pytest.mark.parametrize(
    ("tokens", "fits"),
    [
        (["[PAD]", "[unused0]", "[unused1]", "[UNK]", "dog"], True),
        (["[PAD]", "a", "b", "[UNK]", "dog"], False),
        (["dog", "[unused0]", "[unused1]", "[UNK]"], False),
    ],
)
def test_a_tokenizer_file_must_keep_the_first_tokens_free(
    tokens: list[str], fits: bool, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    if fits:
        read = byte_pairs.read(tmp_path / "tokenizer.json")
        assert byte_pairs.targets(read, ["dog"], 3).tolist() == [[4, END, IGNORED]]
        assert byte_pairs.words([4, 4, END, 4], byte_pairs.names(read)) == "dog dog"
    else:
        with pytest.raises(InputError, match="as its tokens 0, 1 and 2"):
            byte_pairs.read(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        byte_pairs.read(tmp_path / "none.json")


def test_public_captions_without_words_are_refused() -> None:
    with pytest.raises(InputError, match="must have words"):
        byte_pairs.learned(["", "  "], 60)


# --- files -----------------------------------------------------------------------------------------------


def write_pairs(folder: Path) -> list[tuple[str, str]]:
    """Pictures of several sizes and kinds of failure, with captions."""
    folder.mkdir(parents=True)
    said = [
        ("a.png", "a dog on grass"),
        ("b.png", ""),
        ("broken.png", "a cat"),
        ("c.jpg", "an apple " * 30),
        ("d.png", "a dog"),
        ("frames.gif", "a cat"),
    ]
    for place, (name, caption) in enumerate(said):
        (folder / name).with_suffix(".txt").write_text(caption + "\n")
        shape = (8 + place, 12, 3)
        image = Image.fromarray(np.full(shape, 40 * place, np.uint8))
        if name == "broken.png":
            (folder / name).write_bytes(b"no picture")
        elif name == "frames.gif":
            image.save(
                folder / name, save_all=True, append_images=[Image.fromarray(np.zeros(shape, np.uint8))]
            )
        else:
            image.save(folder / name)
    (folder / "without.png").write_bytes((folder / "a.png").read_bytes())
    return [*said, ("without.png", "")]


def config(root: Path, **options: object) -> DataConfig:
    (root / "public.txt").write_text("\n".join(PUBLIC))
    given = {"public": ["public.txt"], "vocabulary": 60, "places": 12, "size": 8, **options}
    return DataConfig(name="captions", root=str(root), options=given)


def check_pairs(found: datasets.Splits, said: list[tuple[str, str]]) -> None:
    """Every example is in its place; what cannot be read is blank, with an empty caption."""
    train = found.train
    tokenizer = byte_pairs.learned(PUBLIC, 60)
    named = byte_pairs.names(tokenizer)
    assert train.declared.names == named
    assert train.inputs.shape == (len(said), 8, 8, 3)
    for row, (name, caption) in enumerate(said):
        bad = name in ("broken.png", "frames.gif")
        expected = byte_pairs.targets(tokenizer, ["" if bad else caption], 12)[0]
        np.testing.assert_array_equal(train.targets[row], expected)
        shade = 0 if bad or name == "without.png" else 40 * row
        assert abs(int(train.inputs[row].mean()) - shade) <= 2, name
    assert int((train.targets == IGNORED).all(1).sum()) == 4


def test_a_folder_of_pictures_with_texts_beside_them(tmp_path: Path) -> None:
    said = write_pairs(tmp_path / "train")
    write_pairs(tmp_path / "test")
    check_pairs(datasets.load(config(tmp_path)), said)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_of_pictures_and_captions(kind: str, tmp_path: Path) -> None:
    """Paths, bytes, and mappings with either; owners of the training split."""
    if kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed")
    said = write_pairs(tmp_path / "files")
    owners = [f"h{row % 3}" for row in range(len(said))]
    rows = [
        {"image": f"files/{name}", "caption": caption, "who": who}
        for (name, caption), who in zip(said, owners, strict=True)
    ]
    for split in ("train", "test"):
        path = tmp_path / f"{split}.{kind}"
        if kind == "csv":
            with open(path, "w", newline="") as handle:
                table = csv.DictWriter(handle, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
        elif kind == "jsonl":
            path.write_text("\n".join(json.dumps({**r, "image": {"path": r["image"]}}) for r in rows))
        else:
            import pyarrow
            from pyarrow import parquet

            held = [{"bytes": (tmp_path / row["image"]).read_bytes(), "path": None} for row in rows]
            columns = {"image": held, "caption": [r["caption"] for r in rows], "who": owners}
            parquet.write_table(pyarrow.table(columns), path)
    found = datasets.load(config(tmp_path, train=f"train.{kind}", test=f"test.{kind}", holder="who"))
    check_pairs(found, said)
    assert found.train.groups is not None
    assert found.train.groups.tolist() == [row % 3 for row in range(len(said))]
    assert found.test.groups is None


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_without_a_picture_or_a_caption_stay_in_their_place(kind: str, tmp_path: Path) -> None:
    """Nothing, empty bytes, no picture, a file that is not there, no caption; pictures by bytes or path."""
    Image.fromarray(np.full((9, 9, 3), 120, np.uint8)).save(tmp_path / "a.png")
    good: dict[str, object] = {"bytes": None, "path": "a.png"}
    held: list[tuple[object, str | None]] = [
        (good, "a dog"),
        (None, "a dog"),
        ({"bytes": None, "path": None}, "a dog"),
        ({"bytes": None, "path": "b.png"}, "a dog"),
        (good, None),
        (good, ""),
        (good, "a cat on sand"),
    ]
    if kind == "parquet":
        held += [({"bytes": content, "path": "a.png"}, "a dog") for content in (b"", b"no picture")]
        held.append(({"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, "two dogs"))
    said = ["a dog", "", "", "", "", "", "a cat on sand", *["", "", "two dogs"][: len(held) - 7]]
    for split in ("train", "test"):
        path = tmp_path / f"{split}.{kind}"
        if kind == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            columns = {"image": [image for image, _ in held], "caption": [text for _, text in held]}
            columns["other"] = [{"deep": [row]} for row in range(len(held))]
            parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
        else:
            path.write_text("\n".join(json.dumps({"image": image, "caption": text}) for image, text in held))
    train = datasets.load(config(tmp_path, train=f"train.{kind}", test=f"test.{kind}")).train
    expected = byte_pairs.targets(byte_pairs.learned(PUBLIC, 60), said, 12)
    np.testing.assert_array_equal(train.wanted_of(slice(None)), expected)
    shades = train.inputs[:].reshape(len(held), -1).mean(1)
    bad = [1, 2, 3, *([7, 8] if kind == "parquet" else [])]
    assert np.flatnonzero(shades == 0).tolist() == bad
    assert bool((np.abs(np.delete(shades, bad) - 120) <= 2).all())


def test_the_vocabulary_does_not_depend_on_private_captions(tmp_path: Path) -> None:
    write_pairs(tmp_path / "train")
    write_pairs(tmp_path / "test")
    before = datasets.load(config(tmp_path)).train.declared
    for text in (tmp_path / "train").glob("*.txt"):
        text.write_text("zebra zebra zebra quartz")
    datasets._load.cache_clear()
    assert datasets.load(config(tmp_path)).train.declared == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"public": []}, "data.options.public must list"),
        ({"public": ["train"]}, "must not name the training examples"),
        ({"size": None}, "data.options.size"),
        ({"places": 1}, "data.options.places"),
        ({"public": ["nothing.txt"]}, "must be a file of public captions"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], said: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "train")
    with pytest.raises(InputError, match=said):
        datasets.load(config(tmp_path, **options))
