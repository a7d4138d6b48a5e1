"""A run goes on only with its own folder, ledger, secret, data and checkpoint; other settings are free."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedsim import loading, seeds
from fedsim.config import Config
from fedsim.data import datasets
from fedsim.engine import checkpoint
from fedsim.engine.experiment import prepare
from fedsim.engine.opening import _evaluation
from fedsim.engine.run_folder import RunFolder
from fedsim.mechanism import Mechanism
from fedsim.privacy import ledger, secret
from fedsim.privacy.binding import holder_digests
from fedsim.validate import InputError, RunError
from tests.conftest import SMALL, command, final, forked, small, train
from tests.unit.test_run import secrets, stop_at

SECURE = "privacy.noise_source=secure"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a run, beside that of the secrets."""
    return tmp_path / "run"


def header(out: Path) -> ledger.LedgerHeader:
    found = ledger.read_header(out / "ledger.jsonl")
    assert found is not None
    return found


def interrupted(config: Config, out: Path, step: int = 3) -> None:
    with pytest.raises(RunError, match="stopped here"):
        train(config, out, client=stop_at(step))


def root_of(out: Path) -> bytes:
    held = header(out)
    opened = secret.Held(out, held.run, held.secret, ledger.digest_of(held))
    opened.close()
    return opened.root


# --- data ---------------------------------------------------------------------------------------------------


def arrays(root: Path, examples: int = 200, change: str = "") -> Path:
    """Write examples to a folder of their own, as they are or with one small change."""
    rng = seeds.stream(5, "arrays")
    inputs = rng.standard_normal((2000, 8)).astype(np.float32)
    labels = rng.integers(0, 3, 2000)
    inputs, labels = inputs[:examples], labels[:examples]
    if change == "one value":
        inputs[17, 3] = np.nextafter(inputs[17, 3], np.float32(9))
    elif change == "one label":
        labels[17] = (labels[17] + 1) % 3
    elif change == "two examples swapped":
        inputs[[17, 18]], labels[[17, 18]] = inputs[[18, 17]], labels[[18, 17]]
    elif change == "dtype":
        inputs = inputs.astype(np.float64)
    root.mkdir()
    np.save(root / "train_inputs.npy", inputs)
    np.save(root / "train_targets.npy", labels)
    np.save(root / "test_inputs.npy", rng.standard_normal((50, 8)).astype(inputs.dtype))
    np.save(root / "test_targets.npy", np.arange(50) % 3)
    return root


def on_arrays(root: Path, *overrides: str) -> Config:
    given = [
        "data.name=arrays",
        "data.options.classes=3",
        f"data.root={root}",
        "data.train_examples=null",
        "data.test_examples=null",
    ]
    given += ["federation.partition=iid"]  # labels do not move examples between holders
    return small(*given, "model.name=linear", "train.expected_batch_size=40", *overrides)


@pytest.mark.parametrize("source", ["secure", "seeded"])
@pytest.mark.parametrize("change", ["one value", "one label", "two examples swapped", "dtype"])
def test_changed_examples_are_refused_at_resume(change: str, source: str, tmp_path: Path) -> None:
    noise = f"privacy.noise_source={source}"
    interrupted(on_arrays(arrays(tmp_path / "data"), noise), tmp_path / "run")
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    asked: list[Any] = []
    other = arrays(tmp_path / "changed", change=change)
    with pytest.raises(InputError, match="training examples of holders"):
        train(on_arrays(other, noise), tmp_path / "run", resume=True, client=asked.append)
    assert asked == [], "refused before anything is asked of any node"
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before
    same = arrays(tmp_path / "elsewhere")
    assert train(on_arrays(same, noise), tmp_path / "run", resume=True)["steps"] == 6, "the path is free"


