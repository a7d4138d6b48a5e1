"""Pictures in folders, tar files and packed: the same bytes and pixels as read plainly, whoever asks (budget
10 s)."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsim import seeds
from fedsim.config import DataConfig, FederationConfig
from fedsim.data import augment, datasets
from fedsim.data.examples import Splits
from fedsim.data.partition import Partition, partition
from fedsim.data.pictures import index, stores, tar
from fedsim.data.pictures.decode import Encoded
from fedsim.data.pictures.pictures import Pictures
from fedsim.data.pictures.shown import Undecodable
from fedsim.merging import Choice
from fedsim.partitions import Material
from fedsim.validate import InputError, PrivateInputError, RunError
from tests import pictures as made
from tests.pictures import encoded, noise

EDGE = 16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    datasets._load.cache_clear()
    yield
    datasets._load.cache_clear()


def loaded(name: str, root: Path, **options: Any) -> Splits:
    datasets._load.cache_clear()
    if name == "image_folder":
        options = {"decode": "on_demand", **options}
    return datasets.load(DataConfig(name, {"size": EDGE, **options}, str(root)))


def both(root: Path, count: int = 23, classes: int = 3) -> list[tuple[int, bytes]]:
    """The same pictures as a folder and as tar files of five, in the order of the folder."""
    held = made.ordered(made.samples(count, classes))
    made.folder(root, {"train": held, "test": held[:classes]}, classes)
    for split, some in (("train", held), ("test", held[:classes])):
        made.shards(root, split, some, 5)
    return held


def in_files(splits: Splits) -> Pictures:
    assert isinstance(splits.train.inputs, Pictures)
    return splits.train.inputs


# --- where bytes are ----------------------------------------------------------------------------------------


NAMES = st.text(st.sampled_from("abcé/.-_ "), min_size=1, max_size=140).map(
    lambda name: "m" + name.strip("/")
)
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MEMBERS, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_members_are_where_the_headers_say(
    tmp_path: Path, members: list[tuple[str, bytes]], how: int
) -> None:
    path = made.packed(tmp_path / "some.tar", members, how)
    with open(path, "rb") as handle:
        found = list(tar.members(handle.fileno(), path))
        content = [os.pread(handle.fileno(), m.size, m.start) for m in found]
    with tarfile.open(path) as theirs:
        assert [m.name for m in found] == [m.name for m in theirs.getmembers()]
        assert [m.start for m in found] == [m.offset_data for m in theirs.getmembers()]
    assert content == [content for _, content in members]


def test_tar_files_that_are_none_are_refused(tmp_path: Path) -> None:
    whole = made.packed(tmp_path / "a.tar", [("a.jpg", bytes(3000)), ("b.jpg", bytes(10))])
    content = whole.read_bytes()
    linked = tmp_path / "linked.tar"
    with tarfile.open(linked, "w") as archive:
        info = tarfile.TarInfo("l.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "a.jpg"
        archive.addfile(info)
    cases = {
        "cut off": content[:2000],
        "no header": content[:520] + b"x" + content[521:],
        "uncompressed": zlib.compress(content),
        "a link": linked.read_bytes(),
    }
    cases["no header"] = bytes([content[0] ^ 1]) + content[1:]
    for why, damaged in cases.items():
        path = tmp_path / "damaged.tar"
        path.write_bytes(damaged)
        with open(path, "rb") as handle, pytest.raises(InputError, match=why):
            list(tar.members(handle.fileno(), path))


def zeroed(content: bytes, start: int, length: int | None = None) -> bytes:
    """The bytes with zeros from a place on."""
    count = len(content) - start if length is None else length
    return content[:start] + bytes(count) + content[start + count :]


PAIRS = [(f"{number}.{ending}", bytes([7]) * 3000) for number in range(8) for ending in ("jpg", "cls")]
ENDED: dict[str, Callable[[bytes, list[int]], bytes]] = {
    "a header of zeros": lambda whole, heads: zeroed(whole, heads[3], tar.BLOCK),
    "the last header of zeros": lambda whole, heads: zeroed(whole, heads[-1], tar.BLOCK),
    "nothing but zeros from the middle on": lambda whole, heads: zeroed(whole, heads[8]),
    "cut off between members": lambda whole, heads: whole[: heads[5]],
    "cut off before its end": lambda whole, heads: whole[: heads[-1] + 3584],
    "cut off in its end": lambda whole, heads: whole[: heads[-1] + 3584 + tar.BLOCK],
    "two joined": lambda whole, heads: whole + whole,
    "two joined without padding": lambda whole, heads: whole[: heads[-1] + 3584 + 2 * tar.BLOCK] + whole,
    "text after its end": lambda whole, heads: whole[:-1] + b"x",
}


@pytest.mark.parametrize("harm", ENDED)
def test_a_tar_file_that_does_not_end_as_one_loses_no_sample_in_silence(harm: str, tmp_path: Path) -> None:
    path = made.packed(tmp_path / "train-0.tar", PAIRS)
    with tarfile.open(path) as theirs:
        heads = [member.offset for member in theirs.getmembers()]
    path.write_bytes(ENDED[harm](path.read_bytes(), heads))
    with open(path, "rb") as handle, pytest.raises(InputError, match=r"tar -cf"):
        list(tar.members(handle.fileno(), path))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 30_000), max_size=6), st.sampled_from([1, 2, 5, 20]))
def test_whole_tar_files_of_any_size_are_read(tmp_path: Path, sizes: list[int], record: int) -> None:
    """Whatever the record that their end is filled up to, from two blocks of zeros alone to the usual one."""
    path = made.packed(tmp_path / "a.tar", [(f"{n}.jpg", bytes([7]) * size) for n, size in enumerate(sizes)])
    end = sum(tar.BLOCK * (1 + -(-size // tar.BLOCK)) for size in sizes) + 2 * tar.BLOCK
    path.write_bytes(path.read_bytes()[:end] + bytes(-end % (record * tar.BLOCK)))
    with open(path, "rb") as handle:
        assert [member.size for member in tar.members(handle.fileno(), path)] == sizes


def test_every_store_has_the_bytes_of_its_files(tmp_path: Path) -> None:
    held = both(tmp_path)
    for name, options in (("image_folder", {}), ("image_shards", {"classes": 3})):
        splits = loaded(name, tmp_path, **options)
        frames: Any = in_files(splits).frames
        assert [frames.store.read(i) for i in range(len(held))] == [content for _, content in held]
        assert splits.train.wanted_of(slice(None)).tolist() == [label for label, _ in held]
        assert splits.train.wanted_of(slice(None)).dtype == np.int64
        assert len({bytes(row) for row in frames.fingerprints}) == len(held)
        assert not isinstance(splits.train.targets.base, type(None)) or name == "image_folder"


def test_only_what_is_read_is_opened_and_few_files_stay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(tmp_path, 40)
    frames: Any = in_files(loaded("image_shards", tmp_path, classes=3)).frames
    opened: list[str] = []
    real = stores._Handle.__init__

    def spied(self: Any, path: Path) -> None:
        opened.append(path.name)
        real(self, path)

    monkeypatch.setattr(stores._Handle, "__init__", spied)
    monkeypatch.setattr(frames.store, "_open", stores._Open(3))
    frames.store.read(12)
    frames.store.read(14)
    assert opened == ["train-00002.tar"]
    for _ in range(2):
        for place in range(40):
            frames.store.read(place)
    here = Path(f"/proc/{os.getpid()}/fd")
    held = [p for p in here.iterdir() if p.is_symlink() and os.readlink(p).endswith(".tar")]
    assert len(held) == 3


def test_an_index_is_made_once_and_anew_where_a_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(tmp_path)
    from fedsim.data.pictures import building

    read: list[Any] = []
    real = building._looked_at
    monkeypatch.setattr(building, "_looked_at", lambda content: read.append(1) or real(content))
    for name, options in (("image_folder", {}), ("image_shards", {"classes": 3})):
        read.clear()
        before = in_files(loaded(name, tmp_path, **options)).fingerprints[slice(None)]
        assert len(read) == 26
        read.clear()
        in_files(loaded(name, tmp_path, **options))
        assert not read
        if name == "image_shards":
            path = tmp_path / "train-00001.tar"
            status = path.stat()
            content = bytearray(path.read_bytes())
            content[700] ^= 1
        else:
            path = sorted((tmp_path / "train").rglob("*.jpg"))[5]
            status = path.stat()
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
        path.write_bytes(bytes(content))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time as they were
        after = in_files(loaded(name, tmp_path, **options)).fingerprints[slice(None)]
        assert np.flatnonzero((before != after).any(1)).tolist() == [5]


def opened(folder: Path) -> Iterator[tuple[str, Path, Pictures]]:
    """Pictures of a folder and of tar files that a run has read from, and the file that one of them is in."""
    both(folder)
    for name, options, path in (
        ("image_folder", {}, sorted((folder / "train").rglob("*.jpg"))[3]),
        ("image_shards", {"classes": 3}, folder / "train-00000.tar"),
    ):
        held = in_files(loaded(name, folder, **options))
        held.read(np.array([3]))
        yield name, path, held


def test_a_file_that_changes_under_a_run_stops_it(tmp_path: Path) -> None:
    for name, path, held in opened(tmp_path):
        content = path.read_bytes()
        path.write_bytes(content + bytes(512))
        with pytest.raises(RunError, match="changed after its pictures were indexed"):
            held.read(np.array([3]))
        path.unlink()
        fresh = Pictures(held.frames, held.rule)
        if name == "image_folder":
            with pytest.raises(RunError, match="cannot be read"):
                fresh.read(np.array([3]))


def test_a_file_that_changes_in_size_and_time_as_it_was_stops_a_run(tmp_path: Path) -> None:
    for _, path, held in opened(tmp_path):
        status, content = path.stat(), path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(RunError, match="changed after its pictures were indexed"):
            held.read(np.array([3]))


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    both(tmp_path)
    first = in_files(loaded("image_shards", tmp_path, classes=3)).fingerprints[slice(None)]
    for path in (tmp_path / "cache" / index.FOLDER).glob("*.index"):
        path.write_bytes(path.read_bytes()[:-9])
    again = in_files(loaded("image_shards", tmp_path, classes=3)).fingerprints[slice(None)]
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("a.jpg", b"x"), ("a.cls", b"7")], "one of the declared classes"),
        ([("a.jpg", b"x")], "must have a member cls"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"0")], "one picture"),
        ([("a.jpg", b"x"), ("a.cls", b"0"), ("b.cls", b"0"), ("a.cls", b"0")], "stand together"),
        ([("a.v1.jpg", b"x"), ("a.cls", b"0")], r"no dot.*v1.jpg"),
        ([("a.b.v1.jpg", b"x"), ("a.b.v2.jpg", b"x"), ("a.b.v1.cls", b"0")], r"no dot.*b.v1.jpg, b.v2.jpg"),
        ([("a.heic", b"x"), ("a.meta", b"0")], r"members cls, .*heic, meta"),
    ],
    ids=["class", "no class", "two pictures", "key twice", "a dot", "dots", "no known ending"],
)
def test_samples_that_are_not_in_the_form_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], why: str
) -> None:
    made.packed(tmp_path / "train-0.tar", members)
    made.packed(tmp_path / "test-0.tar", [("a.jpg", encoded(noise(20, 20))), ("a.cls", b"1")])
    with pytest.raises(PrivateInputError, match=why) as refused:
        loaded("image_shards", tmp_path, classes=3)
    assert "train-0.tar, a" in str(refused.value)
    assert "got" not in refused.value.public


def test_classes_and_owners_come_from_any_member(tmp_path: Path) -> None:
    picture = encoded(noise(20, 20))
    said = [("dog", 4), ("cat", 0), ("dog", 4)]
    members = [
        member
        for number, (word, owner) in enumerate(said)
        for member in (
            (f"deep/{number}.JPG", picture),
            (f"deep/{number}.json", b'{"kind": "%s", "by": %d}' % (word.encode(), owner)),
        )
    ]
    for split in ("train", "test"):
        made.packed(tmp_path / f"{split}-0.tar", [("deep/._junk.jpg", b"?"), *members])
    options = {"classes": ["cat", "dog"], "target": "json.kind", "holder": "json.by"}
    splits = loaded("image_shards", tmp_path, **options)
    assert splits.train.targets.tolist() == [1, 0, 1]
    assert splits.train.groups is not None
    assert splits.train.groups.tolist() == [4, 0, 4]
    assert splits.test.groups is None


# --- from bytes to pixels -----------------------------------------------------------------------------------


def test_what_is_decoded_on_demand_is_what_is_decoded_at_once(tmp_path: Path) -> None:
    """One rule for all: folder at once, on demand, tar files, and packed to the rule's own shorter side."""
    both(tmp_path)
    for rule in ({}, {"short_side": 20}, {"fit": "squeeze"}):
        once = loaded("image_folder", tmp_path, decode="at_once", **rule).train
        assert isinstance(once.inputs, np.ndarray)
        for name, options in (
            ("image_folder", rule),
            ("image_shards", {"classes": 3, **rule}),
        ):
            found, whole = loaded(name, tmp_path, **options).train.read(slice(None))
            assert whole is None
            assert np.array_equal(found, once.inputs), (name, rule)
    packed = loaded("image_folder", tmp_path, decode="packed", short_side=20).train
    once = loaded("image_folder", tmp_path, decode="at_once", short_side=20).train
    assert np.array_equal(packed.read(slice(None))[0], once.inputs)


