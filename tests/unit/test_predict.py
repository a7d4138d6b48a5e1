"""Predictions from files: the same from Python and on the command line, as CSV that names its columns."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim.cli import models
from fedsim.run import Predictions
from fedsim.validate import InputError
from tests.conftest import command

RNG = np.random.default_rng(4)
INPUTS = RNG.normal(size=(40, 3)).astype(np.float32)
RUN: dict[str, Any] = {
    "model": "linear",
    "partition": "iid",
    "federation": {"holders": 2},
    "privacy": {"noise_multiplier": 0.5},
    "train": {"steps": 3, "expected_batch_size": 20},
    "monitor": {"tensorboard": False, "progress": False},
}
KINDS: dict[str, tuple[str, np.ndarray, dict[str, Any], list[str]]] = {
    "classes": ("classification", RNG.integers(0, 3, 40), {"classes": 3}, ["class", "probability"]),
    "named classes": (
        "classification",
        RNG.integers(0, 2, 40),
        {"classes": 2, "names": ["to be, or", "not"]},
        ["class", "probability"],
    ),
    "labels": ("multi_label", RNG.integers(0, 2, (40, 3)), {"labels": 3}, ["labels"]),
    "value": ("regression", INPUTS[:, :1], {"values": 1}, ["value"]),
    "values": ("regression", INPUTS[:, :2], {"values": 2}, ["value 0", "value 1"]),
    "named values": ("regression", INPUTS[:, :2], {"values": 2, "names": ["high", "wide"]}, ["high", "wide"]),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_line_names_the_columns(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    task, targets, declared, columns = KINDS[kind]
    data = fedsim.Data((INPUTS, targets), (INPUTS, targets), **declared)
    run = fedsim.train(data=data, task=task, **RUN)
    np.save("some.npy", INPUTS[:7])
    capsys.readouterr()
    assert command(["predict", str(run.folder), "some.npy"]) == 0
    printed = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(printed[0]) == ["input", *columns]
    assert command(["predict", str(run.folder), "some.npy", "--json"]) == 0
    as_json = json.loads(capsys.readouterr().out)
    of_array, of_path = run.predict(INPUTS[:7]), run.predict("some.npy")
    assert [row["input"] for row in printed] == list(of_path.examples) == [str(row) for row in range(7)]
    assert as_json["inputs"] == list(of_array.examples)
    for found in (of_path, fedsim.predict(run.folder, Path("some.npy"))):
        np.testing.assert_array_equal(found.outputs, of_array.outputs)
        np.testing.assert_array_equal(found.best, as_json["predictions"])
    names = declared.get("names", range(3))
    for row, best, outputs in zip(printed, of_array.best, of_array.outputs, strict=True):
        if task == "classification":
            assert row["class"] == str(names[best])
            assert float(row["probability"]) == pytest.approx(outputs.max(), abs=1e-4)
        elif task == "multi_label":
            assert row["labels"] == " ".join(str(label) for label in range(3) if best[label])
        else:
            assert [float(row[name]) for name in columns] == pytest.approx(best.tolist(), rel=1e-5)


def test_captions_and_tokens_have_a_column() -> None:
    best, outputs = np.array([[1, 3, 2, 0]]), np.zeros((1, 4, 5), np.float32)
    tokens = Predictions(outputs, best, (), ("0",))
    assert models._columns(tokens, "tokens") == ["tokens"]
    assert models._cells(best[0], outputs[0], ()) == ["1 3 2 0"]
    caption = Predictions(outputs, best, ("<pad>", "<begin>", "<end>", "Ġdog", "Ġcat"), ("0",))
    assert models._columns(caption, "tokens") == ["caption"]


@pytest.mark.usefixtures("epsilon_takes_no_time")
def test_a_table_and_texts_are_read_as_the_run_read_them() -> None:
    for split in ("train", "test"):
        rows = [f"{x:.3f},{'yes' if x > 0.5 else 'no'}" for x in RNG.random(30)]
        Path(f"{split}.csv").write_text("\n".join(["x,wet", *rows]))
        Path(f"{split}.txt.csv").write_text("text,target\n" + "good day,yes\nbad night,no\n" * 15)
    columns = {"numbers": {"x": [0, 1]}, "target": "wet", "classes": ["no", "yes"]}
    run = fedsim.train(data={"name": "table", "root": ".", "options": columns}, **RUN)
    values = np.array(
        [[float(line.split(",")[0]) * 2 - 1] for line in Path("test.csv").read_text().split()[1:]]
    )
    np.testing.assert_allclose(
        run.predict("test.csv").outputs, run.predict(values.astype(np.float32)).outputs, atol=1e-6
    )
    options = {"train": "train.txt.csv", "test": "test.txt.csv", "classes": ["no", "yes"], "places": 4}
    text = {"name": "text", "root": ".", "options": options}
    run = fedsim.train(data=text, **{**RUN, "model": "bag_of_words"})
    Path("notes.txt").write_text("good day\nbad night\n")
    said = run.predict("notes.txt")
    assert len(said.best) == len(said.examples) == 2
    assert np.array_equal(said.outputs, run.predict("notes.txt").outputs)
    assert not np.array_equal(said.outputs[0], said.outputs[1])


@pytest.mark.usefixtures("epsilon_takes_no_time")
def test_what_is_not_there_or_cannot_be_read_is_refused() -> None:
    labels = RNG.integers(0, 2, 40)
    run = fedsim.train(data=fedsim.Data((INPUTS, labels), (INPUTS, labels), classes=2), **RUN)
    Path("some.csv").write_text("1,2,3\n")
    Path("broken.npy").write_bytes(b"no array")
    for name, message in (
        ("nothing.npy", "must be a file or folder, and nothing.npy is not there"),
        ("some.csv", r"must be a \.npy array for a model of these data, got some\.csv"),
        ("broken.npy", r"broken\.npy must be a \.npy array of examples"),
    ):
        with pytest.raises(InputError, match=message):
            run.predict(name)
        assert command(["predict", str(run.folder), name]) == 2
