"""Every combination of the axes on settings that take a tenth of a second, and why some are refused."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace

from fedsim.config import Config, DataConfig
from fedsim.data import datasets
from fedsim.data.examples import Splits
from fedsim.learners import LEARNERS
from fedsim.noise import NOISE
from fedsim.queries import QUERIES
from fedsim.samplers import SAMPLERS
from fedsim.strategies import STRATEGIES
from tests.conftest import small

AXES = {"strategy": STRATEGIES, "query": QUERIES, "sampler": SAMPLERS, "noise": NOISE}
Combination = tuple[str, str, str, str]

EVERY: list[Combination] = list(itertools.product(*(axis.own() for axis in AXES.values())))  # type: ignore[arg-type]

# A reason for each pair that does not go together, as whoever chooses it is told.
REFUSED = {
    ("local", "holder_update"): "what hides a holder is noise that it makes itself",
    ("local", "schedule"): "does not go with strategy=local: the noise of a step is made where",
    ("local", "tree"): "does not go with strategy=local: the noise of a step is made where",
    ("local", "banded"): "does not go with strategy=local: the noise of a step is made where",
    ("shares", "schedule"): "does not go with strategy=shares: the noise of a step is made where",
    ("shares", "tree"): "does not go with strategy=shares: the noise of a step is made where",
    ("shares", "banded"): "does not go with strategy=shares: the noise of a step is made where",
    ("nonprivate", "schedule"): "does not go with strategy=nonprivate: the noise of a step is made where",
    ("nonprivate", "tree"): "does not go with strategy=nonprivate: the noise of a step is made where",
    ("nonprivate", "banded"): "does not go with strategy=nonprivate: the noise of a step is made where",
    ("poisson", "tree"): "with this sampler it can take part in every step",
    ("poisson", "banded"): "with this sampler they can be 1 apart",
    ("passes", "banded"): "with this sampler they can be 1 apart",
    ("passes", "schedule"): "with this sampler 4 steps are one release",
    ("cyclic", "schedule"): "with this sampler 2 steps are one release",
    ("moments", "schedule"): "least_squares weighs its sums by the scale of independent noise",
    ("moments", "tree"): "least_squares weighs its sums by the scale of independent noise",
    ("moments", "banded"): "least_squares weighs its sums by the scale of independent noise",
    ("newton", "schedule"): "newton weighs its sums by the scale of independent noise",
    ("newton", "tree"): "newton weighs its sums by the scale of independent noise",
    ("newton", "banded"): "newton weighs its sums by the scale of independent noise",
    ("feature_covariance", "schedule"): "sums other things in its first steps than in later ones",
    ("feature_covariance", "tree"): "sums other things in its first steps than in later ones",
    ("feature_covariance", "banded"): "sums other things in its first steps than in later ones",
    ("feature_covariance", "cyclic"): "a release covers 2 steps, but its noise multiplier changes",
    ("feature_covariance", "passes"): "a release covers 4 steps, but its noise multiplier changes",
    ("fixed_size", "tree"): "with this sampler it can take part in every step",
    ("fixed_size", "banded"): "with this sampler they can be 1 apart",
    ("shares", "fixed_size"): "is proved for Poisson draws",
}


@functools.cache
def thumbnails() -> Splits:
    """Every fourth pixel of the embedded images: what is tested does not depend on how many there are."""
    whole = datasets.load(DataConfig(name="fashion_mnist_subset"))
    small = (replace(split, inputs=split.inputs[:, ::4, ::4]) for split in (whole.train, whole.test))
    return Splits(*small)


def reasons(combination: Combination) -> list[str]:
    """Return why a combination is refused; empty: it is not."""
    return [why for pair, why in REFUSED.items() if set(pair) <= set(combination)]


VALID = [combination for combination in EVERY if not reasons(combination)]
PRIVATE = [combination for combination in VALID if STRATEGIES.find(combination[0]).private]


def name_of(combination: Combination) -> str:
    """Return the id of a test."""
    return "+".join(combination)


def of(combination: Combination, *overrides: str) -> Config:
    """Return a configuration of a combination: 40 examples, 4 holders, 4 steps a pass."""
    chosen = [
        f"{axis}={json.dumps({'name': name, 'options': dict(registry.find(name).tiny)})}"
        for (axis, registry), name in zip(AXES.items(), combination, strict=True)
    ]
    learner = QUERIES.find(combination[1]).learner
    chosen.append(f"learner={json.dumps({'name': learner, 'options': dict(LEARNERS.find(learner).tiny)})}")
    if learner != "optimizer":  # what other learners do not read is at its default
        chosen += ["optimizer.name=sgd", "optimizer.options={}", "optimizer.learning_rate=1.0"]
    noise = [] if STRATEGIES.find(combination[0]).private else ["privacy.noise_multiplier=null"]
    clip = [] if STRATEGIES.find(combination[0]).private else ["privacy.clip_norm=1.0"]
    tiny = [
        f"data.name={__name__}:thumbnails",
        "model.name=linear",
        "data.train_examples=40",
        "data.test_examples=10",
        "federation.holders=4",
    ]
    sizes = ["train.expected_batch_size=10", "train.eval_every=6", "federation.partition=iid"]
    return small(*tiny, *sizes, *chosen, *noise, *clip, *overrides)
