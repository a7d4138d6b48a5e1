"""Runs on pictures in files: the result depends on nothing but data and settings, and bad pictures on
nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedsim
from fedsim import loading
from fedsim.config import Config
from fedsim.data import datasets
from fedsim.data.pictures.pictures import Pictures
from fedsim.engine import setup
from fedsim.engine.asked import Asked
from fedsim.engine.experiment import prepare
from fedsim.engine.holder import Node, answer
from fedsim.engine.metrics import numbers_of, read_steps
from fedsim.study import plan
from fedsim.types import StepTask
from fedsim.validate import InputError, RunError
from tests import pictures as made
from tests.conftest import command, final, small, train, without_epsilon

CLASSES = 3
EDGE = 12
BROKEN = 7  # of the training files, in the order of the folder
COMMON = (
    "data.train_examples=null",
    "data.test_examples=null",
    "model.dtype=float64",
    "federation.holders=6",
    "federation.partition=iid",
    "train.steps=3",
    "train.expected_batch_size=24",
    "train.eval_every=3",
    "train.checkpoint_every=1",
    "train.augmentations=[random_resized_crop, flip]",
    "train.augment_multiplicity=2",
)

FEATURES = (
    "data.features={name: scattering}",
    "model.name=linear",
    "train.augmentations=[]",
    "train.augment_multiplicity=1",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training pictures, one of them damaged, as a folder and as tar files of seven."""
    folder = tmp_path_factory.mktemp("pictures")
    held = made.ordered(made.samples(48, CLASSES))
    held[BROKEN] = (held[BROKEN][0], held[BROKEN][1][:-200])
    test = made.ordered(made.samples(12, CLASSES, seed=1))
    made.folder(folder, {"train": held, "test": test}, CLASSES)
    made.shards(folder, "train", held, 7)
    made.shards(folder, "test", test, 7)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDSIM_CACHE", str(root / "cache"))
    without_epsilon(monkeypatch)
    datasets._load.cache_clear()
    setup.forget_nodes()
    yield
    datasets._load.cache_clear()
    setup.forget_nodes()


def config(root: Path, *overrides: str, shards: bool = False, **options: Any) -> Config:
    given = {"size": EDGE, **({"classes": CLASSES} if shards else {"decode": "on_demand"}), **options}
    name = "image_shards" if shards else "image_folder"
    data = [f"data.name={name}", f"data.root={root}", f"data.options={json.dumps(given)}"]
    return small(*COMMON, *data, *overrides)


