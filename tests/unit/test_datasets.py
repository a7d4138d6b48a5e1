"""Loaders on small real files of each layout, limits, hold-out, normalisation, fetching (budget: 10 s)."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fedsim.config import DataConfig
from fedsim.data import datasets
from fedsim.data.datasets import load, resolve
from fedsim.data.examples import ArrayDataset, Splits, normalise
from fedsim.data.sources import standard
from fedsim.data.targets import Targets
from fedsim.validate import InputError, PrivateInputError

RNG = np.random.default_rng(7)


def write_idx(path: Path, values: np.ndarray) -> bytes:
    """Write the IDX format: magic (unsigned bytes, number of axes), big-endian lengths, data."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


def idx_folder(root: Path, name: str) -> dict[str, np.ndarray]:
    arrays = {
        "train-images-idx3-ubyte": RNG.integers(0, 256, (12, 28, 28)),
        "train-labels-idx1-ubyte": RNG.integers(0, 10, 12),
        "t10k-images-idx3-ubyte": RNG.integers(0, 256, (5, 28, 28)),
        "t10k-labels-idx1-ubyte": RNG.integers(0, 10, 5),
    }
    for file, values in arrays.items():
        write_idx(root / name / "raw" / file, values)
    return arrays


def npy_folder(root: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {
        "train_inputs": RNG.normal(size=(20, 6)).astype(np.float32),
        "train_targets": np.arange(20, dtype=np.int32) % 4,
        "train_groups": np.arange(20) // 5 * 10,
        "test_inputs": RNG.normal(size=(8, 6)).astype(np.float32),
        "test_targets": np.arange(8) % 4,
    } | changes
    root.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        if values is not None:
            np.save(root / f"{name}.npy", values, allow_pickle=True)
    return root


def from_root(name: str, root: Path, **settings: Any) -> Splits:
    return load(DataConfig(name=name, root=str(root), **settings))


def tiny(**changes: Any) -> ArrayDataset:
    fields: dict[str, Any] = {
        "name": "tiny",
        "inputs": np.zeros((3, 4, 4, 1), np.uint8),
        "targets": np.array([0, 1, 2]),
        "groups": None,
        "declared": Targets("class", 3),
        "mean": (0.5,),
        "std": (0.25,),
    }
    return ArrayDataset(**(fields | changes))


# --- the embedded subset --------------------------------------------------------------------------------


def test_embedded_subset_is_the_first_images_and_is_opened_once() -> None:
    splits = load(DataConfig())
    assert splits.train.inputs.shape == (10_000, 28, 28, 1)
    assert splits.test.inputs.shape == (2_000, 28, 28, 1)
    assert splits.train.inputs.dtype == np.uint8
    assert splits.train.targets.dtype == np.int64
    # The first labels of the published files, and the label counts of the first 10,000.
    assert splits.train.targets[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert splits.test.targets[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert np.bincount(splits.train.targets).tolist() == [
        942,
        1027,
        1016,
        1019,
        974,
        989,
        1021,
        1022,
        990,
        1000,
    ]
    assert splits.train.example_shape == (1, 28, 28)
    assert splits.train.groups is None
    assert load(DataConfig()) is splits
    size = (standard.EMBEDDED_DIR / standard.SUBSET_FILE).stat().st_size
    assert size < 8_000_000
    assert "Zalando" in (standard.EMBEDDED_DIR / "LICENSE-fashion-mnist").read_text()


def test_subset_altered_by_one_byte_is_refused(tmp_path: Path) -> None:
    content = bytearray((standard.EMBEDDED_DIR / standard.SUBSET_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / standard.SUBSET_FILE).write_bytes(content)
    with pytest.raises(InputError, match="sha256"):
        from_root("fashion_mnist_subset", tmp_path)


def test_subset_is_found_in_root_where_the_package_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (standard.EMBEDDED_DIR / standard.SUBSET_FILE).read_bytes()
    monkeypatch.setattr(standard, "EMBEDDED_DIR", tmp_path / "absent")
    monkeypatch.setattr(datasets, "_installed_embedded", list)
    with pytest.raises(InputError, match=r"must hold fashion_mnist_subset.npz"):
        from_root("fashion_mnist_subset", tmp_path)
    (tmp_path / standard.SUBSET_FILE).write_bytes(content)
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    assert len(load(DataConfig(root="elsewhere", train_examples=11)).train) == 11


# --- limits and hold-out --------------------------------------------------------------------------------


def test_limits_keep_the_first_examples() -> None:
    full = load(DataConfig())
    cut = load(DataConfig(train_examples=100, test_examples=30))
    assert np.array_equal(cut.train.inputs, full.train.inputs[:100])
    assert np.array_equal(cut.test.targets, full.test.targets[:30])
    with pytest.raises(InputError, match=r"data.train_examples must be at most 10000.*got 10001"):
        load(DataConfig(train_examples=10_001))


def test_holdout_comes_from_train_and_does_not_move() -> None:
    full = load(DataConfig())
    tuned = load(DataConfig(holdout_examples=1_000))
    assert (len(tuned.train), len(tuned.test)) == (9_000, 1_000)

    def fingerprint(data: ArrayDataset) -> list[bytes]:
        return sorted(hashlib.sha256(row.tobytes()).digest() for row in data.inputs)

    together = sorted(fingerprint(tuned.train) + fingerprint(tuned.test))
    assert together == fingerprint(full.train)
    # Fewer training examples leave the evaluation set as it is.
    small = load(DataConfig(holdout_examples=1_000, train_examples=50))
    assert np.array_equal(small.test.inputs, tuned.test.inputs)
    assert np.array_equal(small.train.inputs, tuned.train.inputs[:50])
    with pytest.raises(InputError, match=r"holdout_examples must be below the 10000"):
        load(DataConfig(holdout_examples=10_000))


# --- standard image sets through torchvision ------------------------------------------------------------


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_idx_files(tmp_path: Path, name: str, folder: str) -> None:
    arrays = idx_folder(tmp_path, folder)
    splits = from_root(name, tmp_path)
    assert np.array_equal(splits.train.inputs[..., 0], arrays["train-images-idx3-ubyte"])
    assert np.array_equal(splits.test.targets, arrays["t10k-labels-idx1-ubyte"])
    assert splits.train.declared.size == 10
    assert splits.train.mean == {"mnist": (0.1307,), "fashion_mnist": (0.2860,)}[name]


def test_idx_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idx_folder(tmp_path, "MNIST")
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    assert len(load(DataConfig(name="mnist")).train) == 12
    assert resolve(DataConfig(name="mnist")).root == str(tmp_path)
    monkeypatch.delenv("FEDSIM_DATA")
    assert resolve(DataConfig(name="mnist")).root == str(Path("data").absolute())


@pytest.mark.parametrize(
    ("name", "layout", "remedy"),
    [
        ("fashion_mnist", "FashionMNIST/raw", "make data"),
        ("mnist", "MNIST/raw", r"MNIST\(root, download=True\)"),
        ("cifar10", "cifar-10-batches-py", r"CIFAR10\(root, download=True\)"),
        ("cifar100", "cifar-100-python", r"CIFAR100\(root, download=True\)"),
        ("image_folder", "train/CLASS/FILE", "one folder per class"),
        ("arrays", "train_inputs, train_targets", "train_groups"),
    ],
)
def test_missing_files_name_folder_layout_and_remedy(
    tmp_path: Path, name: str, layout: str, remedy: str
) -> None:
    for expected in (layout, remedy, str(tmp_path)):
        with pytest.raises(InputError, match=expected):
            from_root(name, tmp_path)


def test_truncated_idx_file_is_refused(tmp_path: Path) -> None:
    idx_folder(tmp_path, "MNIST")
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(InputError, match="mnist: expected MNIST/raw"):
        from_root("mnist", tmp_path)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: int) -> None:
    # torchvision compares the files with published digests, so small files need their own digests there.
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    key = "labels" if name == "cifar10" else "fine_labels"
    planes: dict[str, np.ndarray] = {}
    labels: dict[str, list[int]] = {}

    def write(file: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(file: str) -> list[str]:
        planes[file] = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
        labels[file] = RNG.integers(0, classes, 4).tolist()
        return [file, write(file, {"data": planes[file].reshape(4, -1), key: labels[file]})]

    train = [batch(file) for file, _ in cls.train_list]
    test = [batch(file) for file, _ in cls.test_list]
    meta = {"filename": cls.meta["filename"], "key": cls.meta["key"]}
    meta["md5"] = write(meta["filename"], {meta["key"]: [f"class {i}" for i in range(classes)]})

    with pytest.raises(InputError, match="corrupted"):  # the real digests refuse the small files
        from_root(name, tmp_path)
    for attribute, value in (("train_list", train), ("test_list", test), ("meta", meta)):
        monkeypatch.setattr(cls, attribute, value)
    splits = from_root(name, tmp_path)
    expected = np.concatenate([planes[file] for file, _ in train]).transpose(0, 2, 3, 1)
    assert np.array_equal(splits.train.inputs, expected)
    assert splits.test.targets.tolist() == labels[test[0][0]]
    assert splits.train.declared.size == classes
    assert splits.train.example_shape == (3, 32, 32)


# --- image folder ---------------------------------------------------------------------------------------


def image_folder(root: Path) -> dict[str, np.ndarray]:
    pixels = {}
    for split, per_class in (("train", 3), ("test", 1)):
        for label in ("cat", "dog"):
            for i in range(per_class):
                path = root / split / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels[f"{split}/{label}/{i}"] = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels[f"{split}/{label}/{i}"]).save(path)
    return pixels


def test_image_folder(tmp_path: Path) -> None:
    pixels = image_folder(tmp_path)
    splits = from_root("image_folder", tmp_path)
    assert splits.train.inputs.shape == (6, 6, 9, 3)
    assert splits.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(splits.train.inputs[4], pixels["train/dog/1"])
    assert np.array_equal(splits.test.inputs[1], pixels["test/dog/0"])
    assert splits.train.example_shape == (3, 6, 9)


def test_image_folder_turns_grey_into_colour(tmp_path: Path) -> None:
    image_folder(tmp_path)
    grey = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "train" / "cat" / "0.png")
    assert np.array_equal(from_root("image_folder", tmp_path).train.inputs[0], np.stack([grey] * 3, axis=-1))


def test_image_folder_refuses_what_it_cannot_stack(tmp_path: Path) -> None:
    image_folder(tmp_path / "sizes")
    Image.new("RGB", (8, 6)).save(tmp_path / "sizes" / "test" / "dog" / "0.png")
    with pytest.raises(InputError, match=r"9 x 6 pixels.*got 8 x 6 in .*dog"):
        from_root("image_folder", tmp_path / "sizes")

    image_folder(tmp_path / "classes")
    (tmp_path / "classes" / "test" / "dog").rename(tmp_path / "classes" / "test" / "fox")
    with pytest.raises(InputError, match=r"class folders of .*train only, got fox"):
        from_root("image_folder", tmp_path / "classes")

    image_folder(tmp_path / "broken")
    (tmp_path / "broken" / "train" / "cat" / "1.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"1.png must be a readable image"):
        from_root("image_folder", tmp_path / "broken")


# --- arrays ---------------------------------------------------------------------------------------------


def test_folder_of_npy_files_is_memory_mapped(tmp_path: Path) -> None:
    npy_folder(tmp_path)
    splits = from_root("arrays", tmp_path, train_examples=15, options={"classes": 4})
    assert isinstance(splits.train.inputs, np.memmap)
    assert np.array_equal(splits.train.inputs, np.load(tmp_path / "train_inputs.npy")[:15])
    assert splits.train.groups is not None
    assert splits.train.groups.tolist() == [0] * 5 + [10] * 5 + [20] * 5
    assert splits.test.groups is None
    assert splits.train.targets.dtype == np.int64
    assert splits.train.declared.size == 4
    assert splits.train.example_shape == (6,)
    with pytest.raises(ValueError, match="read-only"):
        splits.train.targets[0] = 3


def test_classes_and_owners_of_arrays_may_be_words(tmp_path: Path) -> None:
    words = np.array(["oak", "ash", "elm"])
    trees, woods = words[np.arange(20) % 3], np.array([f"wood {i % 7}" for i in range(20)])
    npy_folder(tmp_path, train_targets=trees, test_targets=words[np.arange(8) % 3], train_groups=woods)
    options = {"classes": 3, "names": ["elm", "oak", "ash"]}
    splits = from_root("arrays", tmp_path, options=options)
    assert splits.train.targets[:4].tolist() == [1, 2, 0, 1]
    assert splits.train.declared.names == ("elm", "oak", "ash")
    assert splits.train.groups is not None
    assert splits.train.groups.tolist() == [i % 7 for i in range(20)]
    with pytest.raises(
        InputError, match=r"train split of arrays: targets are words, so the classes must be named"
    ):
        from_root("arrays", tmp_path, options={"classes": 3})
    with pytest.raises(InputError, match=r"must be one of the declared classes elm, oak, fir, got 'ash'"):
        from_root("arrays", tmp_path, options={"classes": 3, "names": ["elm", "oak", "fir"]})
    with pytest.raises(InputError, match=r"names of targets must be 3"):
        from_root("arrays", tmp_path, options={"classes": 3, "names": ["elm", "oak"]})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_file(tmp_path: Path, save: Any) -> None:
    images = RNG.integers(0, 256, (10, 5, 5, 2), dtype=np.uint8)
    labels = np.arange(10, dtype=np.uint8)
    path = tmp_path / "data.npz"
    save(path, train_inputs=images, train_targets=labels, test_inputs=images[:3], test_targets=labels[:3])
    splits = from_root("arrays", path, options={"classes": 10})
    assert np.array_equal(splits.train.inputs, images)
    assert (splits.train.mean, splits.train.std) == ((0.5, 0.5), (0.5, 0.5))
    assert splits.test.declared.size == 10
    assert splits.train.groups is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_inputs": np.zeros((20, 6), np.int64)}, "inputs must be uint8 images"),
        ({"train_inputs": np.zeros((20, 5, 5), np.uint8)}, "last axis of length 1"),
        ({"train_inputs": np.zeros(20, np.float32)}, "features of shape"),
        (
            {"train_targets": np.zeros(19, np.int64)},
            r"train split of arrays: targets must be integers of shape \(20,\)",
        ),
        (
            {"train_targets": np.zeros(20)},
            r"train split of arrays: targets must be integers of shape \(20,\)",
        ),
        (
            {"test_targets": np.arange(8) - 1},
            r"test split of arrays: labels must lie in 0 \.\. 3.*got -1 \.\. 6",
        ),
        ({"train_groups": np.zeros(3, np.int64)}, "groups must be 20 integers"),
        ({"train_groups": np.full(20, np.nan)}, "some have NaN or infinity"),
        ({"test_inputs": np.zeros((8, 7), np.float32)}, "same shape and dtype"),
        ({"test_inputs": np.zeros((8, 6), np.float64)}, "same shape and dtype"),
        ({"test_targets": None}, "without test_targets"),
        ({"train_inputs": np.array([{}] * 20, dtype=object)}, "plain numeric"),
        (
            {"test_inputs": np.zeros((0, 6), np.float32), "test_targets": np.zeros(0, np.int64)},
            "test split must hold at least one",
        ),
    ],
)
def test_malformed_arrays_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_root("arrays", npy_folder(tmp_path, **changes), options={"classes": 4})


def test_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    for content in (b"nothing of the kind", b"PK\x03\x04 cut off", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"data.npz must hold plain numeric"):
            from_root("arrays", path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"one.npy must hold plain numeric"):
        from_root("arrays", tmp_path / "one.npy")


# --- the containers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": np.array([0, 1, 3])}, r"0 \.\. 2.*got 0 \.\. 3"),
        ({"mean": (0.5, 0.5)}, "must hold 1 numbers"),
        ({"std": (0.0,)}, "std positive"),
        ({"inputs": np.zeros((3, 0, 4, 1), np.uint8)}, "inputs must be"),
    ],
)
def test_inconsistent_dataset_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("size", [0, -1])
def test_no_number_of_classes_is_refused(size: int) -> None:
    with pytest.raises(InputError, match="number of class must be"):
        Targets("class", size)


