"""Pictures with captions in tar files: read on demand, the same as from a folder; nothing that is bad in them
moves an id or adds anything (budget 15 s)."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim import loading
from fedsim.config import Config, DataConfig
from fedsim.data import byte_pairs, datasets, token_rows
from fedsim.data.chosen import Chosen
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.pictures.pictures import Pictures
from fedsim.data.targets import IGNORED
from fedsim.data.token_rows import TokenRows
from fedsim.engine import setup
from fedsim.engine.experiment import prepare
from fedsim.engine.holder import Node
from fedsim.engine.scoring import scores_of
from fedsim.types import StepTask
from fedsim.validate import InputError, PrivateInputError
from fedsim.visibility import Public
from tests import pictures as made
from tests.conftest import final, small, train

PUBLIC = ["a red apple left of a small dog on grass", "two dogs and an apple", "a dog on sand below a cat"]
EDGE, PLACES = 16, 8
SAID = [
    "a dog on grass",
    "",
    "a cat",
    "an apple " * 30,
    "  two\n dogs\t",
    "a dog",
    "猫 and a cat",
    "an apple",
]
EMPTY, LONG = 1, 3


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    datasets._load.cache_clear()
    setup.forget_nodes()
    yield
    datasets._load.cache_clear()
    setup.forget_nodes()


def pairs() -> list[tuple[bytes, str]]:
    """A picture for every caption of SAID, of different sizes."""
    contents = [content for _, content in made.samples(len(SAID), 1)]
    return list(zip(contents, SAID, strict=True))


def shards(root: Path, split: str, held: list[tuple[bytes, str]], each: int = 3) -> None:
    """SPLIT-NUMBER.tar, KEY.jpg beside KEY.txt and KEY.json, which say the same."""
    root.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(held), each):
        members = [
            member
            for number, (content, text) in enumerate(held[start : start + each], start)
            for member in (
                (f"{number:06d}.jpg", content),
                (f"{number:06d}.txt", text.encode()),
                (f"{number:06d}.json", json.dumps({"caption": text, "by": number % 3}).encode()),
            )
        ]
        made.packed(root / f"{split}-{start // each:05d}.tar", members)


def folder(root: Path, held: list[tuple[bytes, str]]) -> None:
    root.mkdir(parents=True)
    for number, (content, text) in enumerate(held):
        (root / f"{number:06d}.jpg").write_bytes(content)
        (root / f"{number:06d}.txt").write_text(text)


def config(root: Path, name: str = "caption_shards", **options: Any) -> DataConfig:
    (root / "public.txt").write_text("\n".join(PUBLIC))
    given = {"public": ["public.txt"], "vocabulary": 60, "places": PLACES, "size": EDGE, **options}
    return DataConfig(name, given, str(root))


def loaded(root: Path, **options: Any) -> Splits:
    datasets._load.cache_clear()
    return datasets.load(config(root, **options))


def tokens(data: ArrayDataset) -> np.ndarray:
    return data.wanted_of(slice(None))


def expected(texts: list[str]) -> np.ndarray:
    return byte_pairs.targets(byte_pairs.learned(PUBLIC, 60), texts, PLACES)


# --- the same pairs, wherever they lie ----------------------------------------------------------------------


def test_pairs_of_tar_files_are_those_of_a_folder(tmp_path: Path) -> None:
    """Pixels and tokens, from texts and from fields; nothing of either is held as an array."""
    held = pairs()
    for split in ("train", "test"):
        shards(tmp_path, split, held)
        folder(tmp_path / split, held)
    datasets._load.cache_clear()
    plain = datasets.load(config(tmp_path, "captions", train="train", test="test")).train
    for options in ({}, {"caption": "json.caption"}, {"decode": "packed", "short_side": EDGE}):
        train = loaded(tmp_path, **options).train
        assert isinstance(train.inputs, Pictures)
        assert isinstance(train.targets, TokenRows)
        assert np.array_equal(train.read(slice(None))[0], plain.read(slice(None))[0])
        assert np.array_equal(tokens(train), tokens(plain))
        assert np.array_equal(tokens(train), expected(SAID))
        assert train.declared == plain.declared
        some = np.array([6, 0, 4])
        assert np.array_equal(tokens(train.take(some)), tokens(plain)[some])


def test_what_is_bad_keeps_its_place_and_says_nothing(tmp_path: Path) -> None:
    """No picture, no text, no field, no JSON, a field that is no text: all counted, no other row moved."""
    whole = pairs()
    picture = whole[0][0]
    members = [
        ("0.jpg", picture), ("0.json", b'{"caption": "a dog"}'),
        ("1.json", b'{"caption": "a dog"}'),
        ("2.jpg", picture),
        ("3.jpg", b"no picture"), ("3.json", b'{"caption": "a cat"}'),
        ("4.jpg", picture), ("4.json", b'{"caption": null}'),
        ("5.jpg", picture), ("5.json", b'{"captions": "a cat"}'),
        ("6.jpg", picture), ("6.json", b"\xff{not json"),
        ("7.jpg", picture), ("7.json", b'["caption"]'),
        ("8.jpg", picture), ("8.json", b"[" * 100_000),
        ("9.jpg", picture), ("9.json", b'{"caption": ["a", "cat"]}'),
        ("10.jpg", picture[:-300]), ("10.json", b'{"caption": "a cat"}'),
        ("11.jpg", picture), ("11.json", b'{"caption": "an apple"}'),
    ]  # fmt: skip
    made.packed(tmp_path / "train-0.tar", members)
    made.packed(tmp_path / "test-0.tar", members)
    train = loaded(tmp_path, caption="json.caption").train
    texts = ["a dog", "a dog", "", "a cat", *[""] * 6, "a cat", "an apple"]
    assert np.array_equal(tokens(train), expected(texts))
    _, there = train.read(slice(None))
    assert there is not None
    assert np.flatnonzero(~there).tolist() == [1, 3, 10]


def test_a_tokenizer_another_length_or_another_text_makes_other_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        shards(tmp_path, split, pairs())
    made_now: list[int] = []
    real = byte_pairs.targets
    monkeypatch.setattr(
        token_rows.byte_pairs, "targets", lambda t, said, p: made_now.append(len(said)) or real(t, said, p)
    )
    first = tokens(loaded(tmp_path).train)
    assert sum(made_now) == 2 * len(SAID)
    made_now.clear()
    assert np.array_equal(tokens(loaded(tmp_path).train), first)
    assert not made_now
    assert loaded(tmp_path, places=5).train.targets.shape == (len(SAID), 5)
    assert not np.array_equal(tokens(loaded(tmp_path, vocabulary=40).train), first)
    assert sum(made_now) == 4 * len(SAID)
    shards(tmp_path, "train", [(content, text.replace("dog", "cat")) for content, text in pairs()])
    after = tokens(loaded(tmp_path).train)
    assert np.array_equal(after, expected([text.replace("dog", "cat") for text in SAID]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("adgo tcn", max_size=20), min_size=1, max_size=30),
    picked=st.lists(st.integers(0, 10**6), max_size=12),
    at=st.integers(0, 30),
)
def test_rows_of_tokens_are_those_of_an_array(
    tmp_path: Path, texts: list[str], picked: list[int], at: int
) -> None:
    """Rows, slices, and choices of choices."""
    tokenizer = byte_pairs.learned(PUBLIC, 60)
    said = lambda places: [texts[i] for i in places]  # noqa: E731
    token_rows_of = token_rows.kept(tokenizer, said, len(texts), PLACES, repr(texts))
    array = byte_pairs.targets(tokenizer, texts, PLACES)
    rows = np.array(picked, np.int64) % len(texts)
    assert np.array_equal(token_rows_of[rows], array[rows])
    assert np.array_equal(token_rows_of[at:], array[at:])
    assert np.array_equal(token_rows_of.take(slice(at, None))[::2], array[at:][::2])
    some = token_rows_of.take(rows)
    assert some.shape == array[rows].shape
    if len(rows):
        back = np.arange(len(rows))[::-1].copy()
        assert np.array_equal(some.take(back)[:], array[rows][::-1])
    nearly = np.delete(np.arange(len(texts)), at % len(texts))
    assert np.array_equal(token_rows_of.take(nearly)[:], array[nearly])
    assert np.array_equal(np.concatenate([*token_rows_of.blocks(7)]), array)


def test_choices_of_nearly_all_rows_cost_what_is_left_out() -> None:
    left = np.array([3, 500, 99_999])
    chosen = Chosen(100_000).take(np.delete(np.arange(100_000), left))
    assert chosen.rows is None
    assert chosen.passed is not None
    assert chosen.passed.size == 3
    assert np.array_equal(chosen.places(slice(None)), np.delete(np.arange(100_000), left))


# --- in a run -----------------------------------------------------------------------------------------------


def run_config(root: Path, *overrides: str, name: str = "caption_shards", **options: Any) -> Config:
    data = config(root, name, **options)
    return small(
        f"data.name={name}",
        f"data.root={root}",
        f"data.options={json.dumps(data.options)}",
        "task=captioning",
        f"model={{name: captioner, options: {{size: pico, patch: 8, places: {PLACES}, decoder_depth: 1}}}}",
        "model.dtype=float64",
        "data.train_examples=null",
        "data.test_examples=null",
        "federation.partition=iid",
        "federation.holders=2",
        "federation.nodes=1",
        f"train.expected_batch_size={len(SAID)}",
        "train.augmentations=[random_resized_crop, flip]",
        *overrides,
    )


def sums_of(node: Node, ids: np.ndarray) -> Any:
    task = StepTask(0, 0, 1.0, {"draw": bytes(32), "augment": bytes(range(32)), "availability": bytes(32)})
    return node.clipped_sum(ids, task, node.method.at.clip)


def test_bad_pairs_add_exactly_nothing_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A picture that is cut off, and an empty caption: the sum with them is the sum without, bit for bit."""
    held = pairs()
    broken = 5
    held[broken] = (held[broken][0][:-200], held[broken][1])
    for split in ("train", "test"):
        shards(tmp_path, split, held)
    chosen = run_config(tmp_path)
    experiment = prepare(chosen)
    assert experiment.noticed is not None
    assert experiment.noticed.value == {"empty captions": 1, "captions cut": 1}
    assert "1 empty captions, 1 captions cut" in caplog.text
    node = Node(chosen, 0, 0)
    ids = np.arange(len(held))
    whole, without = sums_of(node, ids), sums_of(node, np.delete(ids, [EMPTY, broken]))
    assert torch.equal(whole.sum, without.sum)
    assert float(whole.sum.norm()) > 0
    assert (whole.count, whole.undecodable) == (len(held), 1)
    for bad in (EMPTY, broken):
        assert not sums_of(node, np.array([bad])).sum.any()
    assert sums_of(node, np.array([LONG])).sum.any(), "a caption that is cut says its beginning"