@pytest.mark.parametrize("source", ["secure", "seeded"])
@pytest.mark.parametrize("judged_by", ["test data", "held-out examples"])
def test_other_examples_to_judge_by_are_refused_at_resume(
    judged_by: str, source: str, tmp_path: Path
) -> None:
    held_out = 50 if judged_by == "held-out examples" else 0
    given = [f"privacy.noise_source={source}", f"data.holdout_examples={held_out}"]
    config = on_arrays(arrays(tmp_path / "data"), *given)
    interrupted(config, tmp_path / "run")
    written = header(tmp_path / "run")
    splits = prepare(config).splits
    changed = splits.test.targets.copy()
    changed[7] = (changed[7] + 1) % 3
    other = dataclasses.replace(splits, test=dataclasses.replace(splits.test, targets=changed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda *_: other)
        with pytest.raises(InputError, match="examples that models are judged by"):
            train(config, tmp_path / "run", resume=True)
    public = _evaluation(prepare(config), 5) == _evaluation(prepare(config), 6)
    assert public == (judged_by == "test data"), "no root, no guess of private examples"
    assert train(config, tmp_path / "run", resume=True)["steps"] == 6
    assert len(written.evaluation) == 32


def test_only_the_holder_whose_example_changed_is_named(tmp_path: Path) -> None:
    config = on_arrays(arrays(tmp_path / "data"))
    interrupted(config, tmp_path / "run")
    other = arrays(tmp_path / "changed", change="one value")
    with pytest.raises(InputError, match=r"training examples of holders \d are not"):
        train(on_arrays(other), tmp_path / "run", resume=True)


def test_another_number_of_examples_is_refused_and_epsilon_is_the_ledgers(tmp_path: Path) -> None:
    interrupted(on_arrays(arrays(tmp_path / "data")), tmp_path / "run")
    more = arrays(tmp_path / "more", examples=2000)
    with pytest.raises(InputError, match="training examples"):
        train(on_arrays(more), tmp_path / "run", resume=True)
    result = train(on_arrays(tmp_path / "data"), tmp_path / "run", resume=True)
    book = ledger.read(tmp_path / "run" / "ledger.jsonl")
    assert result["epsilon"]["example"]["value"] == book.epsilon().value


def test_the_result_states_what_the_ledger_holds_where_the_plan_says_less(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(small(), out, 5)
    monkeypatch.setattr(Mechanism, "steps", property(lambda self: 4))
    result = train(small(), out, resume=True)
    book = ledger.read(out / "ledger.jsonl")
    assert (result["steps"], book.steps) == (4, 5)
    for name, spent in (("example", book.epsilon()), ("example_check", book.epsilon("rdp"))):
        assert result["epsilon"][name]["value"] == spent.value
    assert book.epsilon().value > book.until(4).epsilon().value


def digests(root: seeds.Root, **arrays_: NDArray[Any]) -> tuple[str, ...]:
    return holder_digests(root, np.array([0, 1, 0, 1, 2]), 3, arrays_)


def test_digests_say_whose_example_changed_and_nothing_else() -> None:
    x, y = np.arange(10.0).reshape(5, 2), np.arange(5)
    held = digests(1, inputs=x, targets=y)
    assert len(set(held)) == 3
    assert digests(1, targets=y, inputs=x) == held
    changed = x.copy()
    changed[3, 0] += 1e-9
    assert [a == b for a, b in zip(held, digests(1, inputs=changed, targets=y), strict=True)] == [
        True,
        False,
        True,
    ]
    assert not set(held) & set(digests(2, inputs=x, targets=y)), "keyed"
    assert not set(held) & set(digests(bytes(32), inputs=x, targets=y))
    assert not set(held) & set(digests(1, inputs=x)), "every array counts"
    assert not set(held) & set(digests(1, inputs=y, targets=x)), "and its name"
    same = np.ones((5, 2))
    assert len(set(digests(1, inputs=same, targets=y * 0))) == 3, "equal examples do not show as equal"
    moved = holder_digests(1, np.array([0, 1, 0, 2, 1]), 3, {"inputs": same, "targets": y * 0})
    assert moved[1:] != digests(1, inputs=same, targets=y * 0)[1:], "ids count"


# --- secrets ------------------------------------------------------------------------------------------------


def test_a_new_run_in_the_place_of_a_removed_one_has_a_secret_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "run"
    interrupted(small(SECURE), out)
    first = root_of(out)
    shutil.rmtree(out)
    interrupted(small(SECURE, "seed=1", "privacy.clip_norm=0.25"), out)
    assert root_of(out) != first
    assert len(secrets()) == 1, "what the removed run left is destroyed"
    assert first not in secrets()[0].read_bytes()


def test_a_run_is_resumed_where_it_was_moved_or_through_a_link(tmp_path: Path) -> None:
    config = small(SECURE)
    interrupted(config, tmp_path / "run", 2)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(RunError):
        train(config, tmp_path / "link", resume=True, client=stop_at(4))
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(RunError):
        train(config, tmp_path / "moved", resume=True, client=stop_at(5))
    interrupted(config, tmp_path / "run")
    assert train(config, tmp_path / "moved", resume=True)["steps"] == 6
    assert len(secrets()) == 1, "the second run's"
    assert train(config, tmp_path / "run", resume=True)["steps"] == 6
    assert secrets() == []


def test_of_two_copies_of_a_run_the_first_to_end_destroys_the_secret(tmp_path: Path) -> None:
    interrupted(small(SECURE), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    train(small(SECURE), tmp_path / "copy", resume=True)
    assert secrets() == []
    with pytest.raises(InputError, match="secret of run"):
        train(small(SECURE), tmp_path / "run", resume=True)


def test_a_secret_of_another_run_is_refused(tmp_path: Path) -> None:
    interrupted(small(SECURE), tmp_path / "a")
    (path,) = secrets()
    interrupted(small(SECURE), tmp_path / "b")
    (other,) = set(secrets()) - {path}
    path.write_bytes(other.read_bytes())
    with pytest.raises(InputError, match="not the secret that the ledger"):
        train(small(SECURE), tmp_path / "a", resume=True)


def rewritten(path: Path, **fields: Any) -> None:
    """Change a ledger's header as somebody would who can compute its chain, and drop its steps."""
    body = {**json.loads(path.read_text().splitlines()[0]), **fields}
    body.pop("chain")
    path.write_bytes(ledger._line({**body, "chain": ledger._link("", body)}))


@pytest.mark.parametrize(
    "change", [{"delta": 1e-6}, {"examples": 7}, {"data": ["0" * 32] * 10}, {"config_hash": None}]
)
def test_a_ledger_whose_header_was_rewritten_is_refused(change: dict[str, Any], out: Path) -> None:
    interrupted(small(SECURE), out)
    shutil.rmtree(out / "checkpoints")
    other = small(SECURE)
    if "config_hash" in change:  # another clip norm, to get a second sum under the same noise
        other = small(SECURE, "privacy.clip_norm=0.25")
        change = {"config_hash": other.digest()}
        (out / "config.yaml").write_text(loading.to_yaml(other))
    rewritten(out / "ledger.jsonl", **change)
    with pytest.raises(InputError, match="made for a ledger with another header"):
        train(other, out, resume=True)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    interrupted(small(SECURE), tmp_path / "a")
    interrupted(small(SECURE), tmp_path / "b")
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    shutil.copytree(tmp_path / "b" / "checkpoints", tmp_path / "a" / "checkpoints")
    with pytest.raises(InputError, match="belongs to another run"):
        train(small(SECURE), tmp_path / "a", resume=True)


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl"])
def test_a_run_whose_ledger_is_lost_is_refused_and_keeps_its_secret(left: str, out: Path) -> None:
    interrupted(small(SECURE), out)
    held = (out / "ledger.jsonl").rename(out.parent / "elsewhere")
    for name in {"checkpoints", "metrics.jsonl"} - {left}:
        (out / name).rename(out.parent / name)
    (path,) = secrets()
    with pytest.raises(InputError, match=rf"has the {left} of a run, but its ledger.jsonl is gone"):
        train(small(SECURE), out, resume=True)
    assert secrets() == [path]
    for name in {"checkpoints", "metrics.jsonl"} - {left}:
        (out.parent / name).rename(out / name)
    held.rename(out / "ledger.jsonl")
    assert train(small(SECURE), out, resume=True)["steps"]


def test_a_secret_whose_run_never_began_is_destroyed_wherever_its_folder_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = secret.create

    def dies_after(*arguments: Any) -> None:
        real(*arguments)
        raise OSError("died here")

    monkeypatch.setattr(secret, "create", dies_after)
    with pytest.raises((OSError, RunError, InputError)):
        train(small(SECURE), tmp_path / "run")
    monkeypatch.setattr(secret, "create", real)
    (left,) = secrets()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert train(small(SECURE), tmp_path / "elsewhere", resume=True)["steps"] == 6
    assert not left.exists()
    assert secrets() == []


def test_a_secret_that_was_put_back_after_the_end_is_destroyed(tmp_path: Path) -> None:
    interrupted(small(SECURE), tmp_path / "run")
    (path,) = secrets()
    content = path.read_bytes()
    first = train(small(SECURE), tmp_path / "run", resume=True)
    path.write_bytes(content)
    assert train(small(SECURE), tmp_path / "run", resume=True) == first
    assert secrets() == []
    path.write_bytes(content)
    arguments = ["run", "base", *SMALL, SECURE, "--resume", "--out", str(tmp_path / "run"), "--json"]
    assert command(arguments) == 0
    assert secrets() == []


def test_the_secret_is_gone_before_the_result_is_there(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RunFolder.write_result

    def fails(folder: RunFolder, result: dict[str, Any]) -> None:
        assert secrets() == []
        raise OSError("killed")

    monkeypatch.setattr(RunFolder, "write_result", fails)
    with pytest.raises(RunError, match="killed"):
        train(small(SECURE), out)
    monkeypatch.setattr(RunFolder, "write_result", real)
    assert train(small(SECURE), out, resume=True)["steps"] == 6
    assert secrets() == []


# --- one process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_a_second_process_is_kept_out_of_a_running_folder(noise: str, out: Path) -> None:
    config = small(f"privacy.noise_source={noise}")
    interrupted(config, out)
    answers: list[int] = []
    second = ["run", "base", *SMALL, f"privacy.noise_source={noise}", "--resume", "--out", str(out)]

    def client(message: Any, context: Any) -> Any:
        if not answers:
            answers.append(forked(second, out.parent / "said"))
        from fedsim.flower.client_app import app

        return app(message, context)

    before = (out / "ledger.jsonl").read_bytes()
    result = train(config, out, resume=True, client=client)
    assert answers == [2]
    assert "in use by another process" in (out.parent / "said").read_text()
    assert result["steps"] == 6
    assert (out / "ledger.jsonl").read_bytes().startswith(before)


def test_a_run_whose_folder_was_replaced_writes_nothing_more(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def client(message: Any, context: Any) -> Any:
        from fedsim.flower import wire
        from fedsim.flower.client_app import app

        asked = message.metadata.message_type == "train" and wire.unpack_task(message.content)[0].step == 3
        if asked and not (tmp_path / "moved").exists():
            out.rename(tmp_path / "moved")
            interrupted(small(SECURE), out, 1)
        return app(message, context)

    with pytest.raises(RunError, match="removed, renamed or replaced"):
        train(small(SECURE), out, client=client)
    assert ledger.read(out / "ledger.jsonl").steps == 1
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_00000000.safetensors"]
    assert train(small(SECURE), out, resume=True)["steps"] == 6
    assert train(small(SECURE), tmp_path / "moved", resume=True)["steps"] == 6


# --- what is free -------------------------------------------------------------------------------------------

FREE = [
    "train.eval_every=1",
    "train.checkpoint_every=1",
    "federation.nodes_per_wave=1",
    "title=another",
]


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_what_does_not_define_the_result_may_change_at_resume(
    noise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = secret.new()
    monkeypatch.setattr(secret, "new", lambda: made)
    source = f"privacy.noise_source={noise}"
    train(small(source), tmp_path / "unbroken")
    interrupted(small(source), tmp_path / "run")
    result = train(small(source, *FREE), tmp_path / "run", resume=True)
    assert torch.equal(final(tmp_path / "run"), final(tmp_path / "unbroken"))
    assert result["steps_repeated_to_rounding"] == []
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["accuracy" in line["public"] for line in lines] == [False] * 2 + [True] * 4
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_00000005.safetensors", "step_00000006.safetensors"]
    assert "eval_every: 1" in (tmp_path / "run" / "config.yaml").read_text()
    first, second = ((tmp_path / name / "ledger.jsonl").read_bytes() for name in ("run", "unbroken"))
    assert first == second


def broken_at_a_checkpoint(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a run right after its checkpoint of step 4: no step of its ledger lies beyond."""
    real = checkpoint.save

    def save(folder: Path, step: int, *rest: Any) -> Path:
        path = real(folder, step, *rest)
        if step == 4:
            raise RunError("stopped here")
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(RunError, match="stopped here"):
            train(config, out)


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_nodes_may_change_where_the_ledger_ends_at_the_checkpoint(
    noise: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"privacy.noise_source={noise}"
    broken_at_a_checkpoint(small(source), out, monkeypatch)
    before = (out / "ledger.jsonl").read_bytes()
    result = train(small(source, "federation.nodes=5"), out, resume=True)
    assert result["nodes"] == 5
    assert result["steps_repeated_to_rounding"] == [], "nothing released was made again"
    assert (out / "ledger.jsonl").read_bytes().startswith(before)
    assert "nodes: 5" in (out / "config.yaml").read_text()


def test_repeated_steps_of_other_nodes_are_equal_to_rounding_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = ["train.checkpoint_every=100"]
    train(small(*long), tmp_path / "unbroken")
    interrupted(small(*long), tmp_path / "run", 4)
    with caplog.at_level("WARNING"), pytest.raises(RunError):
        train(small(*long, "federation.nodes=5"), tmp_path / "run", resume=True, client=stop_at(5))
    assert "step 2 was released before the run was interrupted" in caplog.text
    assert "nodes: 2" in (tmp_path / "run" / "config.yaml").read_text()
    result = train(small(*long, "federation.nodes=5"), tmp_path / "run", resume=True)
    assert result["steps_repeated_to_rounding"], "and so are those of the resumption before"
    assert set(result["steps_repeated_to_rounding"]) <= {0, 1, 2, 3}
    assert torch.max(torch.abs(final(tmp_path / "run") - final(tmp_path / "unbroken"))) <= 1e-5


def test_secure_noise_never_meets_a_released_sum_in_other_bits(out: Path) -> None:
    long = [SECURE, "train.checkpoint_every=100"]
    interrupted(small(*long), out, 4)
    before = (out / "ledger.jsonl").read_bytes()
    with pytest.raises(RunError, match="sums of private data without noise, so it is not released"):
        train(small(*long, "federation.nodes=5"), out, resume=True)
    assert (out / "ledger.jsonl").read_bytes() == before
    assert "nodes: 2" in (out / "config.yaml").read_text(), "what to go back to is still told"
    assert train(small(*long), out, resume=True)["steps"] == 6


@pytest.mark.parametrize(
    "change", ["seed=1", "train.steps=7", "data.train_examples=399", "optimizer.options.momentum=0.8"]
)
def test_what_defines_the_result_may_not_change(change: str, out: Path) -> None:
    interrupted(small(), out)
    with pytest.raises(InputError, match="belongs to another configuration"):
        train(small(change), out, resume=True)


# --- what is released ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["optimizer.learning_rate=1e38", "optimizer.name=sgd"], "parameters"),
        (["optimizer.learning_rate=1e38", "train.ema_decay=0.5"], "parameters"),
    ],
)
@pytest.mark.parametrize("strategy", ["central_dpsgd", "dp_fedavg", "local_dpsgd"])
def test_parameters_that_are_not_finite_stop_the_run(
    overrides: Sequence[str], name: str, strategy: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, *overrides, f"preset={strategy}", "privacy.clip_norm=1e6"]
    assert command(["run", "base", *arguments, "--out", str(out)]) == 3
    told = capsys.readouterr().err
    assert f"the {name} after the update must be finite" in told
    assert "learning rate was 1e+38" in told
    assert not (out / "final.safetensors").exists()
    assert not (out / "result.json").exists()
    steps = ledger.read(out / "ledger.jsonl").steps
    assert f"step {steps - 1}:" in told, "the step it happened in is accounted"
    for path in (out / "checkpoints").iterdir():
        assert torch.isfinite(checkpoint.load(path)[1]["parameters"]).all()
    assert math.isfinite(steps)