def test_views_of_a_picture_are_keyed_and_cut_from_the_file(tmp_path: Path) -> None:
    """Whatever the order, the others beside it, the number of views, and the threads; by an oracle in
    Pillow."""
    held = both(tmp_path)
    names, key = ["random_resized_crop", "flip"], seeds.derive(3, "augment", 8)
    for name, options in (("image_folder", {}), ("image_shards", {"classes": 3})):
        pictures = in_files(loaded(name, tmp_path, **options))
        ids = np.arange(len(held))
        whole, there = augment.views_of(pictures, ids, 3, key, names, 1)
        assert there is None
        order = np.random.default_rng(0).permutation(len(held))
        for workers in (2, 5):
            assert np.array_equal(augment.views_of(pictures, order, 3, key, names, workers)[0], whole[order])
        assert np.array_equal(augment.views_of(pictures, ids[7:9], 1, key, names)[0], whole[7:9, :1])
        other = augment.views_of(pictures, ids, 3, seeds.derive(3, "augment", 9), names)[0]
        assert np.mean((other == whole).all(axis=(2, 3, 4))) < 0.1
        words = augment._words(ids, 3, key, 2)
        from fedsim.augmentations.resized_crop import RandomResizedCrop

        for row in (0, 11, 22):
            image = Image.open(io.BytesIO(held[row][1])).convert("RGB")
            boxes = RandomResizedCrop().boxes(np.array([image.size[::-1]]), words[row : row + 1, :, 0])[0]
            for view, (top, left, high, wide) in enumerate(boxes):
                part = image.crop((left, top, left + wide, top + high))
                if min(high, wide) >= 4 * EDGE:  # decoded smaller: another test
                    continue
                expected = np.asarray(part.resize((EDGE, EDGE), Image.Resampling.BILINEAR))
                expected = expected[:, ::-1] if int(words[row, view, 1]) & 1 else expected
                assert np.array_equal(whole[row, view], expected)