def test_the_callers_array_stays_writable() -> None:
    labels = np.array([0, 1, 2])
    data = tiny(targets=labels)
    labels[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        data.targets[0] = 0


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'cifar10'"):
        load(DataConfig(name="cifar-10"))


# --- normalise ------------------------------------------------------------------------------------------


def test_normalise_against_the_formula() -> None:
    images = RNG.integers(0, 256, (5, 7, 6, 3), dtype=np.uint8)
    data = tiny(
        inputs=images,
        targets=np.zeros(5, np.int64),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.2435, 0.2616),
    )
    expected = ((images / 255.0 - np.array(data.mean)) / np.array(data.std)).transpose(0, 3, 1, 2)
    out = normalise(data.inputs, data, dtype=torch.float64)
    assert out.shape == (5, 3, 7, 6)
    assert out.is_contiguous()
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-14, atol=1e-14)
    single = normalise(data.inputs, data)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_normalise_does_not_depend_on_the_batch_and_takes_views() -> None:
    data = load(DataConfig()).train
    batch = data.inputs[:64]
    whole = normalise(batch, data)
    parts = torch.cat([normalise(batch[i : i + 7], data) for i in range(0, 64, 7)])
    assert torch.equal(whole, parts)
    stacked = normalise(np.stack([batch, batch[::-1]], axis=1), data)
    assert stacked.shape == (64, 2, 1, 28, 28)
    assert torch.equal(stacked[:, 0], whole)
    assert torch.equal(stacked[:, 1], whole.flip(0))