def test_each_pair_has_its_own_caption_whatever_its_holder(tmp_path: Path) -> None:
    """By natural owners, and by drawn ones: sums of all holders are the sum of all examples."""
    for split in ("train", "test"):
        shards(tmp_path, split, pairs())
    one = sums_of(Node(run_config(tmp_path, "federation.holders=1"), 0, 0), np.arange(len(SAID)))
    owned = run_config(tmp_path, "federation.partition=natural", "federation.holders=3", holder="json.by")
    groups = prepare(owned).splits.train.groups
    assert groups is not None
    assert groups.tolist() == [number % 3 for number in range(len(SAID))]
    node = Node(owned, 0, 0)
    parts = [sums_of(node, np.flatnonzero(groups == holder)).sum for holder in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(0), one.sum, rtol=1e-9, atol=1e-12)


def test_a_run_on_tar_files_is_that_on_a_folder_whatever_nodes(tmp_path: Path) -> None:
    """Flipped views, two steps, one node or two: the same parameters, and the same score."""
    held = pairs()
    for split in ("train", "test"):
        shards(tmp_path, split, held)
        folder(tmp_path / split, held)
    common = ["train.augmentations=[flip]", "train.steps=2"]
    found = []
    for nodes, name, options in (
        (2, "caption_shards", {}),
        (1, "captions", {"train": "train", "test": "test"}),
    ):
        out = tmp_path / name
        made_of = run_config(tmp_path, *common, f"federation.nodes={nodes}", name=name, **options)
        found.append((train(made_of, out)["perplexity"], final(out)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("recipe", ["laion_base_eps8", "vip_base_eps8"])
def test_published_recipes_read_tar_files(recipe: str, tmp_path: Path) -> None:
    """With their views, small on the command line: captions, and pictures alone."""
    for split in ("train", "test"):
        shards(tmp_path, split, pairs())
    byte_pairs.learned(PUBLIC, 60).save(str(tmp_path / "tokenizer.json"))
    given = [
        f"data.root={tmp_path}",
        "data.options.size=16",
        "model.options.size=pico",
        "model.options.patch=8",
        "model.options.decoder_depth=1",
        "federation.holders=2",
        "federation.nodes=1",
        "train.steps=1",
        f"train.expected_batch_size={len(SAID)}",
        "privacy.delta=1.0e-3",
        "monitor.tensorboard=false",
        "monitor.progress=false",
        *(["optimizer.warmup_steps=0"] if recipe.startswith("laion") else []),
    ]
    made_of = loading.load(f"dpcap2024/{recipe}", given)
    assert made_of.train.augmentations[0]["options"] == {"scale": [0.2, 1.0]}
    result = train(made_of, tmp_path / "run")
    assert result["examples"] == len(SAID)
    assert (tmp_path / "run" / "samples.html").exists() is recipe.startswith("laion")


def test_a_run_is_bound_to_its_captions(tmp_path: Path) -> None:
    from fedsim.privacy.binding import holder_digests

    def digests() -> tuple[str, ...]:
        train = loaded(tmp_path).train
        holders = np.arange(len(SAID)) % 2
        return holder_digests(3, holders, 2, {"inputs": train.identity, "targets": train.targets})

    for split in ("train", "test"):
        shards(tmp_path, split, pairs())
    first = digests()
    assert digests() == first
    held = pairs()
    held[4] = (held[4][0], "two dogs and a cat")
    shards(tmp_path, "train", held)
    second = digests()
    assert second[0] != first[0]
    assert second[1] == first[1]


def broken_shards(root: Path, broken: dict[str, set[int]]) -> None:
    """Pairs of which these have a picture whose first bytes already are none."""
    for split in ("train", "test"):
        rows = enumerate(pairs())
        shards(root, split, [(b"?" if row in broken[split] else one[0], one[1]) for row, one in rows])


@pytest.mark.parametrize("held_out", [0, 2])
@pytest.mark.parametrize("public_only", [True, False])
def test_how_many_private_pictures_are_none_is_said_where_it_may_be(
    held_out: int, public_only: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Held-out examples lie in the private files."""
    broken_shards(tmp_path, {"train": {0, 3, 5}, "test": {1, 2}})
    chosen = [f"monitor.public_only={public_only}", f"data.holdout_examples={held_out}"]
    prepare(run_config(tmp_path, *chosen, "train.expected_batch_size=4"))
    assert ("3 pictures of the training files" in caplog.text) is not public_only
    assert ("2 pictures of the test files" in caplog.text) == (not held_out)
    assert ("3 pictures" in caplog.text) is not public_only


@pytest.mark.parametrize("held_out", [0, 2])
@pytest.mark.parametrize("public_only", [True, False])
def test_an_evaluation_split_without_an_example_is_refused_before_anything_starts(
    held_out: int, public_only: bool, tmp_path: Path
) -> None:
    """All of its pictures are cut off, which shows only when they are decoded, or their captions empty."""
    held = pairs()
    cut = [(content[:-200] if row != EMPTY else content, text) for row, (content, text) in enumerate(held)]
    shards(tmp_path, "train", cut if held_out else held)
    shards(tmp_path, "test", cut)
    chosen = [f"monitor.public_only={public_only}", f"data.holdout_examples={held_out}"]
    with pytest.raises(InputError, match="evaluation must have an example that counts") as refused:
        prepare(run_config(tmp_path, *chosen))
    assert ("is truncated" in str(refused.value)) == (not (public_only and held_out))


def test_an_evaluation_split_of_empty_captions_is_refused(tmp_path: Path) -> None:
    shards(tmp_path, "train", pairs())
    shards(tmp_path, "test", pairs()[EMPTY : EMPTY + 1])
    with pytest.raises(InputError, match="a caption with a word"):
        prepare(run_config(tmp_path))


@pytest.mark.parametrize("name", ["caption_shards", "captions"])
def test_a_split_of_which_one_example_counts_is_judged_by_it(name: str, tmp_path: Path) -> None:
    held = pairs()
    cut = [(content[:-200], text) for content, text in held[:4]]
    for split, some in (("train", held), ("test", [*cut, held[6]])):
        shards(tmp_path, split, some)
        folder(tmp_path / split, some)
    given = {} if name == "caption_shards" else {"train": "train", "test": "test"}
    made_of = prepare(run_config(tmp_path, name=name, **given))
    scores = scores_of(made_of.model, made_of.task, made_of.splits, torch.float64, held_out=False)
    assert scores["undecodable_test"] == Public(4.0)


def test_unreadable_pictures_of_a_folder_count_apart_from_empty_captions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = pairs()
    held[5] = (held[5][0][:-200], held[5][1])
    for split in ("train", "test"):
        folder(tmp_path / split, held)
    chosen = run_config(tmp_path, name="captions", train="train", test="test")
    noticed = prepare(chosen).noticed
    assert noticed is not None
    assert noticed.value == {"pictures that cannot be read": 1, "empty captions": 1, "captions cut": 1}
    assert "1 pictures that cannot be read" in caplog.text
    found = sums_of(Node(chosen, 0, 0), np.arange(len(held)))
    assert (found.count, found.undecodable) == (len(held), 1)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decode": "at_once"}, "on_demand or packed"),
        ({"caption": "a/b"}, "data.options.caption must be the ending"),
        ({"picture": "txt"}, "data.options.picture"),
        ({"train": "nothing*.tar"}, "expected tar files at"),
        ({"train": "/abs*.tar"}, "must be a pattern below data.root"),
        ({"public": []}, "data.options.public must list"),
        ({"size": None}, "data.options.size"),
        ({"holder": "json.who"}, "must have a field who"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        shards(tmp_path, split, pairs()[:2])
    with pytest.raises(InputError, match=said):
        loaded(tmp_path, **options)


def test_a_private_caption_is_in_no_message(tmp_path: Path) -> None:
    """Where a sample is refused for its owner, what was found is said in private alone."""
    picture = pairs()[0][0]
    made.packed(
        tmp_path / "train-0.tar", [("0.jpg", picture), ("0.txt", b"a dog"), ("0.json", b'{"by": "me"}')]
    )
    made.packed(tmp_path / "test-0.tar", [("0.jpg", picture), ("0.txt", b"a dog")])
    with pytest.raises(PrivateInputError, match="me") as refused:
        loaded(tmp_path, holder="json.by")
    assert "me'" not in refused.value.public


# --- memory -------------------------------------------------------------------------------------------------


def test_tokens_of_many_captions_are_not_in_memory(tmp_path: Path) -> None:
    """Neither while they are made, nor when some are read."""
    count = 60_000
    tokenizer = byte_pairs.learned(PUBLIC, 60)
    tracemalloc.start()
    try:
        rows = token_rows.kept(tokenizer, lambda places: ["a dog"] * len(places), count, 40, "many")
        taken = rows.take(slice(100, count))
        assert taken[np.array([0, 7])].shape == (2, 40)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2**20
    assert peak < 12 * 2**20, "at 40 int64 a caption all of them would take 19 MB, and their words more"
    assert bool((taken[:1] != IGNORED).any())
