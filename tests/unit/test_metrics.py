"""Metrics: tags, public-only mode, resume without repeats, event files that TensorBoard can read."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from fedsim.engine.board import TensorBoard
from fedsim.engine.metrics import JsonLines, Metrics
from fedsim.engine.progress import ConsoleProgress
from fedsim.headline import Metric
from fedsim.types import StepRecord
from fedsim.visibility import Public, Sensitive
from tests.conftest import small, train


def record(step: int) -> StepRecord:
    return StepRecord(
        step,
        {
            "accuracy": Public(step / 10),
            "epsilon": Public(float(step)),
            "train_loss": Sensitive(2.0),
        },
        {"gradient_norm": Sensitive(((0.1, 1.0, 10.0), (3.0, 4.0)))},
    )


def test_lines_after_the_resumed_step_are_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics([JsonLines(path, 0)], public_only=False) as metrics:
        for step in (1, 2, 3):
            metrics.write(record(step))
    with open(path, "a", encoding="utf-8") as handle:
        handle.write('{"step": 4, "pub')  # what a killed run leaves
    with Metrics([JsonLines(path, 2)], public_only=False) as metrics:
        metrics.write(record(3))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["sensitive"] == {"train_loss": 2.0}


def test_public_only_keeps_sensitive_numbers_from_every_writer(tmp_path: Path) -> None:
    train(small("monitor.public_only=true", "monitor.tensorboard=true", "train.steps=2"), tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["sensitive"] == {}
        assert json.loads(line)["histograms"] == {}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    assert tags["scalars"]
    assert not [
        tag for kind in ("scalars", "images", "histograms") for tag in tags[kind] if "sensitive" in tag
    ]


def test_tensorboard_holds_scalars_histogram_picture_and_hparams(tmp_path: Path) -> None:
    result = train(small("monitor.tensorboard=true", "train.eval_every=2"), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    first = {"headline/accuracy (%)", "headline/epsilon", "headline/loss"}
    asked = {"headline, sensitive/noise to signal", "headline, sensitive/training loss"}
    assert {tag for tag in tags["scalars"] if tag.startswith("headline")} == first | asked
    assert {"public/learning rate", "public/noise of the mean (standard deviation)"} <= set(tags["scalars"])
    timings = {"sensitive seconds of a step/" + part for part in ("wait", "compute", "noise", "total")}
    assert {"sensitive/clipped (%)", "sensitive/examples drawn"} | timings <= set(tags["scalars"])
    assert "sensitive/lengths of gradients" in tags["histograms"]
    assert "sensitive/labels_by_holder" in tags["images"]
    last = events.Scalars("headline/accuracy (%)")[-1]
    assert last.step == 6
    assert np.isclose(last.value, 100 * result["accuracy"])


def test_every_number_of_a_run_says_in_tensorboard_what_it_is(tmp_path: Path) -> None:
    train(small("monitor.tensorboard=true", "train.steps=1", "train.eval_every=1"), tmp_path)
    (events,) = (tmp_path / "tensorboard").glob("events*")
    about = {
        value.tag: value.metadata.summary_description
        for event in EventFileLoader(str(events)).Load()
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "scalars"
    }
    assert len(about) > 10
    assert [tag for tag, said in about.items() if not said] == [tag for tag in about if "seconds of" in tag]


def test_settings_stand_in_tensorboard_beside_the_last_epsilon_and_score(tmp_path: Path) -> None:
    train(small("monitor.tensorboard=true"), tmp_path)
    (events,) = (tmp_path / "tensorboard").glob("events*")
    (found,) = [
        HParamsPluginData.FromString(value.metadata.plugin_data.content).experiment
        for event in EventFileLoader(str(events)).Load()
        for value in event.summary.value
        if value.tag == "_hparams_/experiment"
    ]
    scores = {metric.name.tag for metric in found.metric_infos}
    assert scores == {"headline/epsilon", "headline/accuracy (%)", "headline/loss"}
    shown = sorted(info.name for info in found.hparam_infos)[:5]  # as TensorBoard does
    assert shown == ["epsilon (target)", "holders", "learning_rate", "method", "model"]


def test_histograms_end_where_nothing_is_left(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, 0, Metric("accuracy", "%"))
    edges, counts = (0.1, 1.0, 10.0, 100.0, 1000.0), (0.0, 3.0, 4.0, 0.0)
    board.write(StepRecord(1, {}, {"gradient_norm": Sensitive((edges, counts))}))
    board.write(StepRecord(2, {}, {"gradient_norm": Sensitive((edges, (0.0,) * 4))}))
    board.close()
    events = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    (kept,) = events.Histograms("sensitive/lengths of gradients")
    held = kept.histogram_value
    assert (held.min, held.max, held.num) == (1.0, 100.0, 7)
    assert (held.bucket_limit, held.bucket) == ([10.0, 100.0], [3.0, 4.0])


def test_console_shows_epsilon_and_accuracy() -> None:
    out = io.StringIO()
    progress = ConsoleProgress(
        10, Metric("accuracy", "%"), "t", Console(file=out, force_terminal=False, width=100)
    )
    progress.write(record(5))
    progress.close()
    assert "step 5/10" in out.getvalue()
    assert "epsilon 5" in out.getvalue()
    assert "test accuracy 50.00%" in out.getvalue()


def test_console_claims_no_epsilon_where_there_is_none() -> None:
    out = io.StringIO()
    progress = ConsoleProgress(9, Metric("rmse", "points", False), "t", Console(file=out, width=100))
    progress.update(9, {"epsilon": None, "n_delta": None, "rmse": 2.5})
    assert out.getvalue() == "step 9/9  epsilon -  test rmse 2.5 points\n"
