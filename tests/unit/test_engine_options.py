"""`engine.*`: what is allowed, what is refused with a reason, and that none of it changes the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import loading
from fedsim.engine import device as devices
from fedsim.engine.experiment import prepare
from fedsim.engine.holder import Node
from fedsim.grads import FlatClip, per_example
from fedsim.grads.bookkeeping import Options, clipped_sum
from fedsim.grads.per_example import clipped_gradient_sum
from fedsim.types import StepTask
from fedsim.validate import InputError
from tests.conftest import final, small, train


def batch(examples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((examples, 2, 3, 8, 8), generator=generator), torch.arange(examples) % 5


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten(), nn.Linear(512, 5)
    )


# --- settings reach the engine and change nothing --------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("engine.gradient_memory=full", Options()),
        ("engine.gradient_memory=low", Options(memory_budget=0)),
        ("engine.gradient_memory=1000", Options(memory_budget=1000)),
        ("engine.gradient_memory=1.5GiB", Options(memory_budget=3 * 2**29)),
        ("engine.channels_last=on", Options(channels_last=True)),
        ("engine.channels_last=off", Options(channels_last=False)),
        ("engine.channels_last=auto", Options()),
        ("engine.precision=tf32", Options(precision="tf32")),
        ("engine.precision=bfloat16", Options(precision="bfloat16")),
    ],
)
def test_a_setting_says_one_thing_to_the_engine(override: str, expected: Options) -> None:
    assert devices.options_of(small(override).engine) == expected


def test_a_node_hands_them_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Options] = []
    real: Any = clipped_sum

    def spy(*arguments: Any, options: Options) -> Any:
        seen.append(options)
        return real(*arguments, options=options)

    monkeypatch.setattr(per_example.bookkeeping, "clipped_sum", spy)
    node = Node(small("engine.gradient_memory=low", "engine.channels_last=off"), 0, 0)
    keys = node.method.keys(0, 0)
    task = StepTask(step=0, wave=0, stage="", sampling_rate=0.1, keys=keys)
    node.clipped_sum(node.ids[:3], task, node.method.at.clip)
    assert seen == [Options(memory_budget=0, channels_last=False, fill=2)]


@pytest.mark.parametrize(
    "override",
    [
        "engine.gradient_memory=low",
        "engine.gradient_memory=1MB",
        "engine.channels_last=on",
        "engine.channels_last=off",
        "engine.physical_batch_size=auto",
    ],
)
@pytest.mark.parametrize("model", ["mlp", "small_cnn"])
def test_flipping_one_leaves_the_parameters(
    model: str, override: str, tmp_path: Path, baseline: dict[str, Tensor]
) -> None:
    train(small(*WIDE, f"model.name={model}", override), tmp_path)
    assert torch.max(torch.abs(final(tmp_path) - baseline[model])) <= 1e-10


WIDE = ("model.dtype=float64", "train.steps=2")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    out = {}
    for model in ("mlp", "small_cnn"):
        folder = tmp_path_factory.mktemp(model)
        train(small(*WIDE, f"model.name={model}"), folder)
        out[model] = final(folder)
    return out


def test_no_engine_setting_is_part_of_the_digest() -> None:
    base = small().digest()
    for override in (
        "engine.physical_batch_size=auto",
        "engine.gradient_memory=low",
        "engine.precision=tf32",
        "engine.channels_last=on",
    ):
        assert small(override).digest() == base


def test_settings_survive_messages_and_files(tmp_path: Path) -> None:
    config = small(
        "engine.physical_batch_size=auto", "engine.memory_limit=8GB", "engine.gradient_memory=512MB"
    )
    assert loading.from_json(config.to_json()) == config
    path = tmp_path / "c.yaml"
    path.write_text(loading.to_yaml(config), encoding="utf-8")
    assert loading.load(path).engine == config.engine


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.physical_batch_size=atuo"], "one of auto, got 'atuo'. Did you mean 'auto'"),
        (["engine.physical_batch_size=0"], "engine.physical_batch_size must be a positive"),
        (["engine.physical_batch_size=7.5"], "engine.physical_batch_size"),
        (["engine.memory_limit=8GB"], "reads it while engine.physical_batch_size is 64"),
        (["engine.physical_batch_size=auto", "engine.memory_limit=8 bananas"], "engine.memory_limit must be"),
        (["engine.physical_batch_size=auto", "engine.memory_limit=1.5"], "engine.memory_limit must be"),
        (["engine.physical_batch_size=auto", "engine.memory_limit=-1"], "engine.memory_limit must be"),
        (["engine.physical_batch_size=auto", "engine.memory_limit=.inf"], "engine.memory_limit must be"),
        (["engine.gradient_memory=0"], "Or use full or low"),
        (["engine.gradient_memory=lots"], "engine.gradient_memory must be bytes"),
        (["engine.channels_last=maybe"], "engine.channels_last must be one of auto, on, off"),
        (["engine.precision=float16"], "engine.precision must be one of float32, tf32, bfloat16"),
        (["engine.precision=tf32", "engine.device=cpu"], "must be float32 on cpu.*needs a CUDA device"),
        (["engine.precision=bfloat16", "engine.device=cpu"], "must be float32 on cpu.*needs a CUDA device"),
        (
            ["engine.gradients=vmap", "engine.gradient_memory=low"],
            "reads it while engine.gradients is 'vmap'",
        ),
        (
            ["engine.gradients=opacus", "engine.channels_last=off"],
            "reads it while engine.gradients is 'opacus'",
        ),
        (["engine.gradients=vmap", "engine.precision=tf32"], "reads it while engine.gradients is 'vmap'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(small(*overrides))


def test_reduced_precision_is_for_float32_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "pick_device", lambda *_: torch.device("cuda", 0))
    devices.check(small("engine.precision=bfloat16"))
    with pytest.raises(InputError, match="is for float32 models, got float64"):
        devices.check(small("engine.precision=bfloat16", "model.dtype=float64"))


def test_options_of_one_engine_are_refused_by_the_others() -> None:
    with pytest.raises(InputError, match="bookkeeping"):
        clipped_gradient_sum(
            net(), *batch(), FlatClip(1.0), engine="vmap", options=Options(channels_last=True)
        )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8 * 10**9),
        ("8 gib", 2**33),
        ("1.5kB", 1500),
        ("12b", 12),
        (12, 12),
        (1e6, 10**6),
        ("3TiB", 3 * 2**40),
    ],
)
def test_bytes_are_read(text: int | float | str, expected: int) -> None:
    assert devices.parse_bytes(text, "x") == expected


@pytest.mark.parametrize("text", ["", "8", "ib", "8 ib", "-8GB", "8G B", 0, -3, 1.5, float("nan"), "0.1B"])
def test_other_text_is_not_taken_for_bytes(text: int | float | str) -> None:
    with pytest.raises(InputError, match="x must be bytes"):
        devices.parse_bytes(text, "x")


# --- devices ---------------------------------------------------------------------------------------------


def with_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_spreads_nodes_over_the_devices_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(3, monkeypatch)
    assert [devices.pick_device("auto", node).index for node in range(5)] == [0, 1, 2, 0, 1]
    with_gpus(1, monkeypatch)
    assert {str(devices.pick_device("auto", node)) for node in range(5)} == {"cuda:0"}
    with_gpus(0, monkeypatch)
    assert {str(devices.pick_device("auto", node)) for node in range(5)} == {"cpu"}


def test_a_named_device_is_taken_by_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(2, monkeypatch)
    assert {str(devices.pick_device("cuda:1", node)) for node in range(3)} == {"cuda:1"}
    assert {str(devices.pick_device("cpu", node)) for node in range(3)} == {"cpu"}
    with pytest.raises(InputError, match="sees 2 CUDA devices"):
        devices.pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"auto, cpu or cuda\[:N\]"):
        devices.pick_device(name)


def test_a_node_asks_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def pick(name: str, node: int = 0) -> torch.device:
        asked.append((name, node))
        return torch.device("cpu")

    monkeypatch.setattr("fedsim.engine.holder.pick_device", pick)
    Node(small(), 1, 0)
    assert asked == [("auto", 1)]


def test_other_engines_may_share_a_gpu() -> None:
    """How many nodes are on it is no setting of the bookkeeping engine."""
    engine: Any = per_example.engine_of("vmap", Options(sharers=2, fill=5))
    assert engine.func is per_example.ENGINES["vmap"]
    assert engine.keywords == {"fill": 5}
    with pytest.raises(InputError, match="settings of the bookkeeping engine"):
        per_example.engine_of("vmap", Options(memory_budget=0))


@pytest.mark.parametrize(
    ("precision", "on_gpu", "fill"), [("float32", False, 2), ("float32", True, 5), ("bfloat16", False, 5)]
)
def test_pieces_of_fewer_bits_and_of_gpus_have_one_size(
    precision: str, on_gpu: bool, fill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real: Any = clipped_sum

    def spy(*arguments: Any, options: Options) -> Any:
        seen.append(options.fill)
        return real(*arguments, options=options)

    monkeypatch.setattr(per_example.bookkeeping, "clipped_sum", spy)
    monkeypatch.setattr(per_example.gpu, "on", lambda _: on_gpu)
    monkeypatch.setattr(Options, "check_device", lambda *_: None)
    per_example.clipped_gradient_sum(
        torch.nn.Linear(3, 2),
        torch.randn(7, 2, 3),
        torch.zeros(7, dtype=torch.int64),
        FlatClip(1.0),
        engine="bookkeeping",
        physical_batch_size=10,
        options=Options(precision=precision),
    )
    assert seen == [fill, fill]
