"""Odd data files give the right numbers or a refusal that names them: nothing is cut off or guessed."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsim.config import DataConfig
from fedsim.data.datasets import load
from fedsim.data.examples import Splits, normalise
from fedsim.data.pictures.decode import Encoded
from fedsim.data.pictures.shown import Undecodable
from fedsim.data.sources.arrays import finite
from fedsim.validate import InputError

RNG = np.random.default_rng(11)
GREY = RNG.integers(0, 256, (4, 5), dtype=np.uint8)


def images(root: Path, odd: Callable[[Path], object], name: str = "odd.png") -> Splits:
    """Load a folder of plain grey images, one of which `odd` writes."""
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            Image.fromarray(GREY).save(root / split / label / "plain.png")
    odd(root / "train" / "dog" / name)
    return load(DataConfig("image_folder", {}, str(root)))


def saved(image: Image.Image, **how: Any) -> Callable[[Path], None]:
    return lambda path: image.save(path, **how)


def arrays(root: Path, classes: int | None = 3, **changes: Any) -> Splits:
    content: dict[str, Any] = {
        "train_inputs": RNG.normal(size=(6, 2)).astype(np.float32),
        "train_targets": np.arange(6) % 3,
        "test_inputs": RNG.normal(size=(3, 2)).astype(np.float32),
        "test_targets": np.arange(3),
    } | changes
    root.mkdir(exist_ok=True)
    for name, values in content.items():
        np.save(root / f"{name}.npy", values, allow_pickle=True)
    return load(DataConfig("arrays", {"classes": classes}, str(root)))


# --- images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd.png", "odd.tiff"])
def test_sixteen_bits_are_scaled_to_eight(name: str, tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 257 + RNG.integers(-128, 129, GREY.shape) * ((GREY > 0) & (GREY < 255))
    held = images(tmp_path, saved(Image.fromarray(deep.astype(np.uint16))), name).train
    assert np.array_equal(held.inputs[held.targets == 1][0], np.stack([GREY] * 3, axis=-1))


def test_big_endian_sixteen_bits_are_read_as_such(tmp_path: Path) -> None:
    """A TIFF written by hand: Pillow itself writes this machine's byte order only."""
    pixels = (GREY.astype(">u2") * 257).astype(">u2").tobytes()
    entries = [
        (256, 3, 5),
        (257, 3, 4),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (279, 4, len(pixels)),
    ]
    table = struct.pack(">H", len(entries))
    for tag, kind, value in entries:
        packed = struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
        table += struct.pack(">HHI", tag, kind, 1) + packed
    content = b"MM\x00*" + struct.pack(">I", 8 + len(pixels)) + pixels + table + bytes(4)
    held = images(tmp_path, lambda path: path.write_bytes(content), "odd.tif").train
    assert np.array_equal(held.inputs[held.targets == 1][0], np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY).convert("P"),
        Image.fromarray(np.dstack([GREY] * 3 + [np.full_like(GREY, 255)])),
        Image.fromarray(np.dstack([GREY, np.full_like(GREY, 255)])),
    ],
    ids=["palette", "RGBA, opaque", "grey and alpha, opaque"],
)
def test_what_shows_the_same_is_the_same(image: Image.Image, tmp_path: Path) -> None:
    held = images(tmp_path, saved(image)).train
    assert np.array_equal(held.inputs[held.targets == 1][0], np.stack([GREY] * 3, axis=-1))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    held = images(tmp_path, saved(Image.fromarray(GREY > 99))).train
    assert np.array_equal(held.inputs[held.targets == 1][0][..., 0], np.where(GREY > 99, 255, 0))


