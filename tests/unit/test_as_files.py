"""Test examples as files (`fedsim examples`): read back by `fedsim predict`, they are what was written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedsim
from fedsim import loading
from fedsim.data import as_files, datasets
from fedsim.data.examples import ArrayDataset
from fedsim.data.targets import Targets
from fedsim.validate import InputError
from tests.conftest import SMALL, command

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> fedsim.Run:
    folder = tmp_path_factory.mktemp("run") / "run"
    assert command(["run", "base", *SMALL, "--out", str(folder), "--json"]) == 0
    return fedsim.load_run(folder)


def images(channels: int, targets: Targets, labels: np.ndarray) -> ArrayDataset:
    pixels = RNG.integers(0, 256, (len(labels), 6, 5, channels), np.uint8)
    return ArrayDataset("own", pixels, labels, None, targets, (0.5,) * channels, (0.5,) * channels)


def test_what_is_written_is_predicted_as_the_examples_are(
    trained: fedsim.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clothes"
    assert command(["examples", "base", *SMALL, "--out", str(folder), "--count", "40"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == sorted(str(path) for path in folder.iterdir())
    assert command(["predict", str(trained.folder), str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    test = datasets.load(trained.config.data).test
    np.testing.assert_array_equal(
        np.array(said["outputs"], np.float32), trained.predict(test.inputs[:40]).outputs
    )
    kinds = [test.declared.names[label].replace("/", "-").replace(" ", "-") for label in test.targets[:40]]
    assert said["inputs"] == [f"{row:02d}-{kind}.png" for row, kind in enumerate(kinds)]


def test_they_are_of_the_test_split_before_features_whatever_a_run_is_judged_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["data.features=scattering", "data.holdout_examples=500", "model.name=linear"]
    given = ["examples", "base", *chosen, "--out", str(tmp_path / "some"), "--count", "3", "--json"]
    assert command(given) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    plain = datasets.load(loading.load("base").data).test.inputs
    for file, image in zip(files, plain, strict=False):
        assert np.array_equal(np.asarray(Image.open(file)), image[..., 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_without_names_of_classes_are_named_by_row(channels: int, tmp_path: Path) -> None:
    data = images(channels, Targets("labels", 2), np.zeros((120, 2), np.uint8))
    files = as_files.write(data, tmp_path / "new" / "some", 1000)
    assert [file.name for file in files] == [f"{row:03d}.png" for row in range(120)]
    for file, image in zip(files, data.inputs, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)).reshape(image.shape), image)


@pytest.mark.parametrize("inputs", [RNG.normal(size=(9, 4)).astype(np.float32), "two channels"])
def test_what_is_no_picture_becomes_one_array(inputs: object, tmp_path: Path) -> None:
    labels = np.zeros(9, np.int64)
    if isinstance(inputs, str):
        data = images(2, Targets("class", 2), labels)
    else:
        data = ArrayDataset("own", inputs, labels, None, Targets("class", 2))
    (file,) = as_files.write(data, tmp_path / "some", 4)
    assert np.array_equal(np.load(file), data.inputs[:4])


def test_images_that_cannot_be_decoded_are_left_out(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(4):
            (folder := tmp_path / split / "a").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(folder / f"{number}.png")
    (tmp_path / "test" / "a" / "1.png").write_bytes(b"no image")
    options = "data.options={classes: 1, size: 8, decode: on_demand}"
    given = ["data.name=image_folder", f"data.root={tmp_path}", options]
    out = tmp_path / "some"
    assert command(["examples", "base", *given, "model.name=linear", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["00-a.png", "02-a.png", "03-a.png"]
    assert np.asarray(Image.open(out / "03-a.png"))[0, 0, 0] == 180


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path: Path) -> None:
    data = images(1, Targets("class", 2), np.zeros(2, np.int64))
    (tmp_path / "mine.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(InputError, match="must be a new or empty folder"):
            as_files.write(data, taken, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert command(["examples", "base", "--out", str(tmp_path / "x"), "--count", "0"]) == 2