def test_features_pass_unchanged_but_for_their_dtype() -> None:
    features = RNG.normal(size=(3, 4)).astype(np.float16)
    data = tiny(inputs=features, mean=(), std=())
    out = normalise(features, data, dtype=torch.float64)
    assert out.dtype == torch.float64
    assert np.array_equal(out.numpy(), features.astype(np.float64))


def test_a_table_is_chosen_by_name_though_its_options_are_refused_as_they_are_by_default(
    tmp_path: Path,
) -> None:
    (tmp_path / "train.csv").write_text("age,owner,ill\n20,b,no\n40,a,yes\n60,b,yes\n", encoding="utf-8")
    (tmp_path / "test.csv").write_text("age,ill\n30,no\n", encoding="utf-8")
    options = {"numbers": {"age": [20, 60]}, "target": "ill", "classes": ["yes", "no"], "holder": "owner"}
    found = datasets.load(DataConfig("table", options, str(tmp_path)))
    assert found.train.inputs[:, 0].tolist() == [-1.0, 0.0, 1.0]
    assert found.train.targets.tolist() == [1, 0, 0], "in the declared order"
    assert found.train.groups is not None
    assert found.train.groups.tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="must declare its columns"):
        datasets.load(DataConfig("table", {}, str(tmp_path)))