SAVED = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif"}


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """By EXIF: what row 0 and column 0 of the file are in what is shown."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels[::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels[:, ::-1].swapaxes(0, 1),
    }[orientation]


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_shown_the_way_up_that_it_says(kind: str, orientation: int) -> None:
    """Its size by the header, whole, and parts at every scale: as if turned before it was saved."""
    content, plain = io.BytesIO(), io.BytesIO()
    high, wide = 160, 256  # whole blocks of JPEG, so that turning and compressing hardly meet
    across, down = np.meshgrid(np.arange(wide), np.arange(high))
    pixels = np.dstack([across * 255 // wide, down * 255 // high, (across + down) // 2]).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    how: dict[str, Any] = {"exif": exif} if kind != "TIFF" else {"tiffinfo": {274: orientation}}
    how |= {"lossless": True} if kind == "WEBP" else {}
    others = {"save_all": True, "append_images": [Image.fromarray(255 - pixels)]} if kind == "MPO" else {}
    Image.fromarray(pixels).save(content, kind, quality=95, **how, **others)
    Image.fromarray(turned(pixels, orientation)).save(plain, "PNG")
    found, expected = Encoded(content.getvalue()), Encoded(plain.getvalue())
    assert found.size == expected.size
    near = 8 if kind in ("JPEG", "MPO") else 0
    for scale in (1, 2, 4, 8) if near else (1,):
        shown = np.asarray(found.image(scale)).astype(int)
        assert np.abs(shown - np.asarray(expected.image())[::scale, ::scale]).max() <= near + 3 * (scale - 1)
    for box, edge in (((8, 16, 64, 96), 16), ((0, 0, *found.size), 8), ((40, 40, 80, 80), 80)):
        parts = [one.cut(box, edge).astype(int) for one in (found, expected)]
        assert np.abs(parts[0] - parts[1]).max() <= near
    assert np.abs(found.fitted(8, "crop", 8).astype(int) - expected.fitted(8, "crop", 8)).max() <= near


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_a_png_may_say_its_way_up_after_its_pixels() -> None:
    content, exif = io.BytesIO(), Image.Exif()
    Image.fromarray(GREY).save(content, "PNG")
    exif[0x0112] = 6
    end = content.getvalue().index(b"IEND") - 4
    late = content.getvalue()[:end] + chunk(b"eXIf", exif.tobytes()[6:]) + content.getvalue()[end:]
    assert np.array_equal(np.asarray(Encoded(late).image())[..., 0], turned(GREY, 6))


@pytest.mark.parametrize("said", [b"", b"junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM"])
def test_damaged_exif_data_turn_nothing(said: bytes) -> None:
    content = io.BytesIO()
    Image.fromarray(GREY).save(content, "JPEG", exif=said)
    assert Encoded(content.getvalue()).size == GREY.shape


def deep_png(values: np.ndarray, kind: int) -> bytes:
    """A PNG of 16 bits a channel, (H, W, C)."""
    high, wide = values.shape[:2]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", wide, high, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    )


def deep_tiff(values: np.ndarray, order: str, white: bool = False, alpha: bool = False) -> bytes:
    """A TIFF of 16 bits a channel, (H, W, C), in one strip."""
    high, wide, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    bits = 8 + len(pixels)
    entries = [(256, 3, 1, wide), (257, 3, 1, high), (258, 3, channels, 16 if channels == 1 else bits)]
    entries += [(259, 3, 1, 1), (262, 3, 1, 2 if channels > 1 else int(not white)), (273, 4, 1, 8)]
    entries += [(277, 3, 1, channels), (278, 3, 1, high), (279, 4, 1, len(pixels))]
    table = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        short = kind == 3 and count == 1
        packed = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        table += struct.pack(f"{order}HHI", tag, kind, count) + packed
    extra = struct.pack(f"{order}{channels}H", *[16] * channels)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", bits + len(extra))
    return head + pixels + extra + table + bytes(4)


DEEP = RNG.integers(0, 2**16, (6, 9, 3)).astype(np.uint16)
SOLID = np.full((6, 9, 1), 65535, np.uint16)
SIXTEEN: dict[str, tuple[bytes, np.ndarray]] = {
    "png grey": (deep_png(DEEP[..., :1], 0), DEEP[..., :1]),
    "png grey, opaque": (deep_png(np.concatenate([DEEP[..., :1], SOLID], 2), 4), DEEP[..., :1]),
    "png colour": (deep_png(DEEP, 2), DEEP),
    "png colour, opaque": (deep_png(np.concatenate([DEEP, SOLID], 2), 6), DEEP),
    "pgm": (b"P5 9 6 65535\n" + DEEP[..., :1].astype(">u2").tobytes(), DEEP[..., :1]),
    "ppm": (b"P6 9 6 65535\n" + DEEP.astype(">u2").tobytes(), DEEP),
    "tiff colour": (deep_tiff(DEEP, "<"), DEEP),
    "tiff colour, big-endian": (deep_tiff(DEEP, ">"), DEEP),
    "tiff grey": (deep_tiff(DEEP[..., :1], "<"), DEEP[..., :1]),
    "tiff white is zero": (deep_tiff(DEEP[..., :1], "<", white=True), 65535 - DEEP[..., :1]),
}


@pytest.mark.parametrize("name", SIXTEEN)
def test_sixteen_bits_are_rounded_to_eight_in_every_format(name: str) -> None:
    content, values = SIXTEEN[name]
    expected = np.broadcast_to(np.rint(values / 257).astype(int), DEEP.shape)
    assert np.array_equal(np.asarray(Encoded(content).image()), expected)


@pytest.mark.parametrize("kind", [4, 6])
@pytest.mark.parametrize("alpha", [0, 65279, 65534])
def test_sixteen_bits_that_are_nearly_opaque_are_not(kind: int, alpha: int) -> None:
    cover = SOLID.copy()
    cover[3, 4] = alpha
    with pytest.raises(Undecodable, match="must not be transparent"):
        Encoded(deep_png(np.concatenate([DEEP[..., : kind - 3], cover], 2), kind)).image()


def test_cmyk_is_converted(tmp_path: Path) -> None:
    ink = np.zeros((4, 5, 4), np.uint8)
    ink[..., 0] = 255  # cyan alone takes all red
    held = images(tmp_path, saved(Image.fromarray(ink, mode="CMYK")), "odd.tif").train
    assert held.inputs[held.targets == 1][0][0, 0].tolist() == [0, 255, 255]


def see_through(path: Path) -> None:
    Image.fromarray(np.dstack([GREY] * 3 + [GREY])).save(path)


def frames(path: Path) -> None:
    Image.fromarray(GREY).save(path, save_all=True, append_images=[Image.fromarray(GREY)])


def broken_tail(path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8)).save(out, "PNG")
    path.write_bytes(out.getvalue()[:-30])


def no_pixels(path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 0, 0, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("odd", "name", "message"),
    [
        (saved(Image.fromarray(GREY.astype(np.float32) / 255)), "odd.tiff", "mode F"),
        (saved(Image.fromarray(GREY.astype(np.int32))), "odd.tiff", "mode I,"),
        (see_through, "odd.png", "must not be transparent"),
        (saved(Image.fromarray(GREY).convert("P"), transparency=int(GREY[0, 0])), "odd.png", "transparent"),
        (frames, "odd.tiff", "got 2 frames"),
        (broken_tail, "odd.png", "readable image"),
        (no_pixels, "odd.png", "odd.png"),
        (lambda path: path.write_text("what these are"), "notes.txt", "readable image"),
        (lambda path: path.write_bytes(b""), "empty.jpg", "readable image"),
        (lambda path: path.symlink_to("nowhere.png"), "gone.png", "readable image"),
        (lambda path: path.symlink_to(path.parent.parent), "loop", "count twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_without_a_plain_meaning_are_refused_by_name(
    odd: Callable[[Path], object], name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        images(tmp_path, odd, name)
    assert name in str(refused.value)


def test_unicode_names_links_and_hidden_files(tmp_path: Path) -> None:
    plain = tmp_path / "elsewhere.png"
    Image.fromarray(GREY).save(plain)

    def odd(path: Path) -> None:
        path.symlink_to(plain)
        (path.parent / ".DS_Store").write_bytes(b"not an image")
        (path.parent / "Wäsche 衣 \n").mkdir()
        Image.fromarray(GREY).save(path.parent / "Wäsche 衣 \n" / "ß.png")

    assert len(images(tmp_path / "Kleider ü", odd).train) == 4


def test_the_classes_are_the_folders_in_train_whatever_they_hold(tmp_path: Path) -> None:
    def odd(path: Path) -> None:
        path.parent.with_name("eel").mkdir()  # a class without images, and none in test

    both = images(tmp_path, odd)
    assert (both.train.declared.size, both.test.declared.size) == (3, 3)
    assert load(DataConfig("image_folder", {"classes": 3}, str(tmp_path))).train.declared.size == 3
    with pytest.raises(InputError, match=r"data.options.classes must be 3.*got 4"):
        load(DataConfig("image_folder", {"classes": 4}, str(tmp_path)))
    (tmp_path / "train" / "stray.png").write_bytes((tmp_path / "train/cat/plain.png").read_bytes())
    with pytest.raises(InputError, match=r"one folder per class and nothing else, got stray.png"):
        load(DataConfig("image_folder", {}, str(tmp_path), 1))


def test_removing_the_only_example_of_a_class_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    before = images(tmp_path, lambda _: None).train
    (tmp_path / "train" / "dog" / "plain.png").unlink()
    again = DataConfig("image_folder", {"classes": 2}, str(tmp_path))  # another configuration: read anew
    after = load(again).train
    assert (len(before), len(after)) == (2, 1)
    assert after.declared.size == before.declared.size == 2
    assert after.example_shape == before.example_shape


# --- arrays ---------------------------------------------------------------------------------------------


def test_classes_are_declared_and_never_counted(tmp_path: Path) -> None:
    """Two data sets that differ in one example give models of one shape, or none."""
    with pytest.raises(
        InputError, match=r"must declare its targets by one of classes.*Set data.options.classes"
    ):
        arrays(tmp_path / "undeclared", None)
    three = arrays(tmp_path / "three", 4)
    four = arrays(tmp_path / "four", 4, train_targets=np.array([0, 1, 2, 0, 1, 3]))
    assert three.train.declared.size == four.train.declared.size == 4
    with pytest.raises(InputError, match=r"labels must lie in 0 \.\. 2.*got 0 \.\. 3"):
        arrays(tmp_path / "outside", 3, train_targets=np.array([0, 1, 2, 0, 1, 3]))


@pytest.mark.parametrize("labels", [[0, 1, 10**9, 0, 1, 2], [0, 1000, 2000, 0, 1, 2], [0, 1, -1, 0, 1, 2]])
def test_labels_far_apart_do_not_make_a_large_model(labels: list[int], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train split of arrays: labels must lie in 0 \.\. 2"):
        arrays(tmp_path, 3, train_targets=np.array(labels))


@pytest.mark.parametrize(
    "labels",
    [
        np.arange(6) % 3 + 0.0,
        np.arange(6) % 2 == 0,
        (np.arange(6) % 3)[:, None],
        np.array(["a"] * 6),
        np.array([2**64 - 1] * 6, np.uint64),
        np.int64(3),
    ],
    ids=["float", "bool", "column", "text", "beyond int64", "scalar"],
)
def test_labels_that_are_not_integers_are_refused(labels: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"targets (must be integers (of shape \(6,\)|below 2\*\*63)|are words)"
    ):
        arrays(tmp_path, train_targets=labels)


@pytest.mark.parametrize("kind", [">i2", "<u1", ">u8", "<i8"])
def test_labels_of_any_integer_kind_are_the_same(kind: str, tmp_path: Path) -> None:
    assert (
        arrays(tmp_path, train_targets=(np.arange(6) % 3).astype(kind)).train.targets.tolist()
        == [0, 1, 2] * 2
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(6, 3, 8, 9), (6, 1, 28, 28), (6, 81, 7, 7), (6, 3, 4, 4)])
def test_channels_in_front_are_refused_naming_the_axis(
    shape: tuple[int, ...], dtype: type, tmp_path: Path
) -> None:
    inputs = {name: np.zeros((n, *shape[1:]), dtype) for name, n in (("train_inputs", 6), ("test_inputs", 3))}
    with pytest.raises(InputError, match=r"train_inputs must have the channels.*axis 1 of length"):
        arrays(tmp_path, **inputs)


@pytest.mark.parametrize("shape", [(8, 9, 3), (28, 28, 1), (5, 5, 40), (4, 4, 1)])
def test_float_images_have_the_layout_of_byte_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (6, *shape), dtype=np.uint8)
    seen = []
    for name, inputs in (("bytes", pixels), ("floats", (pixels / 255 - 0.5) / 0.5)):
        data = arrays(tmp_path / name, train_inputs=inputs, test_inputs=inputs[:3]).train
        assert data.example_shape == (shape[2], *shape[:2])
        seen.append(normalise(data.inputs[np.array([1, 4])], data).numpy())
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["train_inputs", "test_inputs"])
def test_values_that_are_not_finite_are_refused_naming_array_and_row(
    where: str, bad: float, tmp_path: Path
) -> None:
    inputs = np.zeros((6 if where == "train_inputs" else 3, 2), np.float32)
    inputs[2, 1] = bad
    with pytest.raises(InputError, match=f"{where} must be finite in float32, but row 2"):
        arrays(tmp_path, **{where: inputs})


def test_every_block_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.data.sources.arrays.BLOCK", 6)
    for row in range(7):
        values = np.zeros((7, 2), np.float16)
        values[row, 0] = np.inf
        with pytest.raises(InputError, match=f"row {row} "):
            finite(values, "x")
    finite(np.zeros((7, 2)), "x")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["<f4", ">f4", ">f8", "<f2"])
def test_byte_and_memory_order_change_nothing(kind: str, order: str, tmp_path: Path) -> None:
    inputs = np.asarray(RNG.normal(size=(6, 4)), dtype=kind, order=order)  # type: ignore[call-overload]
    data = arrays(tmp_path, train_inputs=inputs, test_inputs=inputs[:3]).train
    assert np.array_equal(normalise(data.inputs[np.array([3, 0])], data), inputs[[3, 0]].astype(np.float32))


@pytest.mark.parametrize(
    "inputs",
    [
        np.zeros((6, 2), np.int32),
        np.zeros((6, 2), bool),
        np.zeros((6, 2), complex),
        np.zeros((6, 2), np.longdouble),
        np.zeros((6, 2), np.uint16),
        np.zeros((6, 4, 4, 1), np.uint16),
        np.zeros((6, 4, 4), np.uint8),
        np.zeros((6, 0), np.float32),
        np.zeros(6, np.float32),
        np.float32(1),
        np.zeros(6, [("a", "f4")]),
        np.array([{}] * 6, object),
    ],
    ids=lambda a: f"{a.dtype} {a.shape}",
)
def test_inputs_of_another_kind_are_refused(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"inputs must|plain numeric"):
        arrays(tmp_path, train_inputs=inputs)


def archive(path: Path, member: bytes) -> None:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("train_inputs.npy", member)


def npy() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros((6, 2), np.float32))
    return out.getvalue()


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: archive(path, npy()[:-5]),
        lambda path: archive(path, b"\x93NUMPY\x01\x00\xff\xff"),
        lambda path: archive(path, npy().replace(b"(6, 2)", b"(6,-2)")),
        lambda path: archive(path, npy().replace(b"(6, 2)", b"(6, a)")),
        lambda path: archive(path, npy().replace(b"'<f4'", b"'|O8'")),
        lambda path: (archive(path, npy()), path.write_bytes(path.read_bytes()[:-40])),
        lambda path: (
            archive(path, npy()),
            path.write_bytes(path.read_bytes().replace(bytes(20), b"x" * 20)),
        ),
        lambda path: path.mkdir(),
    ],
)
def test_damaged_archives_are_refused(harm: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    harm(path)
    with pytest.raises(InputError, match=r"data.npz"):
        load(DataConfig("arrays", {"classes": 3}, str(path)))


def test_a_cut_off_npy_file_is_refused(tmp_path: Path) -> None:
    arrays(tmp_path)
    path = tmp_path / "test_inputs.npy"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(InputError, match=str(tmp_path)):
        load(DataConfig("arrays", {"classes": 3}, str(tmp_path), 5))