def test_what_is_no_picture_keeps_its_place(tmp_path: Path) -> None:
    held = made.ordered(made.samples(12, 2))
    bomb = encoded(noise(30, 30), "PNG")
    bomb = bomb[:16] + struct.pack(">II", 60_000, 60_000) + bomb[24:]
    bomb = bomb[:29] + struct.pack(">I", zlib.crc32(bomb[12:29])) + bomb[33:]
    frames = io.BytesIO()
    some = [Image.fromarray(noise(30, 30, s)) for s in range(2)]
    some[0].save(frames, "GIF", save_all=True, append_images=some[1:])
    held[1] = (held[1][0], b"")
    held[4] = (held[4][0], b"no picture")
    held[5] = (held[5][0], held[5][1][: len(held[5][1]) // 2])
    held[8] = (held[8][0], bomb)
    held[9] = (held[9][0], frames.getvalue())
    held[10] = (held[10][0], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    broken = {1, 4, 5, 8, 9, 10}
    made.folder(tmp_path, {"train": held, "test": held[:1]}, 2)
    made.shards(tmp_path, "train", held, 5)
    made.shards(tmp_path, "test", held[:1], 5)
    for name, options in (
        ("image_folder", {}),
        ("image_folder", {"decode": "packed"}),
        ("image_shards", {"classes": 2}),
    ):
        train = loaded(name, tmp_path, **options).train
        assert isinstance(train.inputs, Pictures)
        assert len(train) == 12
        for found, whole in (
            train.read(slice(None)),
            augment.views_of(train.inputs, np.arange(12), 2, bytes(32), ["random_resized_crop"]),
        ):
            assert whole is not None
            assert set(np.flatnonzero(~whole)) == broken
            assert not found[~whole].any()
            assert found[whole].reshape(6, -1).any(1).all()
        assert train.wanted_of(slice(None)).tolist() == [label for label, _ in held]
        # First bytes tell of four: an empty file, text, too many pixels, PostScript.
        assert train.inputs.frames.known[0] == (6 if options.get("decode") == "packed" else 4)
    with pytest.raises(InputError, match=r"class0.*00001.jpg must be a readable image"):
        loaded("image_folder", tmp_path, decode="at_once")


def test_a_cap_on_pixels_is_asked_before_anything_is_decoded() -> None:
    content = encoded(noise(40, 50))
    assert Encoded(content, 2000).size == (40, 50)
    with pytest.raises(Undecodable, match="at most 1999 pixels"):
        Encoded(content, 1999)
    with pytest.raises(InputError, match="most_pixels"):
        loaded("image_folder", Path("nowhere"), most_pixels=2**40)


def test_a_lack_of_memory_says_nothing_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever repeats the step would have another sum: it is no property of the bytes."""
    both(tmp_path)
    pictures = in_files(loaded("image_folder", tmp_path))

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fedsim.data.pictures.decode.as_rgb", full)
    with pytest.raises(MemoryError):
        pictures.read(np.array([0]))


def test_packed_pictures_are_made_once_and_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = both(tmp_path)
    packed = in_files(loaded("image_folder", tmp_path, decode="packed", short_side=20))
    for row, (_, content) in enumerate(held):
        high, wide = packed.frames.open(row).size
        whole = Encoded(content).size
        assert min(high, wide) == min(20, *whole)
        assert abs(wide / high - whole[1] / whole[0]) < 0.1

    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(Encoded, "__init__", refuse)
    again = in_files(loaded("image_folder", tmp_path, decode="packed", short_side=20))
    assert np.array_equal(again.read(slice(None))[0], packed.read(slice(None))[0])


def test_rows_of_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    both(tmp_path)
    train = loaded("image_shards", tmp_path, classes=3).train
    whole = train.read(slice(None))[0]
    nearly = np.delete(np.arange(23), [9, 22])
    for rows in (slice(3, 17), np.array([20, 1, 7]), slice(0, 20, 3), nearly):
        taken = train.take(rows)
        assert np.array_equal(taken.read(slice(None))[0], whole[rows])
        assert np.array_equal(taken.take(slice(1, 3)).read(np.array([1]))[0], whole[rows][[2]])
        assert np.array_equal(taken.identity[slice(None)], train.identity[slice(None)][rows])
    assert len(train.take(slice(30, 40)).inputs) == 0


def test_no_thread_stays_after_reading(tmp_path: Path) -> None:
    both(tmp_path)
    in_files(loaded("image_shards", tmp_path, classes=3)).read(slice(None), 4)
    assert not [t for t in threading.enumerate() if t.name.startswith("pictures")]


# --- memory -------------------------------------------------------------------------------------------------


def test_millions_of_samples_cost_at_most_16_bytes_each(tmp_path: Path) -> None:
    """Index, classes, holders and cuts of 2,000,000 samples: what is mapped and what is allocated,
    together."""
    count, holders = 2_000_000, 10_000
    rng = np.random.default_rng(0)
    columns = {
        "start": np.arange(count, dtype=np.uint32),
        "size": np.full(count, 2000, np.uint32),
        "sum": np.zeros((count, 16), np.uint8),
        "class": rng.integers(0, 1000, count).astype(np.uint16),
    }
    path = tmp_path / "made.index"
    with open(path, "wb") as handle:
        index.write(handle, columns, {"shards": [("a.tar", 0, 0, 0)], "refused": 0})
    used = ("start", "size", "class")
    mapped = sum(columns[name].nbytes for name in used)
    from fedsim.data.examples import ArrayDataset
    from fedsim.data.pictures.pictures import Fit, InFiles
    from fedsim.data.targets import Targets

    tracemalloc.start()
    try:
        store = stores.Shards(tmp_path, index.Index(path))
        inputs = Pictures(InFiles(store, 2**26), Fit(EDGE))
        train = ArrayDataset(
            "x", inputs, store.index.column("class"), None, Targets("class", 1000), (0.5,) * 3, (0.5,) * 3
        )
        cut = train.take(np.sort(rng.permutation(count)[: count - 10_000]))
        config = FederationConfig(holders=holders, partition=Choice("iid"))
        parts = partition(Material(len(cut), cut.targets), config, 0)
        assert isinstance(parts, Partition)
        del store
        allocated, _ = tracemalloc.get_traced_memory()
        drawn = sum(len(ids) for ids in parts.blocks_of_node(0, 2))
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert abs(drawn - len(cut) / 2) < len(cut) / 50
    assert allocated + mapped <= 16 * count + 2**20, (allocated / count, mapped / count)
    assert peak - after < 40 * 2**20 + 16 * count, "making a partition costs more"
    assert after - allocated < 2**20