@pytest.fixture(scope="module")
def plain(root: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The parameters of one holder and one node, all views at once, one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSIM_CACHE", str(root / "cache"))
        without_epsilon(patch)
        out = tmp_path_factory.mktemp("plain")
        train(config(root, "federation.holders=1", "federation.nodes=1", "engine.decode_threads=1"), out)
    return final(out)


@pytest.mark.parametrize(
    ("shards", "overrides"),
    [
        (False, ["engine.decode_threads=3", "federation.nodes=3"]),
        (True, ["engine.decode_threads=2"]),
        (True, ["engine.physical_batch_size=6", "engine.gradients=vmap"]),
        (False, ["engine.physical_batch_size=2", "strategy=shares", "federation.nodes=2"]),
    ],
    ids=["folder", "tar files", "few at a time", "sums of holders"],
)
def test_holders_nodes_threads_batches_and_containers_change_nothing(
    root: Path, plain: torch.Tensor, tmp_path: Path, shards: bool, overrides: list[str]
) -> None:
    made_of = config(root, *overrides, shards=shards)
    if "strategy=shares" in overrides:  # noise of its own: what is compared is the sum
        _same_sums(root, made_of)
        return
    train(made_of, tmp_path)
    torch.testing.assert_close(final(tmp_path), plain, rtol=1e-9, atol=1e-11)


def _same_sums(root: Path, chosen: Config) -> None:
    one, by_holder = Node(config(root, "federation.nodes=1"), 0, 0), Node(chosen, 0, 0)
    task = StepTask(0, 0, 1.0, {"draw": bytes(32), "augment": bytes(range(32)), "availability": bytes(32)})
    ids = by_holder.ids
    clip = one.method.at.clip
    whole = one.clipped_sum(ids, task, clip)
    each, together = by_holder.clipped_sums(ids, task, clip)
    torch.testing.assert_close(each.sum(0), whole.sum, rtol=1e-9, atol=1e-11)
    assert whole.undecodable == together.undecodable == int(BROKEN in ids)
    assert torch.equal(torch.isnan(whole.norms), torch.isnan(together.norms))


def test_a_damaged_picture_adds_exactly_nothing_and_is_counted(root: Path, tmp_path: Path) -> None:
    """The sum with it is the sum without it, bit for bit, also of a model that does not look at its
    inputs."""
    node = Node(config(root, "federation.nodes=1", "engine.physical_batch_size=200"), 0, 0)
    assert isinstance(node.train.inputs, Pictures)
    task = StepTask(0, 0, 1.0, {"draw": bytes(32), "augment": bytes(range(32)), "availability": bytes(32)})
    with_it, without = node.ids, np.delete(node.ids, BROKEN)
    clip = node.method.at.clip

    class Blind(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.bias.expand(len(inputs), CLASSES)

    for model in (node.model, Blind()):
        node.model = model
        one, other = (node.clipped_sum(ids, task, clip) for ids in (with_it, without))
        assert torch.equal(one.sum, other.sum)
        assert float(one.sum.norm()) > 0
        assert (one.count, one.undecodable) == (48, 1)
        assert (other.count, other.undecodable) == (47, 0)
        assert torch.isnan(one.norms[BROKEN])
        assert torch.equal(one.norms[np.arange(48) != BROKEN], other.norms)
    alone = node.clipped_sum(np.array([BROKEN]), task, clip)
    assert not alone.sum.any()
    assert (alone.count, alone.undecodable) == (1, 1)


def test_the_record_says_how_many_and_the_log_which(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made_of = config(root, "train.expected_batch_size=48")
    result = train(made_of, tmp_path / "run")
    lines = read_steps(tmp_path / "run" / "metrics.jsonl")
    assert [numbers_of(line)["undecodable"] for line in lines] == [1.0] * 3
    assert all("undecodable" in line["sensitive"] for line in lines)
    assert [numbers_of(line)["realised_batch_size"] for line in lines] == [48.0] * 3
    assert [numbers_of(line)["non_finite_gradients"] for line in lines] == [1.0] * 3
    assert sum("truncated" in record.getMessage() for record in caplog.records) == 1
    assert result["examples"] == 48
    caplog.clear()
    hidden = config(root, "train.expected_batch_size=48", "monitor.public_only=true")
    train(hidden, tmp_path / "hidden")
    assert "truncated" not in caplog.text
    assert "undecodable" not in (tmp_path / "hidden" / "metrics.jsonl").read_text()


def test_a_holder_trains_without_its_damaged_picture(root: Path, tmp_path: Path) -> None:
    made_of = config(root, "preset=dp_fedavg", "train.augmentations=[]", "train.augment_multiplicity=1")
    node = Node(made_of, 0, 0)
    experiment = prepare(made_of)
    holder = int(experiment.partition.holder_of[BROKEN])
    task = StepTask(0, 0, 1.0, {"draw": bytes(32), "augment": bytes(32), "availability": bytes(32)})
    if holder % 2:
        node = Node(made_of, 1, 0)
    reply = answer(node, task, experiment_parameters(node), Asked())
    assert reply.statistics["undecodable"] == 1.0
    assert reply.statistics["non_finite"] == 0.0
    train(made_of, tmp_path)
    assert bool(torch.isfinite(final(tmp_path)).all())


def experiment_parameters(node: Node) -> np.ndarray:
    return node.parameters().numpy().copy()


def test_a_resumed_run_repeats_its_bits_and_is_bound_to_its_files(root: Path, tmp_path: Path) -> None:
    """Resume after a stop in the middle; refused once a file of a holder has other bytes, by content
    alone."""
    import shutil

    own = tmp_path / "data"
    shutil.copytree(root, own, ignore=shutil.ignore_patterns("cache"))
    for shards in (False, True):
        whole, cut = tmp_path / f"whole{shards}", tmp_path / f"cut{shards}"
        train(config(own, shards=shards), whole)
        stopped = _stopping_after(1)
        with pytest.raises(RunError):
            train(config(own, shards=shards), cut, client=stopped)
        moved = tmp_path / f"moved{shards}"
        shutil.copytree(own, moved)  # other times, another path, the same bytes
        datasets._load.cache_clear()
        setup.forget_nodes()
        train(config(moved, shards=shards), cut, resume=True)
        assert torch.equal(final(whole), final(cut))
        again = tmp_path / f"again{shards}"
        with pytest.raises(RunError):
            train(config(own, shards=shards), again, client=_stopping_after(1))
        path = moved / "train-00000.tar" if shards else sorted((moved / "train").rglob("*.jpg"))[3]
        content = bytearray(path.read_bytes())
        content[len(content) // 2 if not shards else 900] ^= 1
        path.write_bytes(bytes(content))
        datasets._load.cache_clear()
        setup.forget_nodes()
        with pytest.raises(InputError, match="the training examples of holders"):
            train(config(moved, shards=shards), again, resume=True)


def _stopping_after(steps: int) -> Any:
    from fedsim.flower.client_app import app

    seen = [0]

    def client(message: Any, context: Any) -> Any:
        if message.metadata.message_type != "query":
            seen[0] += 1
            if seen[0] > 2 * steps:
                raise OSError("gone")
        return app(message, context)

    return client


@pytest.mark.parametrize("overrides", [(), FEATURES], ids=["pixels", "features"])
def test_evaluation_leaves_out_and_counts_what_is_no_picture(
    root: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    import shutil

    own = tmp_path / "data"
    shutil.copytree(root, own, ignore=shutil.ignore_patterns("cache", "*.tar"))
    victims = sorted((own / "test").rglob("*.jpg"))
    victims[2].write_bytes(b"no picture")
    train(config(own, *overrides), tmp_path / "broken")
    numbers = numbers_of(read_steps(tmp_path / "broken" / "metrics.jsonl")[-1])
    assert numbers["undecodable_test"] == 1.0
    victims[2].unlink()
    datasets._load.cache_clear()
    setup.forget_nodes()
    train(config(own, *overrides), tmp_path / "removed")
    without = numbers_of(read_steps(tmp_path / "removed" / "metrics.jsonl")[-1])
    assert np.isfinite(without["loss"])
    assert (numbers["loss"], numbers["accuracy"]) == (without["loss"], without["accuracy"])
    assert "undecodable_test" not in without


def test_features_of_what_is_no_picture_are_no_example(root: Path, tmp_path: Path) -> None:
    made_of = config(root, *FEATURES, "train.expected_batch_size=48")
    train(made_of, tmp_path / "run")
    lines = read_steps(tmp_path / "run" / "metrics.jsonl")
    assert [numbers_of(line)["undecodable"] for line in lines] == [1.0] * 3
    assert bool(torch.isfinite(final(tmp_path / "run")).all())


def test_predictions_of_files_are_those_that_were_scored(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for decode in ("on_demand", "packed"):
        out = tmp_path / decode
        train(config(root, decode=decode, short_side=15), out)
        run = fedsim.load_run(out)
        splits = datasets.load(run.config.data)
        inputs, _ = splits.test.read(slice(None))
        said = run.predict(inputs)
        capsys.readouterr()
        assert command(["predict", str(out), str(root / "test"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        np.testing.assert_allclose(found["outputs"], said.outputs, atol=1e-6)
        assert len(found["inputs"]) == 12


def test_features_of_pictures_are_computed_once_and_none_of_a_damaged_one_counts(
    root: Path, tmp_path: Path
) -> None:
    heads = (
        "data.features.name=scattering",
        "model={name: linear, options: {zero_init: true}}",
        "model.dtype=float32",
        "train.augmentations=[]",
        "train.augment_multiplicity=1",
    )
    for preset in ("preset=central_dpsgd", "preset=dp_ls"):  # sums of gradients, and of features
        extra = [
            "train.steps=1",
            "train.expected_batch_size=48",
            "optimizer.name=sgd",
            "optimizer.learning_rate=1.0",
        ]
        made_of = config(root, preset, *heads, *extra, size=8)
        out = tmp_path / preset.partition("=")[2]
        train(made_of, out)
        numbers = numbers_of(read_steps(out / "metrics.jsonl")[-1])
        assert numbers["non_finite_gradients"] == 1.0
        assert bool(torch.isfinite(final(out)).all())
    features = datasets.load(made_of.data).train
    assert np.flatnonzero(~np.isfinite(features.inputs.reshape(48, -1)).all(1)).tolist() == [BROKEN]


def test_a_dry_run_that_reads_says_what_is_no_picture(root: Path) -> None:
    said = plan.describe(config(root))
    assert said["undecodable"] == {"pictures": 0, "known": "by their first bytes"}
    assert said["data"] == "image_folder, read"
    packed = plan.describe(config(root, decode="packed"))
    assert packed["undecodable"]["pictures"] == 1
    hidden = plan.describe(config(root, "monitor.public_only=true", decode="packed"))
    assert hidden["undecodable"] == {}


@pytest.mark.parametrize(
    "name",
    [
        "de2022/imagenet_nf_resnet_50_eps8",
        "kurakin2022/large_batch_64x",
        "kurakin2022/places365_pretrain",
        "mehta2022/imagenet_single_step_eps8",
    ],
)
def test_imagenet_recipes_read_a_folder_of_its_layout(root: Path, tmp_path: Path, name: str) -> None:
    """train/CLASS and val/CLASS, any sizes; small on the command line, as the pages say."""
    layout = tmp_path / "imagenet"
    layout.mkdir()
    (layout / "train").symlink_to(root / "train")
    (layout / "val").symlink_to(root / "test")
    small_model = {
        "de2022": "model.options={width: 8}",
        "kurakin2022": "model.options={width: 8, groups: 4}",
        "mehta2022": "engine.threads=1",
    }[name.partition("/")[0]]
    overrides = [
        f"data.root={layout}",
        "data.options.size=32",
        "data.options.short_side=36",
        "privacy.delta=1.0e-5",
        small_model,
        "train.steps=1",
        "train.expected_batch_size=8",
        "train.eval_every=1",
        "train.checkpoint_every=1",
        "federation.holders=3",
        "federation.partition=iid",
        "engine.physical_batch_size=8",
        "monitor.tensorboard=false",
        "monitor.progress=false",
    ]
    if name.startswith("mehta2022"):
        overrides.append("data.features=scattering")
    if name.startswith("kurakin2022"):
        overrides.append("optimizer.warmup_epochs=null")
    made_of = loading.load(name, overrides)
    result = train(made_of, tmp_path / "run")
    assert result["examples"] == 48
    assert isinstance(prepare(made_of).splits.train.inputs, Pictures) or made_of.data.features
