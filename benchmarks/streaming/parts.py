"""What is measured, each in a process of its own that begins with nothing in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim import loading, seeds
from fedsim.config import Config
from fedsim.data import augment, datasets
from fedsim.data.pictures.pictures import Pictures
from fedsim.engine import setup
from fedsim.engine.experiment import Experiment, prepare
from fedsim.engine.metrics import numbers_of, read_steps
from fedsim.engine.run_folder import RunFolder

RECIPES = {
    "wrn-16-4": (
        "de2022/imagenet_nf_resnet_50_eps8",
        ["model={name: wide_resnet, options: {depth: 16, width: 4}}", "train.augment_multiplicity=1"],
    ),
    "resnet-18": ("kurakin2022/large_batch_64x", ["optimizer.warmup_epochs=null"]),
    "nf-resnet-50": ("de2022/imagenet_nf_resnet_50_eps8", []),
}
"""Model -> configuration, and what is changed on the command line beside sizes. One view an example for
WRN-16-4, where the paper has four: a decoded picture then serves one view, the worst case."""


def memory() -> dict[str, float]:
    """Return what this process holds, in megabytes: its own memory, mapped files, and its peak so far."""
    names = {"RssAnon": "own", "RssFile": "mapped", "VmHWM": "peak"}
    with open("/proc/self/status", encoding="ascii") as handle:
        lines = (line.split() for line in handle)
        return {names[line[0][:-1]]: int(line[1]) / 1e3 for line in lines if line[0][:-1] in names}


def small(recipe: str, root: Path, classes: int, *overrides: str) -> Config:
    """Return a configuration of ImageNet on a folder of fewer pictures."""
    name, changed = RECIPES[recipe]
    return loading.load(
        name,
        [
            f"data.root={root}",
            "data.options.size=64",
            "data.options.short_side=73",
            f"reference.data.classes={classes}",
            "privacy.delta=1.0e-6",
            "federation.holders=100",
            "federation.partition=iid",
            "train.eval_every=1000",
            "train.checkpoint_every=1000",
            "monitor.tensorboard=false",
            "monitor.progress=false",
            *changed,
            *overrides,
        ],
    )


def training(recipe: str, root: Path, out: Path, steps: int, batch: int, threads: int) -> dict[str, Any]:
    """Train for some steps; return memory, seconds, and the share of a step that waits for data.

    The first step is left out of times: it holds what happens once.
    """
    from fedsim.flower.client_app import app
    from fedsim.flower.local_grid import LocalGrid
    from fedsim.flower.server_app import train

    config = small(
        recipe,
        root,
        100,
        f"train.steps={steps}",
        f"train.expected_batch_size={batch}",
        "data.test_examples=32",
        f"engine.threads={threads}",
        "engine.physical_batch_size=8",
    )
    before = memory()
    began = time.perf_counter()
    experiment = prepare(config)
    opened = time.perf_counter() - began
    held = memory()
    train(LocalGrid(app, config.federation.nodes), experiment, RunFolder(out), False)
    lines = [numbers_of(line) for line in read_steps(out / "metrics.jsonl")][1:]

    def of(name: str) -> list[float]:
        return [float(line[f"seconds/{name}"] or 0.0) for line in lines]

    views = [float(line["realised_batch_size"] or 0) * config.train.augment_multiplicity for line in lines]
    return {
        "recipe": RECIPES[recipe][0],
        "model": recipe,
        "pictures": len(experiment.splits.train),
        "threads": threads,
        "seconds_to_open": opened,
        "seconds_a_step": statistics.mean(of("total")),
        "views_a_step": statistics.mean(views),
        "share_waiting_for_data": sum(of("data")) / sum(of("total")),
        "megabytes": {"before": before, "opened": held, "after": memory()},
    }


def decoding(root: Path, edge: int, decode: str, count: int) -> dict[str, Any]:
    """Return views that one thread makes a second of its processor, K = 1 and K = 4, and whole pictures."""
    short = round(edge / 0.875)
    overrides = [
        f"data.options.size={edge}",
        f"data.options.short_side={short}",
        f"data.options.decode={decode}",
    ]
    splits = datasets.load(small("resnet-18", root, 100, *overrides).data)
    pictures = splits.train.inputs
    assert isinstance(pictures, Pictures)
    ids = np.sort(seeds.stream(0, "pictures").permutation(len(pictures))[:count])
    names, found = ["random_resized_crop", "flip"], {}
    pictures.read(ids, 1)  # files are in memory: a disk is another matter
    for label, views in (("one view", 1), ("four views", 4)):
        began = time.process_time()
        augment.views_of(pictures, ids, views, bytes(32), names, 1)
        found[label] = views * len(ids) / (time.process_time() - began)
    began = time.process_time()
    pictures.read(ids, 1)
    found["evaluation"] = len(ids) / (time.process_time() - began)
    return {"edge": edge, "decode": decode, "pictures": count, "a_second_and_core": found}


def many(root: Path, holders: int, draws: int) -> dict[str, Any]:
    """Open samples in tar files spread over holders; return seconds and bytes a sample, and seconds a
    draw: of the processor, which who else is at work on the machine does not change."""
    config = _many(root, holders)
    experiment, opened, before, after = _opened(config)
    node = setup.node_for(setup.setup_of(config), 0)
    other = setup.node_for(setup.setup_of(config), 1)
    with_nodes = memory()
    seconds, drawn = [], 0
    for step in range(draws):
        task = _task(experiment, step)
        began = time.process_time()
        drawn += len(node.drawn(task)) + len(other.drawn(task))
        seconds.append(time.process_time() - began)
    read = time.process_time()
    ids = node.drawn(_task(experiment, draws))
    node.train.read(ids, 1)
    read = time.process_time() - read - statistics.median(seconds) / 2
    examples = len(experiment.splits.train)
    done = memory()
    return {
        "samples": examples,
        "holders": holders,
        "nodes": config.federation.nodes,
        "seconds_to_open": opened,
        "seconds_a_draw": statistics.median(seconds),
        "drawn_on_average": drawn / draws,
        "seconds_to_read_a_sample": read / max(1, len(ids)),
        "bytes_a_sample_by_arrays": _arrays(experiment),
        "megabytes": {"before": before, "opened": after, "with nodes": with_nodes, "after draws": done},
    }


def _many(root: Path, holders: int) -> Config:
    return loading.load(
        "base",
        [
            "data.name=image_shards",
            f"data.root={root}",
            "data.options={size: 16, classes: 10}",
            "model.name=mlp",
            f"federation.holders={holders}",
            "federation.partition=iid",
            "privacy.noise_multiplier=1.0",
            "privacy.delta=1.0e-7",
            "train.expected_batch_size=1000",
        ],
    )


def _opened(config: Config) -> tuple[Experiment, float, dict[str, float], dict[str, float]]:
    torch.set_num_threads(1)
    before = memory()
    began = time.process_time()
    experiment = prepare(config)
    return experiment, time.process_time() - began, before, memory()


def _arrays(experiment: Experiment) -> dict[str, float]:
    """Bytes a sample of what is held for each: columns of the index that a run reads, classes, holders."""
    inputs, examples = experiment.splits.train.inputs, len(experiment.splits.train)
    assert isinstance(inputs, Pictures)
    store: Any = inputs.frames
    columns = {name: store.store.index.column(name).nbytes for name in ("start", "size")}
    held = {
        "index": sum(columns.values()),
        "classes": experiment.splits.train.targets.nbytes,
        "holders": experiment.partition.holder_of.nbytes,
    }
    held["together"] = sum(held.values())
    return {name: count / examples for name, count in held.items()}


def _task(experiment: Experiment, step: int) -> Any:
    from fedsim.types import StepTask

    keys = experiment.mechanism.method.keys(seeds.derive(0, "run"), step)
    return StepTask(step, 0, experiment.mechanism.sampling_rate, keys)


CALLS: dict[str, Any] = {"training": training, "decoding": decoding, "many": many}


def arguments_of(values: Sequence[str]) -> list[Any]:
    """Return the arguments of a call as the command line has them: numbers, paths, words."""
    return [int(v) if v.isdigit() else Path(v) if "/" in v else v for v in values]
