"""Small files in the exact layouts of CheXpert-v1.0-small, EyePACS, CIFAR-10 and ImageNet."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
    "Fracture", "Support Devices",
)  # fmt: skip
COMPETITION = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
CHEXPERT_HEAD = ",".join(("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS))


def picture(path: Path, high: int, wide: int, rng: np.random.Generator, grey: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (high, wide) if grey else (high, wide, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def chexpert(root: Path, patients: int = 6) -> Path:
    """CheXpert-v1.0-small below `root`: a frontal image of each patient, a lateral one of every second.

    The finding in the k-th of the 14 columns is "1.0", "0.0", "-1.0" or empty by (patient + k) mod 4.
    """
    rng, folder = np.random.default_rng(1), root / "CheXpert-v1.0-small"
    for split, first, name in (("train", 1, "train"), ("valid", 64541, "valid")):
        lines = [CHEXPERT_HEAD]
        for patient in range(patients):
            for view, side in ((1, "frontal"), (2, "lateral"))[: 1 + (patient % 2 == 0)]:
                below = f"{split}/patient{first + patient:05}/study1/view{view}_{side}.jpg"
                picture(folder / below, 32 + 3 * patient, 39, rng, grey=True)
                found = [("1.0", "0.0", "-1.0", "")[(patient + k) % 4] for k in range(len(FINDINGS))]
                if split == "valid":  # which radiologists read: no blanks, no doubt
                    found = [str(float((patient + k) % 2)) for k in range(len(FINDINGS))]
                shot = ("AP" if patient % 2 else "PA") if side == "frontal" else ""
                start = [f"CheXpert-v1.0-small/{below}", "Female", "68", side.capitalize(), shot]
                lines.append(",".join([*start, *found]))
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def eyepacs(root: Path, patients: int = 5) -> Path:
    """trainLabels.csv (image,level), retinopathy_solution.csv (image,level,Usage), images of any size."""
    rng = np.random.default_rng(2)
    for table, head, folder, first, end in (
        ("trainLabels", "image,level", "train", 10, ""),
        ("retinopathy_solution", "image,level,Usage", "test", 1, ",Public"),
    ):
        lines = [head]
        for patient in range(patients):
            for eye in ("left", "right"):
                name = f"{first + patient}_{eye}"
                picture(root / folder / f"{name}.jpeg", 40 + 2 * patient, 60 - 3 * patient, rng)
                lines.append(f"{name},{(patient + (eye == 'right')) % 5}{end}")
        (root / f"{table}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def cifar10(root: Path, patch: pytest.MonkeyPatch, each: int = 4) -> Path:
    """cifar-10-batches-py; torchvision is told the digests of these small files in place of the real ones."""
    rng, kind = np.random.default_rng(3), torchvision.datasets.CIFAR10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def written(name: str, content: dict[str, object]) -> list[str]:
        held = pickle.dumps(content)
        (folder / name).write_bytes(held)
        return [name, hashlib.md5(held).hexdigest()]

    def batches(files: Sequence[Sequence[str]]) -> list[list[str]]:
        return [
            written(
                name,
                {
                    "data": rng.integers(0, 256, (each, 3072), dtype=np.uint8),
                    "labels": [(place * each + row) % 10 for row in range(each)],
                },
            )
            for place, (name, _) in enumerate(files)
        ]

    patch.setattr(kind, "train_list", batches(kind.train_list))
    patch.setattr(kind, "test_list", batches(kind.test_list))
    meta = {"filename": kind.meta["filename"], "key": kind.meta["key"]}
    meta["md5"] = written(meta["filename"], {meta["key"]: [f"class {i}" for i in range(10)]})[1]
    patch.setattr(kind, "meta", meta)
    return root


def imagenet(root: Path, classes: int = 3, each: int = 4) -> Path:
    """train/nCLASS/nCLASS_ID.JPEG and test/nCLASS/ILSVRC2012_val_ID.JPEG, of any size."""
    rng, number = np.random.default_rng(4), 0
    for place in range(classes):
        word = f"n{1440764 + place:08}"
        for row in range(each):
            number += 1
            picture(root / "train" / word / f"{word}_{row}.JPEG", 36 + row, 50, rng)
            picture(root / "test" / word / f"ILSVRC2012_val_{number:08}.JPEG", 50, 36 + row, rng)
    return root
