"""Folders and tar files of pictures of many sizes, made for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def noise(high: int, wide: int, seed: int = 0) -> np.ndarray:
    """An image (high, wide, 3) of soft shapes under noise, which JPEG keeps apart from others."""
    rng = np.random.default_rng(seed)
    soft = rng.integers(0, 256, (high // 8 + 2, wide // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(soft).resize((wide, high), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-9, 10, (high, wide, 1)), 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    """The bytes of a file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, quality=92)
    return content.getvalue()


def samples(count: int, classes: int, seed: int = 0, most: int = 90) -> list[tuple[int, bytes]]:
    """(class, bytes of a JPEG) of pictures of different sizes."""
    rng = np.random.default_rng(seed)
    sides = rng.integers(24, most, (count, 2))
    return [
        (i % classes, encoded(noise(int(h), int(w), seed * 10_000 + i))) for i, (h, w) in enumerate(sides)
    ]


def folder(root: Path, splits: Mapping[str, list[tuple[int, bytes]]], classes: int) -> Path:
    """ROOT/SPLIT/CLASS/NUMBER.jpg; a class's folder is there though it be empty."""
    for split, held in splits.items():
        for name in range(classes):
            (root / split / f"class{name}").mkdir(parents=True, exist_ok=True)
        for number, (label, content) in enumerate(held):
            (root / split / f"class{label}" / f"{number:05d}.jpg").write_bytes(content)
    return root


def ordered(held: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Samples in the order that their folder gives them ids."""
    return sorted(held, key=lambda sample: sample[0])


def shards(root: Path, split: str, held: list[tuple[int, bytes]], each: int, **how: int) -> list[Path]:
    """ROOT/SPLIT-NUMBER.tar, `each` samples a file, KEY.jpg beside KEY.cls."""
    root.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(held), each):
        path = root / f"{split}-{start // each:05d}.tar"
        members = [
            member
            for number, (label, content) in enumerate(held[start : start + each], start)
            for member in ((f"{number:06d}.jpg", content), (f"{number:06d}.cls", str(label).encode()))
        ]
        paths.append(packed(path, members, **how))
    return paths


def packed(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file of these members."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
