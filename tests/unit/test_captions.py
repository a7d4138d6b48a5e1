"""Captions: a vocabulary of public words alone, bad files that stay in their place (budget: 10 s)."""

from __future__ import annotations

import csv
import importlib.util
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsim.config import DataConfig
from fedsim.data import byte_pairs, cache, datasets
from fedsim.data.examples import ArrayDataset
from fedsim.data.sources import tar_files
from fedsim.data.targets import BEGIN, END, IGNORED, PADDING
from fedsim.validate import InputError, PrivateInputError

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


ASKED = {
    "padding to the longest": lambda made: made.enable_padding(pad_id=5, pad_token="a"),
    "padding in front": lambda made: made.enable_padding(length=9, direction="left"),
    "cutting": lambda made: made.enable_truncation(2),
    "dropout": lambda made: setattr(made.model, "dropout", 0.9),
}


@pytest.mark.parametrize("asked", ASKED)
@given(beside=st.lists(st.sampled_from([*PUBLIC, "", "cat"]), max_size=4), places=st.integers(2, 20))
@settings(max_examples=15, deadline=None)
def test_a_captions_tokens_follow_from_it_alone(asked: str, beside: list[str], places: int) -> None:
    """Whatever a tokenizer pads, cuts or draws: the same beside any others and again; empty ones stay empty,
    cut ones count as cut, and the tokenizer goes on asking what it asked."""
    plain, made = (byte_pairs.learned(PUBLIC, 60) for _ in range(2))
    ASKED[asked](made)
    before = made.to_str()
    captions = [PUBLIC[2], *beside, ""]
    expected = byte_pairs.targets(plain, captions, places)
    for _ in range(3):
        np.testing.assert_array_equal(byte_pairs.targets(made, captions, places), expected)
    assert bool((expected[-1] == IGNORED).all())
    assert made.to_str() == before
    assert made.encode_special_tokens is plain.encode_special_tokens
    with tempfile.TemporaryDirectory() as folder:
        made.save(f"{folder}/tokenizer.json")
        read = byte_pairs.read(Path(folder) / "tokenizer.json")
    np.testing.assert_array_equal(byte_pairs.targets(read, captions, places), expected)


def test_a_tokenizer_of_the_package_is_not_changed_by_being_used() -> None:
    made = byte_pairs.learned(PUBLIC, 60)
    made.encode_special_tokens = False
    (found,) = byte_pairs.targets(made, ["a <end> dog"], 20)
    assert int((found == END).sum()) == 1
    assert made.encode_special_tokens is False


@pytest.mark.parametrize("numbers", [[0, 1, 2, 300, 3], [0, 1, 2, 4]])
def test_a_tokenizer_file_whose_numbers_have_a_gap_is_refused(numbers: list[int], tmp_path: Path) -> None:
    """They would be others in the file of tokens, whose dtype is for as many as there are."""
    from tokenizers import Tokenizer, models

    words = dict(zip(["<pad>", "<begin>", "<end>", "a", "b"], numbers, strict=False))
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="without a gap"):
        byte_pairs.read(tmp_path / "tokenizer.json")


def test_what_has_no_token_is_never_padding_begin_or_end() -> None:
    """Of a vocabulary of words, where the first tokens stand for unknown ones or are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<begin>": 1, "<end>": 2, "dog": 3}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = byte_pairs.targets(made, ["cat dog", "cat", "<end> dog <begin>"], 4)
    assert found.tolist() == [[3, END, *[IGNORED] * 2], [IGNORED] * 4, [3, END, *[IGNORED] * 2]]


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
    there = train.read(slice(None))[1]
    assert there is not None
    assert np.flatnonzero(~there).tolist() == [2, 5], "they count apart from empty captions"
    some = train.take(np.array([5, 0]))
    assert (some.whole is not None, some.there(slice(None)).tolist()) == (True, [False, True])  # type: ignore[union-attr]
    assert train.take(slice(0, 2)).there(slice(None)) is None


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
        ({"size": None}, "data.options.size"),
        ({"places": 1}, "data.options.places"),
        ({"public": ["nothing.txt"]}, "must be a file of public captions"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], said: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "train")
    with pytest.raises(InputError, match=said):
        datasets.load(config(tmp_path, **options))


def folder_of(root: Path, split: str = "train") -> Path:
    """A folder of one picture with a text."""
    (here := root / split).mkdir(parents=True)
    Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(here / "b.png")
    (here / "b.txt").write_text("a dog")
    return here


def train_of(root: Path, **options: object) -> ArrayDataset:
    datasets._load.cache_clear()
    return datasets.load(config(root, **options)).train


def captions_of(train: ArrayDataset) -> list[str]:
    return [byte_pairs.words(row, train.declared.names) for row in train.wanted_of(slice(None)).tolist()]


def test_links_are_followed_and_lost_files_keep_their_place(tmp_path: Path) -> None:
    """A linked folder's pairs, a link to nowhere, a text without a picture, names in any case."""
    here = folder_of(tmp_path)
    folder_of(tmp_path, "test")
    other = folder_of(tmp_path, "elsewhere")
    (other / "b.txt").rename(other / "b.TXT")
    (here / "a.png").symlink_to("nowhere.png")
    (here / "a.txt").write_text("two dogs")
    (here / "aa.png").symlink_to("nowhere.png")
    (here / "c.txt").write_text("an apple")
    (here / "linked").symlink_to(other)
    (here / ".hidden").mkdir()
    (here / ".hidden" / "d.png").write_bytes(b"")
    train = train_of(tmp_path)
    assert captions_of(train) == ["", "", "a dog", "", "a dog"]
    there = train.read(slice(None))[1]
    assert there is not None
    assert there.tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("name", ["Thumbs.db", "README.md", "metadata.json", "b.TXT"])
