"""Feature files: resumed after every death, shared by nodes, and never wrong (budget: 25 s)."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedsim.data import cache, datasets, feature_file, features
from fedsim.data.feature_file import FeatureFile
from fedsim.data.feature_maps import FeatureMap
from fedsim.engine.experiment import partition_of, prepare, task_of
from fedsim.merging import Choice
from fedsim.validate import InputError
from tests.conftest import child_that, command, end_of, small, train

WIDTH = 12
IMAGES = np.random.default_rng(5).integers(0, 256, (300, 4, 4, 1)).astype(np.uint8)
MAP = Choice(f"{__name__}:Wavy")
seen: list[NDArray[np.uint8]] = []


@dataclass(frozen=True)
class Wavy(FeatureMap):
    """A cheap map that notes what it is given."""

    phase: float = 0.0

    def version(self) -> str:
        return "wavy"

    def output_shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        return (WIDTH,)

    def compute(self, images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        seen.append(images)
        for start in range(0, len(images), 32):
            values = images[start : start + 32].reshape(-1, 16).astype(np.float32)
            yield np.sin(values[:, :WIDTH] + values[:, -1:] + self.phase)


def expected(images: NDArray[np.uint8] = IMAGES) -> NDArray[np.float16]:
    return np.concatenate([batch.astype("<f2") for batch in Wavy().compute(images)])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "BLOCK", 64)
    datasets._load.cache_clear()
    seen.clear()
    return tmp_path / "cache"


def computed(rows: Any = slice(None), images: NDArray[np.uint8] = IMAGES) -> NDArray[np.float16]:
    return features.of_images(MAP, images, rows, "set")


def blocks() -> int:
    """How many blocks have been computed since this was last asked."""
    n = len(seen)
    seen.clear()
    return n


# --- deaths


def killed_at(moment: int) -> None:
    """Compute, and be killed at the given write, half of which is done; the first is that of the header."""
    left = [moment]
    put, header = cache.put, np.lib.format.write_array_header_1_0

    def dying(number: int, content: bytes, offset: int) -> None:
        left[0] -= 1
        put(number, content[: len(content) // 2] if left[0] < 0 else content, offset)
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_header(handle: Any, described: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            handle.write(b"\x93NUM")
            handle.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        header(handle, described)

    cache.put, np.lib.format.write_array_header_1_0 = dying, dying_header  # type: ignore[assignment]
    computed()


@pytest.mark.parametrize("moment", range(12))
def test_killed_at_any_write_it_goes_on_after_the_last_finished_block(moment: int) -> None:
    ended = end_of(child_that(lambda: killed_at(moment)))
    assert ended == (-signal.SIGKILL if moment < 11 else 0)  # a header, 5 blocks of rows and record
    blocks()
    np.testing.assert_array_equal(computed(), expected())
    finished = max(moment - 1, 0) // 2
    assert blocks() - 1 == 5 - min(finished, 5)  # one is the test's own
    computed()
    assert blocks() == 0


def test_killed_many_times_over_it_comes_to_the_same_end() -> None:
    moments = np.random.default_rng(3).integers(1, 4, 30)
    for moment in moments:
        if end_of(child_that(lambda moment=moment: killed_at(int(moment)))) == 0:  # type: ignore[misc]
            break
    np.testing.assert_array_equal(computed(), expected())


def puts_and_syncs(path: Path) -> tuple[bytes, list[tuple[bytes, int] | str]]:
    """Compute all blocks; return the file as it was before, and what was written to it, with "sync" where it
    was synced and "added" where a block was said to be finished."""
    done: list[tuple[bytes, int] | str] = []
    before: list[bytes] = []

    def put(number: int, content: bytes, offset: int) -> None:
        if not before:
            before.append(path.read_bytes())
        done.append((bytes(content), offset))
        real[0](number, content, offset)

    def sync(number: int) -> None:
        done.append("sync")
        real[1](number)

    def add(*arguments: Any) -> None:
        real[2](*arguments)
        done.append("added")

    real = cache.put, cache.sync, feature_file.Writing.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "put", put)
        patch.setattr(cache, "sync", sync)
        patch.setattr(feature_file.Writing, "add", add)
        computed()
    return before[0], done


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_power_cut_leaves_is_gone_on_with(data: st.DataObject, folder: Path) -> None:
    """A disk keeps what was synced; of later writes any, in any order, or the first half of one."""
    shutil.rmtree(folder, ignore_errors=True)
    computed(slice(0, 0))
    (path,) = folder.glob("*.npy")
    before, done = puts_and_syncs(path)
    cut = data.draw(st.integers(0, len(done)))
    safe = max((i for i in range(cut) if done[i] == "sync"), default=-1)
    content = bytearray(before)
    for i, written in enumerate(done[:cut]):
        if isinstance(written, str):
            continue
        part, offset = written
        if i > safe:
            part = part[: data.draw(st.sampled_from([0, len(part) // 2, len(part)]))]
        content[offset : offset + len(part)] = part  # a gap before it is filled with zeros below
    path.write_bytes(bytes(content))
    blocks()
    np.testing.assert_array_equal(computed(), expected())
    assert blocks() - 1 <= 5 - done[:cut].count("added")
    FeatureFile(path, (300, WIDTH)).check()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97, 0.999])
def test_a_file_that_was_cut_short_is_filled_again(share: float, folder: Path) -> None:
    computed()
    (path,) = folder.glob("*.npy")
    content = path.read_bytes()
    path.write_bytes(content[: max(int(share * len(content)), 128)])
    blocks()
    np.testing.assert_array_equal(computed(), expected())
    assert blocks() > 1
    assert path.read_bytes() == content


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_is_noticed(place: int, bit: int, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    computed()
    (path,) = folder.glob("*.npy")
    content = bytearray(path.read_bytes())
    content[128 + place % (len(content) - 128)] ^= 1 << bit
    path.write_bytes(bytes(content))
    in_a_row = place % (len(content) - 128) < 300 * WIDTH * 2
    with pytest.raises(InputError, match="damaged") if in_a_row else contextlib.nullcontext():
        features.file_of(MAP, IMAGES, slice(None), "set").check()
    if not in_a_row:  # in the journal: computed again
        np.testing.assert_array_equal(computed(), expected())


# --- disks


def test_a_full_disk_is_said_and_what_is_finished_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    put, left = cache.put, [5]

    def full(number: int, content: bytes, offset: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            put(number, content[:7], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        put(number, content, offset)

    monkeypatch.setattr(cache, "put", full)
    with pytest.raises(InputError, match=r"No space left on device.*What is finished stays"):
        computed()
    monkeypatch.setattr(cache, "put", put)
    blocks()
    np.testing.assert_array_equal(computed(), expected())
    assert blocks() - 1 == 3


def test_too_little_space_is_said_before_hours_of_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(InputError, match="are still to be written"):
        computed()
    assert blocks() == 0


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda number, view, offset: real(number, view[:3], offset))
    np.testing.assert_array_equal(computed(), expected())


# --- what must not mix


def test_another_map_data_set_or_block_size_meets_no_old_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = np.array(computed())
    changed = IMAGES.copy()
    changed[7, 0, 0] ^= 1
    np.testing.assert_array_equal(computed(images=changed), expected(changed))
    np.testing.assert_array_equal(computed(), old)
    assert len(list(folder.glob("*.npy"))) == 2
    other = features.of_images(Choice(MAP.name, {"phase": 1.0}), IMAGES, name="set")
    assert (other != old).any()
    monkeypatch.setattr(Wavy, "version", lambda self: "wavier")
    computed()
    monkeypatch.setattr(features, "BLOCK", 32)
    computed()
    monkeypatch.setattr(features, "LEAST", 16)
    computed()
    features.of_images(MAP, IMAGES, name="another set")
    features.of_images(MAP, IMAGES)
    assert len(list(folder.glob("*.npy"))) == 8
    blocks()
    computed()
    assert blocks() == 0


@given(parts=st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 299), min_size=1)), max_size=6))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_two_data_sets_in_any_order_are_each_ones_own(
    parts: list[tuple[bool, set[int]]], folder: Path
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    other = IMAGES.copy()
    other[::3] ^= 1
    for which, wanted in parts:
        images, rows = (other if which else IMAGES), np.array(sorted(wanted))
        np.testing.assert_array_equal(computed(rows, images)[rows], expected(images)[rows])
    np.testing.assert_array_equal(computed(), expected())
    np.testing.assert_array_equal(computed(images=other), expected(other))


# --- parts


def test_parts_put_together_are_the_whole_bit_for_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real network, whose kernels round few images differently; a part has no other's image."""
    images = np.random.default_rng(1).integers(0, 256, (75, 16, 16, 1)).astype(np.uint8)
    owner = np.random.default_rng(2).choice(3, 75, p=[0.1, 0.3, 0.6])
    network = Choice("efficientnet_lite0_last")
    for node in range(3):
        own = np.where((owner == node)[:, None, None, None], images, np.uint8(0))
        features.of_images(network, own, np.flatnonzero(owner == node), "set")
    assert len(list(folder.glob("*.npy"))) == 1
    monkeypatch.setattr(features, "_block", lambda *_: pytest.fail("all rows must be there"))
    together = np.array(features.of_images(network, images, name="set"))
    monkeypatch.undo()
    monkeypatch.setenv("FEDSIM_CACHE", str(folder / "whole"))
    np.testing.assert_array_equal(together, features.of_images(network, images, name="set"))


