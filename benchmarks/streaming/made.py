"""Folders of JPEGs of many sizes, and tar files of many small ones, made from a seed."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 100
BASES = 40
TEST = 500


def folder(root: Path, count: int, seed: int = 0) -> Path:
    """Write ROOT/train/CLASS/FILE and ROOT/val/CLASS/FILE once, of `count` and TEST pictures.

    Sides and bytes are like ImageNet's (there 500 x 375 most often, 110 kB on average): sides 200 to 640, the
    quality of JPEG 90 to 97. A picture is a part of one of BASES textures, brighter or darker by its class.
    """
    if (root / "done").is_file() and (root / "done").read_text() == str(count):
        return root
    rng = np.random.default_rng(seed)
    bases = [_texture(rng) for _ in range(BASES)]
    for split, some in (("train", count), ("val", TEST)):
        for label in range(CLASSES):
            (root / split / f"n{label:08d}").mkdir(parents=True, exist_ok=True)
        for number in range(some):
            label = number % CLASSES
            high, wide = (int(side) for side in np.clip(rng.normal((375, 460), (60, 80)), 200, 640))
            top, left = (int(rng.integers(0, 1000 - side)) for side in (high, wide))
            part = bases[(label + number // CLASSES) % BASES][top : top + high, left : left + wide]
            pixels = part + np.uint8(label // 7)
            path = root / split / f"n{label:08d}" / f"n{label:08d}_{number}.JPEG"
            Image.fromarray(pixels).save(path, "JPEG", quality=int(rng.integers(90, 98)))
    (root / "done").write_text(str(count))
    return root


def _texture(rng: np.random.Generator) -> np.ndarray:
    """(1000, 1000, 3) uint8 below 241: noise of several scales, coarse ones stronger."""
    total = np.zeros((1000, 1000, 3), np.float32)
    for cell, strength in ((250, 60.0), (60, 30.0), (12, 16.0), (3, 8.0)):
        some = rng.normal(0, strength, (1000 // cell + 2, 1000 // cell + 2, 3)).astype(np.float32)
        planes = [
            np.asarray(Image.fromarray(some[..., c]).resize((1000, 1000), Image.Resampling.BICUBIC))
            for c in range(3)
        ]
        total += np.stack(planes, axis=-1)
    total += rng.normal(0, 7, (1000, 1000, 1)).astype(np.float32)
    return np.clip(total + 110, 0, 240).astype(np.uint8)


def fewer(root: Path, whole: Path, count: int) -> Path:
    """Write the first `count` training pictures of a folder, and its test pictures, as links to its files."""
    for split, most in (("train", count), ("val", TEST)):
        for path in sorted((whole / split).rglob("*.JPEG")):
            if int(path.stem.partition("_")[2]) < most:
                place = root / split / path.parent.name / path.name
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():
                    os.link(path, place)
    return root


def shards(root: Path, count: int, each: int = 10_000, edge: int = 16, seed: int = 0) -> Path:
    """Write ROOT/train-*.tar of `count` samples, `each` a file, and a test file, once: KEY.jpg, KEY.cls.

    The pictures are 1,000 different ones of edge x edge pixels.
    """
    if (root / "done").is_file() and (root / "done").read_text() == str(count):
        return root
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    contents = []
    for _ in range(1000):
        content = io.BytesIO()
        cells = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((edge, edge)).save(content, "JPEG", quality=80)
        contents.append(content.getvalue())
    for name, some in (("train", count), ("test", 1000)):
        for start in range(0, some, each):
            with open(root / f"{name}-{start // each:05d}.tar", "wb") as handle:
                for number in range(start, min(start + each, some)):
                    content = contents[number % len(contents)]
                    handle.write(_member(f"{number:09d}.jpg", content))
                    handle.write(_member(f"{number:09d}.cls", str(number % 10).encode()))
                handle.write(bytes(1024))
    (root / "done").write_text(str(count))
    return root


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def size_of(root: Path) -> tuple[int, float]:
    """Return how many files there are, and their mean size in bytes."""
    sizes = [entry.stat().st_size for entry in _entries(root)]
    return len(sizes), float(np.mean(sizes))


def _entries(root: Path) -> list[os.DirEntry[str]]:
    found: list[os.DirEntry[str]] = []
    for entry in os.scandir(root):
        if entry.is_dir():
            found += _entries(Path(entry.path))
        else:
            found.append(entry)
    return found
