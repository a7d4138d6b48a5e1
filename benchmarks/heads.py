"""Accuracy of private linear heads on Fashion-MNIST: method by features by budget, over seeds of the noise.

    python -m benchmarks.heads --json results/heads.json [--features last] [--methods DP-LS] [--epsilons 1 8]
    python -m benchmarks.heads --held-out ...     # choose settings: 10,000 held-out training examples

Full Fashion-MNIST must be there (FEDSIM_DATA, `make data`). Every run is the mechanism of its configuration,
its 100 holders on one node, in one process: tests/strategies/test_heads.py shows that a federation gives the
same. Exact sums that do not depend on the seed (moments, second moments, the first gradient) are computed
once; noise, updates and everything that follows are made anew. Finished runs are read from the JSON file, so
it may be interrupted.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim import loading, provenance
from fedsim.config import Config
from fedsim.engine import scoring
from fedsim.engine.experiment import prepare
from fedsim.engine.holder import Node
from fedsim.grads.flat import get_flat, set_flat, spec
from fedsim.noise.stream import Stream
from fedsim.strategies.base import Collected
from fedsim.types import StepTask

EPSILONS = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
SEEDS = (0, 1, 2, 3, 4)
FEATURES = {"last": "efficientnet_lite0_last", "whitened": "efficientnet_lite0", "pixels": None}
N, HELD_OUT = 60_000, 10_000

# Settings are chosen on 10,000 held-out training examples at these budgets, one seed; another takes those of
# the nearest on a logarithmic scale.
CHOSEN_AT = (0.1, 1.0, 8.0)


def _optimizer(name: str, rate: float, steps: int, momentum: float | None = 0.9) -> list[str]:
    more = [] if momentum is None else [f"optimizer.options.momentum={momentum}"]
    return [f"optimizer.name={name}", f"optimizer.learning_rate={rate}", f"train.steps={steps}", *more]


def _fc(clip: float, rate: float, steps: int, momentum: float = 0.9) -> list[str]:
    """steps gradients after one covariance."""
    chosen = [f"query.options.residual_clip={clip}", *_optimizer("nesterov", rate, steps + 1, momentum)]
    return ["preset=dp_fc", *chosen]


def _gd(clip: float, rate: float, steps: int, momentum: float = 0.9) -> list[str]:
    """Full batch; clip of whole gradients, in lengths of rows."""
    return [
        "preset=central_dpsgd",
        f"privacy.clip_norm={clip}",
        *_optimizer("nesterov", rate, steps, momentum),
    ]


def _sgd(rate: float, steps: int, average: float) -> list[str]:
    """Poisson draws of 8,192 on average, almost every gradient clipped, an average of the weights."""
    return [
        "preset=central_dpsgd",
        "privacy.clip_norm=0.1",
        "train.expected_batch_size=8192",
        f"train.ema_decay={average}",
        *_optimizer("momentum", rate, steps),
    ]


_SOLVED = ["optimizer.name=sgd", "optimizer.options={}", "optimizer.learning_rate=1.0", "train.steps=1"]
_FREE = ["strategy=nonprivate", "privacy.target_epsilon=null", "privacy.clip_norm=1.0"]
METHODS: dict[str, Mapping[str, Sequence[Sequence[str]]]] = {}
"""Method -> features -> settings at each of CHOSEN_AT; filled by SETTINGS below."""


def overrides_of(method: str, features: str, epsilon: float) -> list[str]:
    """Return what a method is run with: the settings of the nearest budget they were chosen at."""
    held = METHODS[method][features]
    nearest = min(range(len(CHOSEN_AT)), key=lambda i: abs(np.log(CHOSEN_AT[i] / epsilon)))
    return list(held[min(nearest, len(held) - 1)])


def config_of(features: str, epsilon: float, seed: int, held_out: bool, chosen: Sequence[str]) -> Config:
    """Return the configuration of one run."""
    batch = N - HELD_OUT if held_out else N
    return loading.load(
        "mehta2023/base",
        [
            "data.name=fashion_mnist",
            f"data.features={FEATURES[features] or 'null'}",
            f"data.holdout_examples={HELD_OUT if held_out else 0}",
            f"train.expected_batch_size={batch}",
            f"privacy.target_epsilon={epsilon}",
            f"privacy.clip_norm={CLIP[features]}",
            "federation.holders=100",
            "federation.nodes=1",
            "engine.physical_batch_size=2048",
            f"seed={seed}",
            *chosen,
        ],
    )


CLIP = {"last": 20.0, "whitened": 20.0, "pixels": 10.0}
"""Below the norm of almost every row, so that rows have one length."""


class Sums:
    """Exact sums by what they are of; those before the first update do not depend on the seed."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}
        self._node: tuple[str, Node] | None = None

    def node(self, config: Config) -> Node:
        """Return the node, built anew where more than privacy, learner and seed differ."""
        of = json.loads(config.to_json())
        key = json.dumps(
            {name: of[name] for name in ("data", "query", "train", "engine", "federation", "model")}
        )
        key += f"{config.privacy.clip_norm} {config.strategy.name}"
        if self._node is None or self._node[0] != key:
            self._node = None
            gc.collect()
            self._node = key, Node(config, 0, config.seed)
        return self._node[1]

    def first(self, config: Config, compute: Any) -> Any:
        """Return the sums of the first step, computed once for the same query on the same data."""
        of = json.loads(config.to_json())
        key = json.dumps([of["data"], of["query"], config.privacy.clip_norm, config.strategy.name])
        if key not in self._held:
            self._held[key] = compute()
        return {name: np.array(value) for name, value in self._held[key].items()}