def test_processes_with_overlapping_parts_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is computed once, and all of them right."""
    block, began = features._block, time.monotonic() + 0.5

    def slow(*arguments: Any) -> NDArray[np.float16]:
        time.sleep(0.05)
        return block(*arguments)

    monkeypatch.setattr(features, "_block", slow)
    parts = [np.arange(300)[::2], np.arange(100, 300), np.arange(0, 300, 3), np.arange(300)]

    def right(part: NDArray[np.int64]) -> None:
        time.sleep(max(0.0, began - time.monotonic()))
        assert (computed(part)[part] == expected()[part]).all()

    children = [child_that(lambda part=part: right(part)) for part in parts]  # type: ignore[misc]
    assert [end_of(child) for child in children] == [0] * 4
    blocks()
    np.testing.assert_array_equal(computed(), expected())
    assert blocks() == 1
    (path,) = folder.glob("*.npy")
    with open(path, "rb") as handle:
        ids = np.concatenate([i for i, *_ in FeatureFile(path, (300, WIDTH))._records(handle)])
    assert sorted(ids) == list(range(300))


# --- the command


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    root = tmp_path / "data"
    root.mkdir()
    for split, rows in (("train", 90), ("test", 20)):
        np.save(root / f"{split}_inputs.npy", IMAGES[:rows] if split == "train" else IMAGES[-rows:])
        np.save(root / f"{split}_targets.npy", np.arange(rows) % 3)
    return [
        "data.name=arrays", f"data.root={root}", "data.options.classes=3", f"data.features={MAP.name}",
        "federation.holders=9", "federation.nodes=3", "model.name=linear", "train.expected_batch_size=20",
        "privacy.noise_multiplier=1", "train.steps=2", "monitor.tensorboard=false", "monitor.progress=false",
    ]  # fmt: skip


def taken() -> set[bytes]:
    """The images the map was given since this was last asked."""
    out = {image.tobytes() for images in seen for image in images}
    seen.clear()
    return out


def test_nodes_extract_what_they_host_and_a_run_the_rest(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosted = []
    for node in range(3):
        assert command(["features", "base", *recipe, "--node", str(node)]) == 0
        hosted.append(taken())
    capsys.readouterr()
    assert set.union(*hosted) == {image.tobytes() for image in IMAGES[:90]}
    assert sum(map(len, hosted)) == 90
    assert command(["run", "base", *recipe, "--out", str(tmp_path / "run")]) == 0
    assert taken() == {image.tobytes() for image in IMAGES[-20:]}
    assert command(["features", "base", *recipe]) == 0
    assert not taken()
    assert "Nothing was missing" in capsys.readouterr().out


def test_a_cut_needs_its_own_examples_alone(recipe: list[str]) -> None:
    cut = ["data.train_examples=30", "data.holdout_examples=10", "data.test_examples=5"]
    assert command(["features", "base", *recipe, *cut, "federation.holders=3"]) == 0
    assert len(taken()) == 35
    assert command(["features", "base", *recipe]) == 0
    assert len(taken()) == 90 + 20 - 35


def test_nodes_of_a_cut_extract_their_own(recipe: list[str]) -> None:
    """Ids are rows of what holding out leaves, not of the data set."""
    from fedsim import loading

    given = [*recipe, "data.holdout_examples=40"]
    plain = loading.load("base", [*given, "data.features=null"])
    assert command(["features", "base", *given, "--node", "1"]) == 0
    splits = datasets.load(plain.data)
    held = partition_of(plain, splits.train, task_of(plain, splits), plain.seed).ids_of_node(1, 3)
    assert taken() == {image.tobytes() for image in splits.train.inputs[held]}


def test_it_says_speed_place_and_bytes_and_nothing_of_the_examples(
    recipe: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["features", "base", *recipe, "--node", "1"]) == 0
    (path,) = folder.glob("*.npy")
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert str(path) in shown
    assert f"{path.stat().st_size:,}" in shown
    assert "examples a second" in shown
    config = small(*recipe, "data.train_examples=null", "data.test_examples=null", "data.features=null")
    count = len(prepare(config).partition.ids_of_node(1, 3))
    assert not any(f" {count} " in line for line in shown.splitlines())
    assert command(["features", "base", *recipe, "--node", "1", "--json"]) == 0
    assert f'"{path}": {path.stat().st_size}' in capsys.readouterr().out


def test_wrong_requests_are_refused(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["features", "base", *recipe, "data.features=null"]) == 2
    assert command(["features", "base", *recipe, "--node", "3"]) == 2
    assert "node must be" in capsys.readouterr().err


def test_a_damaged_block_stops_the_command(
    recipe: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["features", "base", *recipe, "--node", "1"]) == 0
    (path,) = folder.glob("*.npy")
    with open(path, "r+b") as handle:
        handle.seek(128)
        handle.write(b"\x01" * 90 * 2 * WIDTH)
    assert command(["features", "base", *recipe]) == 2
    assert "damaged" in capsys.readouterr().err


def test_the_bar_says_examples_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.cli import extraction

    spent = [0.0, 0.0]
    with extraction.shown(spent):
        computed(slice(0, 70))
        computed()
        computed()
    assert spent[0] == 300
    assert spent[1] > 0


def test_a_training_run_sees_the_same_features(recipe: list[str], tmp_path: Path) -> None:
    config = small(*recipe, "data.train_examples=null", "data.test_examples=null")
    train(config, tmp_path / "run")
    held = datasets.load(config.data)
    np.testing.assert_array_equal(held.train.inputs, expected(IMAGES[:90]))
    assert isinstance(held.train.inputs.base, np.memmap) or isinstance(held.train.inputs, np.memmap)
    assert held.train.inputs.dtype == feature_file.DTYPE
