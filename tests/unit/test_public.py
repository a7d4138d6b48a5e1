"""Public-only runs: nothing that depends on private data, but for what was released, reaches any byte."""

from __future__ import annotations

import dataclasses
import itertools
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from fedsim.data import datasets
from fedsim.engine import holder, setup
from fedsim.engine.experiment import prepare
from fedsim.flower import wire
from fedsim.flower.client_app import app
from fedsim.privacy import binding
from fedsim.validate import InputError, RunError
from tests.conftest import SMALL, command, small, train
from tests.unit.test_cap import arrays
from tests.unit.test_visibility import strict

QUIET = (
    "data.name=arrays",
    "data.options.classes=3",
    "data.train_examples=null",
    "data.test_examples=null",
    "model.name=linear",
    "federation.holders=5",
    "federation.partition=natural",
    "train.steps=4",
    "train.eval_every=2",
    "optimizer.name=sgd",
    "optimizer.learning_rate=1e-300",  # updates round to nothing: what is released is the same for all data
    "monitor.tensorboard=true",
    "monitor.progress=true",
)


def data(root: Path, seed: int) -> Path:
    """Write 300 private examples of 5 uneven owners that depend on the seed, and test data that do not."""
    random = np.random.default_rng(seed)
    public = np.random.default_rng(99)
    sizes = {1: (200, 40, 30, 20, 10), 2: (90, 80, 60, 40, 30)}[seed]
    arrays(
        root,
        (random.standard_normal((300, 4)) * 10**seed).astype(np.float32),
        random.integers(0, 3, 300),
        public.standard_normal((50, 4)).astype(np.float32),
        public.integers(0, 3, 50),
    )
    np.save(root / "train_groups.npy", np.repeat(np.arange(5), sizes))
    return root


@dataclass
class Written:
    """What one run left: all files but TensorBoard's, its events, and what the console showed."""

    files: dict[str, bytes]
    events: list[Event]
    shown: str


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int, *overrides: str) -> Written:
    """Run `fedsim run` on the data of a seed; data and results always have the same paths."""
    root, out = tmp_path / "data", tmp_path / "out"
    data(root, seed)
    datasets._load.cache_clear()
    setup.node_for.cache_clear()
    assert command(["run", "base", *SMALL, *QUIET, f"data.root={root}", *overrides, "--out", str(out)]) == 0
    console = capsys.readouterr()
    files, events = {}, []
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        if "tfevents" in path.name:
            events += [Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]
        else:
            files[str(path.relative_to(out))] = path.read_bytes()
    root.rename(tmp_path / f"data of {seed}")
    out.rename(tmp_path / f"results of {seed}")
    return Written(files, events, console.out + console.err)