def rows_of(folder: Path, lines: Sequence[str], head: str = "age,ward,out") -> None:
    for name in ("train", "test"):
        (folder / f"{name}.csv").write_text("\n".join([head, *lines]), encoding="utf-8")


COLUMNS = {
    "numbers": {"age": [0, 100]},
    "words": {"ward": ["A", "B"]},
    "target": "out",
    "classes": ["no", "yes"],
}


def test_a_column_that_tells_nothing_of_public_data_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows_of(tmp_path, ["30, A ,no", "60,B,yes"])
    data = load(DataConfig("table", COLUMNS, str(tmp_path))).train
    assert data.inputs.tolist() == [[pytest.approx(-0.4), 1, 0], [pytest.approx(0.2), 0, 1]]
    assert not caplog.records
    wrong = {**COLUMNS, "numbers": {"age": [0, 1]}, "words": {"ward": ["a", "b"]}}
    load(DataConfig("table", wrong, str(tmp_path)))
    assert ["age is one value" in r.getMessage() for r in caplog.records] == [True, False]
    assert "ward has none of the words" in caplog.records[1].getMessage()


def test_rows_without_a_holder_and_ranges_without_numbers_are_refused(tmp_path: Path) -> None:
    rows_of(tmp_path, ["30,A,no", "60,,yes"])
    given = {**COLUMNS, "words": {}, "holder": "ward"}
    with pytest.raises(InputError, match="must name the holder of every row"):
        load(DataConfig("table", given, str(tmp_path)))
    with pytest.raises(InputError, match="target_range goes with a target of numbers"):
        load(DataConfig("table", {**COLUMNS, "target_range": [0, 1]}, str(tmp_path)))