def test_files_that_are_no_pairs_are_no_examples(name: str, tmp_path: Path) -> None:
    here = folder_of(tmp_path)
    folder_of(tmp_path, "test")
    (here / name).write_text("x")
    with pytest.raises(PrivateInputError, match=name) as refused:
        train_of(tmp_path)
    assert name not in refused.value.public
    (here / name).unlink()
    (here / f".{name}").write_text("x")
    assert len(train_of(tmp_path)) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_may_say_its_encoding_in_front(encoding: str, tmp_path: Path) -> None:
    """Of a picture, of a JSON line, and of the public captions."""
    here = folder_of(tmp_path)
    folder_of(tmp_path, "test")
    (here / "b.txt").write_bytes("A dog\r\non grass".encode(encoding))
    plain = train_of(tmp_path)
    assert captions_of(plain) == ["a dog on grass"]
    (tmp_path / "coded.txt").write_bytes("\n".join(PUBLIC).encode(encoding))
    coded = train_of(tmp_path, public=["coded.txt"])
    assert coded.declared == plain.declared
    assert tar_files.word('{"caption": "a dog"}'.encode(encoding), "json.caption") == "a dog"


@pytest.mark.parametrize(
    "public",
    [
        "train",
        "train/b.txt",
        "./train/../train/b.txt",
        "linked.txt",
        "hard.txt",
        "folder/b.txt",
        "folder/.hidden",
        "table.jsonl",
    ],
)
def test_no_public_captions_are_private_ones_by_another_name(public: str, tmp_path: Path) -> None:
    folder_of(tmp_path)
    folder_of(tmp_path, "test")
    (tmp_path / "linked.txt").symlink_to("train/b.txt")
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "train" / "b.txt")
    (tmp_path / "folder").symlink_to("train")
    (tmp_path / "train" / ".hidden").write_text("a dog")
    (tmp_path / "real.jsonl").write_text('{"image": "train/b.png", "caption": "a dog"}')
    (tmp_path / "table.jsonl").symlink_to("real.jsonl")
    options = {"train": "real.jsonl"} if public == "table.jsonl" else {}
    with pytest.raises(InputError, match="must not name the training examples"):
        train_of(tmp_path, public=["public.txt", public], **options)


def test_a_list_of_captions_is_none(tmp_path: Path) -> None:
    """As in tar files: which of them is meant is not said."""
    folder_of(tmp_path, "files")
    said = ["a dog", ["a dog", "a cat"], {"en": "a dog"}, True, 5, None]
    lines = [json.dumps({"image": "files/b.png", "caption": caption}) for caption in said]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    train = train_of(tmp_path, train="train.jsonl", test="test.jsonl")
    expected = byte_pairs.targets(byte_pairs.learned(PUBLIC, 60), ["a dog", "", "", "", "5", ""], 12)
    np.testing.assert_array_equal(train.targets, expected)
    for caption, text in zip(said, ["a dog", None, None, None, "5", None], strict=True):
        assert tar_files.word(json.dumps({"caption": caption}).encode(), "json.caption") == text


def test_owners_are_asked_of_the_training_table_alone(tmp_path: Path) -> None:
    """Whatever the tables are called."""
    folder_of(tmp_path, "files")
    row = {"image": "../files/b.png", "caption": "a dog"}
    for split, more in (("train", {"who": "x"}), ("test", {})):
        (tmp_path / split).mkdir()
        (tmp_path / split / "rows.jsonl").write_text(json.dumps({**row, **more}))
    train = train_of(tmp_path, train="train/rows.jsonl", test="test/rows.jsonl", holder="who")
    assert train.groups is not None


@given(said=st.lists(st.text("abcé猫😀.,", min_size=1, max_size=6), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_a_caption_of_byte_level_tokens_comes_back(said: list[str]) -> None:
    """Its letters are bytes, and its blanks a letter of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<begin>", "<end>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator(PUBLIC, trainer)
    (row,) = byte_pairs.targets(made, [" ".join(said)], 400)
    assert byte_pairs.words(row.tolist(), byte_pairs.names(made)) == " ".join(said)
