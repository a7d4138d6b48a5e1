"""Under secure noise everything random follows from a secret that no file of the run tells, in any form."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedsim import seeds
from fedsim.data.examples import Splits
from fedsim.engine import scoring
from fedsim.engine.experiment import prepare
from fedsim.flower import wire
from fedsim.flower.client_app import app
from fedsim.privacy import secret
from fedsim.validate import RunError
from tests.conftest import final, small, train
from tests.strategies.methods import PRIVATE, of

FORMS = [*PRIVATE, "dp_fedavg, adaptive"]
SECURE = "privacy.noise_source=secure"
PURPOSES = ("noise", "draw", "availability", "augment", "holders", "dropouts", "quantile", "top up", "groups")
PURPOSES += ("passes", "data", "run", "correlated")
STEPS = 6
PUBLIC = "rotation"  # of shares_dpsgd, by design: spreads vectors over their coordinates, hides nothing


class Listening:
    """A ClientApp that notes the keys it is sent, by step, and fails from a step on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.keys: dict[tuple[int, str], bytes] = {}
        self._fails_at = fails_at

    def __call__(self, message: Any, context: Any) -> Any:
        if message.metadata.message_type == "train":
            task = wire.unpack_task(message.content)[0]
            if self._fails_at is not None and task.step >= self._fails_at:
                raise OSError("stopped here")
            self.keys |= {(task.step, p): key for p, key in task.keys.items() if p != PUBLIC}
        return app(message, context)


def forms(key: bytes) -> Iterator[bytes]:
    """The key as files may hold it: raw, hexadecimal, base64 at any place, numbers, and widened arrays."""
    yield key
    yield key[::-1]
    yield key.hex().encode()
    yield key.hex().upper().encode()
    for offset in range(3):  # whole groups only: the rest depends on what stands around
        text = base64.b64encode(bytes(offset) + key)[4 if offset else 0 : -4]
        yield text
        yield text.translate(bytes.maketrans(b"+/", b"-_"))
    for order in ("little", "big"):
        yield str(int.from_bytes(key, order)).encode()
    numbers = list(key)
    yield json.dumps(numbers).encode()
    yield json.dumps(numbers, separators=(",", ":")).encode()
    for dtype in ("<i2", "<i4", "<i8", "<f4", "<f8"):
        yield np.array(numbers, dtype).tobytes()


def told(out: Path, keys: dict[str, bytes]) -> list[str]:
    """Where which key is found among all files of a run, names of files included."""
    found = []
    for path in sorted(out.rglob("*")):
        content = str(path).encode() + (path.read_bytes() if path.is_file() else b"")
        found += [
            f"{name} in {path.name}" for name, key in keys.items() if any(f in content for f in forms(key))
        ]
    return found


def test_the_search_finds_a_key_however_it_is_written(tmp_path: Path) -> None:
    key = seeds.derive(1, "a key")
    for number, form in enumerate(forms(key)):
        (tmp_path / "file").write_bytes(b"before" + form + b"after")
        assert told(tmp_path, {"key": key}) == ["key in file"], number
    (tmp_path / "file").write_bytes(b"before" + key[:31] + b"after")
    assert told(tmp_path, {"key": key}) == []


@pytest.mark.parametrize("name", FORMS)
def test_no_byte_a_run_writes_tells_its_secret(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, bytes]] = []
    real = secret.new
    monkeypatch.setattr(secret, "new", lambda: made.append(real()) or made[-1])
    config = of(name, SECURE, "model.name=linear", "monitor.tensorboard=true", "train.eval_every=2")
    out, first, second = tmp_path / "run", Listening(3), Listening()
    with pytest.raises(RunError, match="stopped here"):
        train(config, out, client=first)
    ((_, root),) = made
    keys = {f"{p} {step}": seeds.derive(root, p, step) for p in PURPOSES for step in range(STEPS)}
    keys |= {purpose: seeds.derive(root, purpose) for purpose in PURPOSES}
    keys |= {f"sent {purpose} {step}": key for (step, purpose), key in first.keys.items()}
    assert told(out, {"root": root, **keys}) == []
    train(config, out, resume=True, client=second)
    keys |= {f"sent {purpose} {step}": key for (step, purpose), key in second.keys.items()}
    assert len(made) == 1
    assert told(out, {"root": root, **keys}) == []
    assert (out / "tensorboard").is_dir()


@pytest.mark.parametrize("name", PRIVATE)
def test_draws_and_noise_of_a_secure_run_do_not_follow_from_the_public_seed(
    name: str, tmp_path: Path
) -> None:
    """Two runs of one seed share no key, nor does either with the run that the seed determines; and the noise
    in their updates is independent of each other's."""
    alone = ["train.expected_batch_size=1e-6", "train.steps=1", "optimizer.name=sgd"]
    start = prepare(of(name, *alone)).model.state_dict()
    origin = torch.cat([start[k].flatten() for k in sorted(start)]).double()
    keys, noise = [], []
    for run, source in (("a", SECURE), ("b", SECURE), ("seeded", "privacy.noise_source=seeded")):
        client = Listening()
        train(of(name, *alone, source), tmp_path / run, client=client)
        keys.append(set(client.keys.values()))
        noise.append((final(tmp_path / run).double() - origin).numpy())
    bound = 6 / np.sqrt(origin.numel())  # false alarm 2e-9
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert keys[i]
        assert not keys[i] & keys[j]
        assert noise[i].std() > 0
        assert abs(np.corrcoef(noise[i], noise[j])[0, 1]) < bound
    public = {seeds.derive(root, p, 0) for root in (0, seeds.derive(0, "run")) for p in PURPOSES}
    assert not (keys[0] | keys[1]) & public
    assert keys[2] & public, "and the search does find what follows from the seed"


@pytest.mark.parametrize("name", ["central_dpsgd", "local_dpsgd", "dp_fedavg"])
def test_holder_scores_are_not_written_in_public_only_mode(name: str, tmp_path: Path) -> None:
    skewed = [
        "federation.partition=shards",
        "federation.partition.options.per_holder=1",
        "monitor.tensorboard=true",
    ]
    shown = train(of(name, *skewed), tmp_path / "shown")["holder_scores"]
    assert set(shown) == {"5%", "50%", "95%"}
    result = train(of(name, *skewed, "monitor.public_only=true"), tmp_path / "public")
    assert "holder_scores" not in result
    for path in (tmp_path / "public").rglob("*.json*"):
        assert '"95%"' not in path.read_text()


def test_holders_whose_labels_the_test_set_lacks_are_left_out() -> None:
    """Test images of one class alone: every holder that has the class counts with its accuracy."""
    experiment = prepare(small("federation.partition=shards", "federation.partition.options.per_holder=1"))
    splits, held, model = experiment.splits, experiment.partition, experiment.model

    def spread(train_targets: NDArray[np.int64], tested: int) -> dict[str, float]:
        train = dataclasses.replace(splits.train, targets=train_targets)
        test = splits.test.take(np.flatnonzero(splits.test.targets == tested))
        return scoring.holder_scores(model, experiment.task, Splits(train, test), held, torch.float32).value

    own = splits.train.targets
    label = max(range(10), key=lambda c: spread(np.full_like(own, c), c)["50%"])
    accuracy = spread(np.full_like(own, label), label)["50%"]
    assert accuracy > 0
    having = held.label_counts(own, 10)[:, label] > 0
    assert 0 < having.sum() < 10, "some holders have the label and some lack it"
    assert spread(own, label) == pytest.approx(dict.fromkeys(("5%", "50%", "95%"), accuracy))
    assert spread(np.where(own == label, (label + 1) % 10, own), label) == {}