def test_a_tokenizer_whose_first_token_is_a_word_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    rows_of(tmp_path, ["the room,no", "room the,yes"], "text,target")
    for first, fits in (("the", False), ("[PAD]", True)):
        model = tokenizers.models.WordLevel(
            {first: 0, "room": 1, "the" if fits else "x": 2}, unk_token="room"
        )
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(tmp_path / "tokenizer.json"))
        config = DataConfig(
            "text",
            {"classes": ["no", "yes"], "tokenizer": "tokenizer.json", "places": 2 + fits},
            str(tmp_path),
        )
        if fits:
            assert load(config).train.inputs.tolist() == [[2, 1, 0], [1, 2, 0]]
        else:
            with pytest.raises(InputError, match="must have its padding as token 0"):
                load(config)


@pytest.mark.parametrize("asked", ["padding in front", "cutting", "dropout"])
def test_a_texts_tokens_follow_from_it_alone(asked: str, tmp_path: Path) -> None:
    """Whatever its tokenizer.json pads, cuts or draws."""
    tokenizers = pytest.importorskip("tokenizers")
    rows_of(tmp_path, ["the room room,no", "room,yes"], "text,target")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[PAD]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["[PAD]"], show_progress=False)
    made.train_from_iterator(["the room"] * 9, trainer)
    expected = [made.encode(text).ids for text in ("the room room", "room")]
    if asked == "padding in front":
        made.enable_padding(length=6, direction="left")
    elif asked == "cutting":
        made.enable_truncation(1)
    else:
        made.model.dropout = 0.9
    made.save(str(tmp_path / "tokenizer.json"))
    options = {"classes": ["no", "yes"], "tokenizer": "tokenizer.json", "places": 6}
    found = load(DataConfig("text", options, str(tmp_path))).train.inputs.tolist()
    assert found == [[*ids, *[0] * (6 - len(ids))] for ids in expected]


