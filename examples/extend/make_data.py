"""Small data for the commands of docs/extend.md: python make_data.py, in the folder where they start."""

from pathlib import Path

import numpy as np


def main(folder="."):
    """Write rows/ (SVMlight), labels/ (arrays with several labels) and examples.npy (images)."""
    rows(Path(folder) / "rows")
    labels(Path(folder) / "labels")
    images = np.random.default_rng(5).integers(0, 256, (20, 28, 28, 1), np.uint8)
    np.save(Path(folder) / "examples.npy", images)


def rows(folder):
    """300 and 100 rows: the class is the sign of a sum, some cells are left out."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for split, count in (("train", 300), ("test", 100)):
        lines = ["# made up", ""]
        for _ in range(count):
            values = np.where(rng.random(6) < 0.7, rng.normal(size=6).round(2), 0.0)
            label = "+1" if values.sum() > 0 else "-1"
            cells = [f"{place + 1}:{value:g}" for place, value in enumerate(values) if value]
            lines.append(f"{label} qid:{'abcde'[rng.integers(5)]} {' '.join(cells)} # note")
        (folder / f"{split}.svm").write_text("\n".join(lines), encoding="utf-8")


def labels(folder):
    """300 and 100 examples of five numbers, each with up to three labels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(4)
    shown = rng.integers(0, 2, (400, 3))
    inputs = (shown @ rng.normal(size=(3, 5)) + rng.normal(0, 0.3, (400, 5))).astype(np.float32)
    for split, own in (("train", slice(300)), ("test", slice(300, None))):
        np.save(folder / f"{split}_inputs.npy", inputs[own])
        np.save(folder / f"{split}_targets.npy", shown[own])


if __name__ == "__main__":
    main()