def run(config: Config, sums: Sums) -> tuple[float, float]:
    """Return the accuracy on the evaluation split, and seconds: the server's loop, without transport."""
    began = time.perf_counter()
    experiment = prepare(config)
    mechanism, node = experiment.mechanism, sums.node(config)
    at = mechanism.method.at
    learning = mechanism.method.learner.start(
        config, at.query, spec(experiment.model), experiment.facts.examples
    )
    parameters, state, stream = get_flat(experiment.model).clone(), at.query.state(config), Stream()
    learning.init(parameters)
    for step in range(mechanism.steps):
        release = mechanism.release(step, state)
        keys = mechanism.method.keys(config.seed, step)
        task = StepTask(step, 0, mechanism.sampling_rate, keys, "", at.query.arrays(state))
        set_flat(node.model, parameters)

        def answer(task: StepTask = task) -> Any:
            return node.method.answer(node, task)[0]

        same = step == 0 and mechanism.sampling_rate == 1.0  # for all seeds
        exact = sums.first(config, answer) if same else answer()
        total = {name: np.asarray(value, np.float64) for name, value in exact.items()}
        noise = mechanism.noise(release, Collected(total, []), stream, config.seed, step)
        noisy = {name: total[name] + noise.get(name, 0.0) for name in total}
        means = mechanism.means(release, noisy)
        learnt = at.query.for_learner(state, means)
        if all(name in learnt.values for name in mechanism.method.learner.takes):
            parameters = learning.update(parameters, learnt, step)
        state = at.query.updated(state, means)
    average = learning.average()
    set_flat(experiment.model, parameters if average is None else average)
    scores = scoring.scores_of(
        experiment.model,
        experiment.task,
        experiment.splits,
        parameters.dtype,
        held_out=bool(config.data.holdout_examples),
    )
    return float(scores["accuracy"].value), time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, write the JSON file after every run, and print a line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--features", nargs="+", default=list(FEATURES), choices=list(FEATURES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=list(EPSILONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--held-out", action="store_true", help="evaluate on held-out training examples")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="beside the chosen settings"
    )
    parser.add_argument("--rows-of", nargs="+", type=Path, default=[], help="take over rows of other files")
    options = parser.parse_args(arguments)
    held: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {"rows": []}
    for path in options.rows_of:
        other = json.loads(path.read_text())
        held["rows"] += [row for row in other["rows"] if row not in held["rows"]]
        held |= {name: other[name] for name in ("hardware", "threads")}
        _write(options.json, held)
    sums = Sums()
    for features in options.features:
        for method in options.methods:
            private = not method.endswith("no noise")
            for epsilon in options.epsilons if private else [None]:
                for seed in options.seeds if private else options.seeds[:1]:
                    chosen = [*overrides_of(method, features, epsilon or 8.0), *options.set]
                    row: dict[str, Any] = {
                        "features": features, "method": method, "epsilon": epsilon, "seed": seed,
                        "held_out": options.held_out, "settings": chosen,
                    }  # fmt: skip
                    if any(all(done[name] == row[name] for name in row) for done in held["rows"]):
                        continue
                    config = config_of(features, epsilon or 8.0, seed, options.held_out, chosen)
                    accuracy, seconds = run(config, sums)
                    row |= {"accuracy": accuracy, "seconds": round(seconds, 1), "commit": provenance.commit()}
                    held["rows"].append(row)
                    print(
                        f"{features:9} {method:22} {epsilon} seed {seed}: {accuracy:.4f} in {seconds:.0f} s",
                        flush=True,
                    )
                    held |= {"hardware": provenance.hardware(), "threads": torch.get_num_threads()}
                    _write(options.json, held)
    return 0


def _write(path: Path, held: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def _alike(*settings: Sequence[str]) -> dict[str, Sequence[Sequence[str]]]:
    return dict.fromkeys(FEATURES, settings)


METHODS |= {
    "DP-LS": _alike(["preset=dp_ls", *_SOLVED]),
    "DP-Newton": _alike(["preset=dp_newton", *_SOLVED]),
    "DP-FC": {
        "last": [_fc(1.0, 20, 15), _fc(1.0, 120, 15), _fc(1.0, 300, 15)],
        "whitened": [_fc(0.3, 300, 12), _fc(0.3, 250, 30), _fc(0.3, 3000, 16)],
        "pixels": [_fc(1.0, 20, 15), _fc(1.0, 60, 15), _fc(1.0, 200, 15)],
    },
    "gradient, full batch": {
        "last": [_gd(34, 0.0043, 40), _gd(34, 0.0173, 80), _gd(34, 0.0346, 80)],
        "whitened": [_gd(10.2, 0.0154, 40), _gd(10.2, 0.1, 80), _gd(34, 0.1, 80)],
        "pixels": [_gd(3, 0.33, 30), _gd(10, 0.1, 30), _gd(3, 1.67, 30)],
    },
    "gradient, drawn batches": {
        "last": [_sgd(2, 100, 0.9), _sgd(7, 200, 0.9), _sgd(40, 400, 0.98)],
        "whitened": [_sgd(2, 100, 0.9), _sgd(7, 200, 0.9), _sgd(14, 400, 0.98)],
        "pixels": [_sgd(2, 100, 0.9), _sgd(20, 200, 0.9), _sgd(40, 400, 0.98)],
    },
    "gradient, one step of LAMB": _alike(["preset=central_dpsgd", *_optimizer("lamb", 0.01, 1, None)]),
    "least squares, no noise": _alike(["preset=dp_ls", *_FREE, *_SOLVED]),
    "logistic, no noise": _alike(["preset=dp_fc", *_FREE, *_optimizer("nesterov", 60, 41)]),
}

if __name__ == "__main__":
    raise SystemExit(main())