@pytest.mark.parametrize("cell", [["a", "b"], {"en": "a"}, True])
def test_a_cell_that_is_no_text_is_refused(cell: object, tmp_path: Path) -> None:
    for split in ("train", "test"):
        lines = [{"text": text, "target": "no"} for text in ("a", None, 5, cell)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"classes": ["no", "yes"], "train": "train.jsonl", "test": "test.jsonl"}
    with pytest.raises(PrivateInputError, match="text must hold texts") as refused:
        load(DataConfig("text", options, str(tmp_path)))
    assert "got" not in refused.value.public


def test_folders_of_texts_are_read_as_those_of_pictures(tmp_path: Path) -> None:
    """Links followed, hidden folders left out, a mark of the encoding no text; a link to nowhere refused."""
    for split in ("train", "test"):
        (here := tmp_path / split / "no").mkdir(parents=True)
        (here / "a.txt").write_bytes("a".encode("utf-16"))
        (here / ".hidden").mkdir()
        (here / ".hidden" / "c.txt").write_text("c")
        (other := tmp_path / f"{split} elsewhere").mkdir()
        (other / "b.txt").write_bytes(b"\xef\xbb\xbfb")
        (here / "linked").symlink_to(other)
    options = {"classes": ["no"], "train": "train", "test": "test", "tokenizer": "bytes", "places": 2}
    config = DataConfig("text", options, str(tmp_path))
    assert load(config).train.inputs.tolist() == [[98, 0], [99, 0]]
    (tmp_path / "train" / "no" / "d.txt").symlink_to("nowhere")
    datasets._load.cache_clear()
    with pytest.raises(InputError, match="must be a readable text"):
        load(config)


def test_a_tokenizer_with_a_gap_in_its_numbers_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    rows_of(tmp_path, ["the room,no"], "text,target")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "a": 5}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(InputError, match="without a gap"):
        load(DataConfig("text", {"classes": ["no", "yes"], "tokenizer": "tokenizer.json"}, str(tmp_path)))