@pytest.mark.parametrize("evaluated", ["test data", "held-out training examples"])
def test_public_files_are_the_same_whatever_the_private_data(
    evaluated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Digests of the data under a key of the run: random to whoever lacks it, and a secure run destroys it.
    monkeypatch.setattr(binding, "holder_digests", lambda root, of, holders, arrays: ("0" * 32,) * holders)
    held_out = [] if evaluated == "test data" else ["data.holdout_examples=60"]
    first, second = (run(tmp_path, capsys, seed, "monitor.public_only=true", *held_out) for seed in (1, 2))
    wanted = {"config.yaml", "ledger.jsonl", "metrics.jsonl", "result.json", "final.safetensors"}
    assert wanted <= set(first.files)
    assert first.files == second.files
    assert first.shown == second.shown
    assert "epsilon" in first.shown
    times = {e.wall_time for e in first.events if e.HasField("summary")}
    assert times == {1.0, 2.0, 3.0, 4.0}, "steps, not seconds"
    for event in [*first.events, *second.events]:
        if not event.HasField("summary"):
            event.wall_time = 0.0  # when the run began, which is not of the data
    assert first.events == second.events


def test_the_same_runs_in_simulation_differ_in_every_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the test above relies on: these data differ, and without public_only it shows."""
    first, second = (run(tmp_path, capsys, seed, "data.holdout_examples=60") for seed in (1, 2))
    for name in ("metrics.jsonl", "result.json"):
        assert first.files[name] != second.files[name]
    assert first.files["final.safetensors"] == second.files["final.safetensors"]
    assert first.shown != second.shown
    stated = strict(first.files["result.json"].decode())
    assert isinstance(stated, dict)
    assert set(stated["sensitive"]) == {
        "accuracy",
        "loss",
        "epsilon.holder",
        "largest_holder",
        "holder_scores",
        "seconds",
        "seconds_by_part",
        "peak_memory_bytes",
    }


def test_sensitive_numbers_are_in_no_byte_of_a_public_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sensitive number of the run in simulation that has five digits or more is looked for, as text and
    as IEEE bytes, in all files of the same run with public_only. Both run by a clock that ticks when it is
    read: seconds of another run would be looked for in vain, or found by chance among the parameters."""
    common = ("federation.partition=power_law", "train.steps=4", "monitor.tensorboard=true")
    for name, more in (("all", ()), ("public", ("monitor.public_only=true",))):
        ticks = itertools.count()
        monkeypatch.setattr(time, "perf_counter", lambda ticks=ticks: next(ticks) * 0.0123456789)
        train(small(*common, *more), tmp_path / name)
    written = b"\n".join(p.read_bytes() for p in (tmp_path / "public").rglob("*") if p.is_file())
    lines = [strict(text) for text in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
    result: Any = strict((tmp_path / "all" / "result.json").read_text())
    values = [v for line in lines for v in line["sensitive"].values()]  # type: ignore[index]
    values += [result["largest_holder"], result["seconds"], result["epsilon"]["holder"]["value"]]
    values += [*result["holder_scores"].values(), *result["seconds_by_part"].values()]
    values = [v for v in values if v is not None and len(repr(v).strip("0.")) >= 5]
    assert len(values) > 40
    for value in values:
        for form in (repr(value).encode(), np.float64(value).tobytes(), np.float32(value).tobytes()):
            assert form not in written, value


def test_a_public_run_does_not_go_on_where_sensitive_numbers_are(tmp_path: Path) -> None:
    train(small("train.steps=2"), tmp_path)
    with pytest.raises(InputError, match="sensitive numbers"):
        train(small("train.steps=2", "monitor.public_only=true"), tmp_path, resume=True)


@pytest.mark.parametrize("public_only", [True, False])
def test_what_a_node_says_of_its_data_stays_unsaid(
    public_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def raises(*_: Any) -> None:
        raise ValueError("example 8675309 has label 77")

    def client(message: Any, context: Any) -> Any:
        try:
            return app(message, context)
        except Exception:
            said.append(traceback.format_exc())
            raise

    config = small(f"monitor.public_only={str(public_only).lower()}")
    monkeypatch.setattr(holder, "answer", raises)
    with pytest.raises(RunError) as caught:
        train(config, tmp_path, client=client)
    assert len(said) == 4, "both nodes, twice"
    for text in [str(caught.value), *said]:
        assert ("8675309" in text) != public_only
    assert "ValueError" in said[0]


@pytest.mark.parametrize("public_only", [True, False])
def test_the_numbers_of_a_refused_reply_stay_unsaid(public_only: bool, tmp_path: Path) -> None:
    def client(message: Any, context: Any) -> Any:
        reply = app(message, context)
        if message.metadata.message_type != "train":
            return reply
        held = wire.unpack_reply(reply.content)
        far = {"sum": np.full_like(held.arrays["sum"], 8675309.0)}
        return Message(wire.pack_reply(dataclasses.replace(held, arrays=far)), reply_to=message)

    with pytest.raises(RunError) as caught:
        train(small(f"monitor.public_only={str(public_only).lower()}"), tmp_path, client=client)
    assert ("norm" in str(caught.value)) != public_only
    assert ("its reply was refused" in str(caught.value)) == public_only


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.expected_batch_size=1e-6",),
        ("preset=nonprivate", "privacy.noise_multiplier=null", "privacy.clip_norm=1.0"),
        ("preset=shares_dpsgd",),
    ],
)
def test_every_json_file_of_a_run_is_json(overrides: tuple[str, ...], tmp_path: Path) -> None:
    train(small(*overrides, "train.steps=2", "train.eval_every=1"), tmp_path)
    files = [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.jsonl")]
    assert len(files) >= 3
    for path in files:
        for text in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            strict(text)


@pytest.mark.parametrize(
    ("column", "value", "told"), [("targets", 7, "0 .. 7"), ("inputs", float("nan"), "row 3")]
)
@pytest.mark.parametrize("public_only", [True, False])
def test_messages_about_wrong_examples_say_what_they_hold_only_where_they_may(
    public_only: bool, column: str, value: float, told: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    held = {"inputs": rng.standard_normal((50, 4)).astype(np.float32), "targets": np.arange(50) % 3}
    for split in ("train", "test"):
        for name, array in held.items():
            np.save(tmp_path / f"{split}_{name}.npy", array)
    held[column][3] = value
    np.save(tmp_path / f"train_{column}.npy", held[column])
    data = ["data.name=arrays", "data.options.classes=3", f"data.root={tmp_path}", "model.name=linear"]
    data += ["data.train_examples=null", "data.test_examples=null", f"monitor.public_only={public_only}"]
    with pytest.raises(InputError) as refused:
        prepare(small(*data))
    assert (told in str(refused.value)) is not public_only
    assert f"{'labels' if column == 'targets' else column} must" in str(refused.value)
