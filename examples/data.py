"""Small made-up data for the examples, written below ./data once: no private data, no download."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path("data")
WARDS = ["eyes", "heart", "surgery"]
CLINICS = ("Ash", "Birch", "Cedar", "Elm", "Fir")


def stays() -> Path:
    """Hospital stays, train.csv and test.csv: age, ward, clinic, days, and whether they are many."""
    rng, folder = np.random.default_rng(1), ROOT / "stays"
    for name, count in (("train", 3000), ("test", 500)):
        rows = []
        for _ in range(count):
            age, ward = rng.integers(18, 96), rng.choice(WARDS)
            clinic = rng.choice(CLINICS, p=[0.4, 0.3, 0.1, 0.1, 0.1])
            days = 2 + age / 10 + {"eyes": -1, "heart": 0, "surgery": 3}[ward] + rng.normal(0, 0.5)
            rows.append((age, ward, clinic, f"{days:.2f}", "yes" if days > 8 else "no"))
        _write(folder / f"{name}.csv", ("age", "ward", "clinic", "days", "long"), rows)
    return folder


def reviews() -> Path:
    """Short reviews, train.csv and test.csv: a text, and whether it is good or bad."""
    words = {
        "good": ["lovely", "bright", "tasty", "friendly", "superb"],
        "bad": ["awful", "dull", "stale", "rude", "broken"],
    }
    rng, folder = np.random.default_rng(2), ROOT / "reviews"
    for name, count in (("train", 600), ("test", 200)):
        rows = []
        for _ in range(count):
            opinion = str(rng.choice(["good", "bad"]))
            first, second = rng.choice(words[opinion], 2)
            rows.append((f"the {rng.choice(['food', 'room', 'staff'])} was {first} and {second}", opinion))
        _write(folder / f"{name}.csv", ("text", "opinion"), rows)
    return folder


def scenes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 16, 16, 3) of bytes, and which of three coloured bands each has."""
    rng = np.random.default_rng(seed)
    shown = rng.integers(0, 2, (count, 3))
    images = rng.integers(0, 60, (count, 16, 16, 3))
    for colour in range(3):
        images[:, 5 * colour : 5 * colour + 5, :, colour] += 190 * shown[:, colour, None, None]
    return images.astype(np.uint8), shown


def photos() -> Path:
    """Photos in folders, train/CLASS/FILE and test/CLASS/FILE: of land or of sea, and of every size."""
    rng, folder = np.random.default_rng(3), ROOT / "photos"
    for split, count in (("train", 200), ("test", 60)):
        for kind, colour in (("land", (90, 150, 60)), ("sea", (50, 90, 170))):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                size = (*rng.integers(20, 60, 2), 3)
                pixels = np.clip(rng.normal(colour, 40, size), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{number}.png")
    return folder


def _write(path: Path, names: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([names, *rows])
