"""Images that the rows of a table name: what CheXpert's and EyePACS's files say, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsim.config import DataConfig
from fedsim.data.datasets import load
from fedsim.data.examples import Splits
from fedsim.data.sources import image_files
from fedsim.validate import InputError, PrivateInputError
from tests.unit.leaderboard_files import COMPETITION, chexpert, eyepacs

CHEXPERT: dict[str, Any] = {
    "train": "train.csv",
    "test": "valid.csv",
    "path": "Path",
    "strip": "CheXpert-v1.0-small/",
    "labels": list(COMPETITION),
    "blank": 0,
    "uncertain": 1,
    "size": 24,
}
EYEPACS: dict[str, Any] = {
    "train": "trainLabels.csv",
    "test": "retinopathy_solution.csv",
    "path": "image",
    "suffix": ".jpeg",
    "train_folder": "train",
    "test_folder": "test",
    "target": "level",
    "classes": 5,
    "size": 24,
}


def opened(root: Path, options: dict[str, Any], **changes: Any) -> Splits:
    return load(DataConfig("image_table", {**options, **changes}, str(root)))


# --- CheXpert ---------------------------------------------------------------------------------------------


def test_chexpert_labels_are_those_of_the_columns_by_the_declared_rules(tmp_path: Path) -> None:
    """Of patient p the finding in column k is 1, 0, -1 or blank by (p + k) mod 4."""
    root, columns = chexpert(tmp_path), (2, 5, 6, 8, 10)
    for doubt in (0, 1):
        held = opened(root, CHEXPERT, uncertain=doubt).train
        patients = [0, 0, 1, 2, 2, 3, 4, 4, 5]
        meaning = (1, 0, doubt, 0)
        assert held.targets.tolist() == [[meaning[(p + k) % 4] for k in columns] for p in patients]
    assert held.declared.kind == "labels"
    assert held.declared.names == COMPETITION
    assert held.inputs.shape == (9, 24, 24, 3)
    blank = opened(root, CHEXPERT, blank=1).train.targets
    assert blank.tolist() == [[(1, 0, 1, 1)[(p + k) % 4] for k in columns] for p in patients]
    test = opened(root, CHEXPERT).test
    assert test.targets.tolist() == [[(p + k) % 2 for k in columns] for p in patients]


def test_uncertain_labels_may_have_a_rule_each(tmp_path: Path) -> None:
    root = chexpert(tmp_path)
    rules = dict(zip(COMPETITION, (0, 1, 0, 1, 0), strict=True))
    held = opened(root, CHEXPERT, uncertain=None, uncertain_of=rules).train.targets
    ones, zeros = (opened(root, CHEXPERT, uncertain=doubt).train.targets for doubt in (1, 0))
    assert held.tolist() == np.where([0, 1, 0, 1, 0], ones, zeros).tolist()
    with pytest.raises(PrivateInputError, match=r"Edema must be one of 0, 1, empty, got '-1.0'"):
        opened(root, CHEXPERT, uncertain=None, uncertain_of={"Cardiomegaly": 0})
    other = opened(root, CHEXPERT, uncertain=0, uncertain_of={"Edema": 1, "Atelectasis": 1}).train.targets
    assert other.tolist() == held.tolist()


def test_images_are_those_that_the_rows_name(tmp_path: Path) -> None:
    """Without a size they stay as they are; with one they go by the rule of image folders."""
    root = eyepacs(tmp_path)
    for folder in ("train", "test"):
        for place, path in enumerate(sorted((root / folder).iterdir())):
            Image.fromarray(np.full((30, 40, 3), 10 * place, np.uint8)).save(path)
    lines = (root / "trainLabels.csv").read_text().splitlines()
    (root / "trainLabels.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    held = opened(root, EYEPACS, size=None).train
    assert held.inputs.shape == (10, 30, 40, 3)
    assert held.inputs[:, 0, 0, 0].tolist() == [90 - 10 * row for row in range(10)]
    edges = np.zeros((24, 96, 3), np.uint8)
    edges[:, :36] = 200
    Image.fromarray(edges).save(root / "train" / "edges.png")
    (root / "trainLabels.csv").write_text("image,level\nedges.png,0\n")
    (root / "retinopathy_solution.csv").write_text("image,level\n1_left.jpeg,0\n")
    assert not opened(root, EYEPACS, suffix="").train.inputs.any(), "the middle"
    assert opened(root, EYEPACS, suffix="", fit="squeeze").train.inputs[0, 0, 0, 0] == 200


def test_constants_of_public_weights_are_taken(tmp_path: Path) -> None:
    root = eyepacs(tmp_path)
    assert opened(root, EYEPACS).train.mean == (0.5, 0.5, 0.5)
    held = opened(root, EYEPACS, mean=[0.48, 0.46, 0.41], std=[0.27, 0.26, 0.28])
    assert (held.train.mean, held.test.std) == ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def test_patients_own_their_images(tmp_path: Path) -> None:
    held = opened(chexpert(tmp_path), CHEXPERT, holder_in_path="(patient[0-9]+)/")
    assert held.train.groups is not None
    assert held.train.groups.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert held.test.groups is None
    eyes = opened(eyepacs(tmp_path / "eyes"), EYEPACS, holder_in_path="^([0-9]+)_").train.groups
    assert eyes is not None
    assert eyes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    by_column = opened(tmp_path / "CheXpert-v1.0-small", CHEXPERT, holder="AP/PA", only=FRONTAL).train.groups
    assert by_column is not None
    assert by_column.tolist() == [1, 0, 1, 0, 1, 0], "a column of both tables' rows that are used"


FRONTAL = {"Frontal/Lateral": "Frontal"}


def test_rows_of_a_declared_value_alone(tmp_path: Path) -> None:
    root = chexpert(tmp_path)
    held, every = opened(root, CHEXPERT, only=FRONTAL), opened(root, CHEXPERT)
    frontal = [0, 2, 3, 5, 6, 8]
    for some, all_ in ((held.train, every.train), (held.test, every.test)):
        assert np.array_equal(some.inputs, all_.inputs[frontal])
        assert np.array_equal(some.targets, all_.targets[frontal])


def test_blanks_around_the_wanted_word_leave_no_row_out(tmp_path: Path) -> None:
    root = chexpert(tmp_path)
    table = root / "train.csv"
    table.write_text(table.read_text().replace(",Frontal,", ", Frontal ,", 1))
    assert len(opened(root, CHEXPERT, only=FRONTAL).train) == 6


# --- EyePACS ----------------------------------------------------------------------------------------------


def test_eyepacs_levels(tmp_path: Path) -> None:
    held = opened(eyepacs(tmp_path), EYEPACS)
    assert held.train.targets.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 0]
    assert held.train.declared.names == ("0", "1", "2", "3", "4")
    by_name = opened(tmp_path, EYEPACS, classes=[4, 3, 2, 1, 0]).train.targets
    assert by_name.tolist() == [4, 3, 3, 2, 2, 1, 1, 0, 0, 4], "in the declared order"
    assert opened(tmp_path, EYEPACS, classes=7).train.declared.size == 7, "declared, not counted"


# --- what is refused --------------------------------------------------------------------------------------


def changed(table: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / table).read_text()
        assert old in text
        (root / table).write_text(text.replace(old, new, 1))

    return change


def no_image(root: Path) -> None:
    (root / "train" / "11_right.jpeg").write_bytes(b"nothing of the kind")


def other_size(root: Path) -> None:
    Image.new("RGB", (9, 9)).save(root / "train" / "11_right.jpeg")


def a_link(root: Path) -> None:
    (root / "test" / "1_left.jpeg").unlink()
    (root / "test" / "1_left.jpeg").symlink_to(root / "train" / "10_left.jpeg")


TRAIN = "trainLabels.csv"
NONE = "image,level\n"
WRONG: list[tuple[str, Callable[[Path], object], dict[str, Any], str]] = [
    ("no table", lambda root: (root / TRAIN).unlink(), {}, r"trainLabels.csv must be a readable .csv file"),
    ("no column", lambda root: None, {"path": "imag"}, r"has no column 'imag'. Did you mean 'image'"),
    ("no rows", lambda root: (root / TRAIN).write_text(NONE), {}, r"at least one row, got none of 0"),
    ("no such rows", lambda root: None, {"only": {"level": 9}}, r"one row with .*level.*got none of 10"),
    (
        "no file",
        lambda root: (root / "train" / "11_right.jpeg").unlink(),
        {},
        r"trainLabels.csv, row 5: image must name a file below .*train, got '.*11_right.jpeg'. Set data.root",
    ),
    ("empty path", changed(TRAIN, "11_right", ""), {}, r"row 5: image must be a path below .*got ''"),
    ("path above", changed(TRAIN, "11_right", "../x"), {}, r"row 5: image must be a path below .*got '../x'"),
    ("path from /", changed(TRAIN, "11_right", "/etc/x"), {}, r"row 5: image must be a path .*got '/etc/x'"),
    ("other start", lambda root: None, {"strip": "x/"}, r"row 2: image must start with .*strip 'x/', got"),
    ("no image", no_image, {}, r"trainLabels.csv, row 5: .*11_right.jpeg must be a readable image"),
    ("other size", other_size, {"size": None}, r"row [0-9]+: every image must be 60 x 40 pixels"),
    (
        "named twice",
        changed(TRAIN, "11_right", "10_left"),
        {},
        r"row 5: every image must be named once, .*10_left.jpeg, as .*trainLabels.csv, row 2'",
    ),
    ("in both splits", a_link, {}, r"retinopathy_solution.csv, row 2: every image must be named once"),
    ("other class", changed(TRAIN, "11_right,2", "11_right,5"), {}, r"row 5: level must be .*3, 4, got '5'"),
    ("no class", changed(TRAIN, "11_right,2", "11_right,"), {}, r"row 5: level must be one of .*, got ''"),
    ("ragged", changed(TRAIN, "11_right,2", "11_right"), {}, r"every row must have 2 cells, row 5 has not"),
    ("no owner", lambda root: None, {"holder_in_path": "^(1[0-3])_"}, r"row 10: image must hold an owner"),
    ("empty owner", lambda root: None, {"holder_in_path": "^(9*)"}, r"row 2: image must hold an owner"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "options", "message"), WRONG, ids=[wrong[0] for wrong in WRONG])
def test_wrong_files_are_refused_by_file_and_row(
    name: str, change: Callable[[Path], object], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    root = eyepacs(tmp_path)
    change(root)
    with pytest.raises(InputError, match=message) as found:
        opened(root, EYEPACS, **options)
    if isinstance(found.value, PrivateInputError):
        assert not re.search(r"row \d|1[0-4]_|'5'", found.value.public), "public messages tell no example's"


@pytest.mark.parametrize("cell", ["2.0", "yes", "nan", "-1"])
@pytest.mark.parametrize("doubt", [0, None])
def test_labels_without_a_declared_meaning_are_refused(cell: str, doubt: int | None, tmp_path: Path) -> None:
    root = chexpert(tmp_path)
    lines = (root / "train.csv").read_text().splitlines()
    cells = lines[4].split(",")
    cells[5 + 2] = cell  # Cardiomegaly
    lines[4] = ",".join(cells)
    lines = [line.replace("-1.0", "0.0") for line in lines]
    (root / "train.csv").write_text("\n".join(lines) + "\n")
    if cell == "-1" and doubt is not None:
        assert opened(root, CHEXPERT, uncertain=doubt).train.targets[3, 0] == doubt
        return
    message = rf"train.csv, row 5: Cardiomegaly must be one of 0, 1.*, got '{cell}'"
    with pytest.raises(PrivateInputError, match=message) as found:
        opened(root, CHEXPERT, uncertain=doubt)
    assert cell not in found.value.public or cell == "-1"


def test_blanks_without_a_rule_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        PrivateInputError, match=r"row [0-9]+: .* must be one of 0, 1, -1, got ''. data.options"
    ):
        opened(chexpert(tmp_path), CHEXPERT, blank=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": None, "classes": None}, "must declare its targets"),
        ({"labels": ["level"]}, "must declare its targets"),
        ({"classes": None}, "target = 'level' is not read|classes must list different words"),
        ({"classes": 0}, "target = 'level' is not read|classes must list different words"),
        ({"classes": ["0", 0]}, "classes must list different words"),
        ({"target": None, "labels": ["level"]}, "classes goes with a target"),
        ({"target": None, "classes": None, "labels": ["level", "level"]}, "must be different columns"),
        ({"target": None, "classes": None, "labels": ["level"], "blank": 2}, "blank must be 0, 1 or null"),
        ({"target": None, "classes": None, "labels": ["level"], "uncertain": 2}, "uncertain must be 0, 1"),
        (
            {"target": None, "classes": None, "labels": ["level"], "uncertain_of": {"levle": 1}},
            "every label of data.options.uncertain_of must be one of level, got 'levle'. Did you mean",
        ),
        ({"only": {"level": True}}, "only.level must be a word or a number, got True"),
        ({"blank": 0}, "blank"),
        ({"holder": "level", "holder_in_path": "(x)"}, "both name the owner"),
        ({"holder_in_path": "("}, "must be a regular expression"),
        ({"holder_in_path": "x"}, "must have one group"),
        ({"size": 0}, "data.options.size must be a positive"),
        ({"fit": "stretch"}, "data.options.fit must be one of crop, squeeze"),
        ({"size": None, "fit": "squeeze"}, "fit"),
        ({"mean": [0.5]}, "mean must be three numbers"),
        ({"std": [0.0, 0.5, 0.5]}, "std must be positive"),
        ({"std": [128.0, 128.0, 128.0]}, "std must be three numbers in 0 .. 1"),
        ({"sufix": ".png"}, "Did you mean '.*suffix'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        opened(eyepacs(tmp_path), EYEPACS, **options)


def test_a_memory_too_small_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise MemoryError

    root = eyepacs(tmp_path)
    monkeypatch.setattr(image_files.np, "empty", none)
    with pytest.raises(InputError, match=r"the 10 images of .*trainLabels.csv must fit into memory"):
        opened(root, EYEPACS)
