"""The federation computes exactly centralized DP-SGD: against Opacus's own clipping and optimizer.

The oracle shares with fedsim the initial parameters, which examples each step draws, and the noise values;
gradients, clipping, scaling and the update are Opacus's and PyTorch's; the rule of lamb, the schedules and
the average of the weights are written out here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import opacus.optimizers.optimizer as opacus_optimizer
import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor

from fedsim import seeds
from fedsim.config import Config, OptimizerConfig
from fedsim.data import datasets, examples
from fedsim.engine.experiment import build_model
from fedsim.noise.gaussian import standard_normal
from fedsim.optimizers import OPTIMIZERS
from fedsim.samplers.keyed import PoissonSampler
from fedsim.schedules import SCHEDULES
from fedsim.tasks.classification import Classification
from tests.conftest import final, small, train

MODEL = {"float32": "mlp", "float64": "small_cnn"}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def adaptive(o: OptimizerConfig) -> tuple[tuple[float, float], float]:
    """The betas and epsilon that a configuration says, or their published defaults."""
    given = o.options
    return (given.get("beta1", 0.9), given.get("beta2", 0.999)), given.get("epsilon", 1e-8)


class Lamb(torch.optim.Optimizer):
    """You et al. 2020, algorithm 2 with phi the identity, a parameter tensor a layer."""

    def __init__(self, parameters: Iterable[Tensor], o: OptimizerConfig) -> None:
        super().__init__(parameters, {"lr": o.learning_rate})
        self.o, self.updates = o, 0
        self.betas, self.epsilon = adaptive(o)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        o, (beta1, beta2) = self.o, self.betas
        self.updates += 1
        for group in self.param_groups:
            for q in group["params"]:
                held = self.state[q]
                for name, beta, power in (("m", beta1, q.grad), ("v", beta2, q.grad.square())):
                    held[name] = beta * held.get(name, torch.zeros_like(q)) + (1 - beta) * power
                m, v = (held[n] / (1 - b**self.updates) for n, b in (("m", beta1), ("v", beta2)))
                update = m / (v.sqrt() + self.epsilon) + o.weight_decay * q
                trust = q.norm() / update.norm() if q.norm() > 0 and update.norm() > 0 else 1.0
                q -= group["lr"] * trust * update


def inner_optimizer(parameters: list[Tensor], o: OptimizerConfig) -> torch.optim.Optimizer:
    """PyTorch's own rule of that name; lamb written out."""
    decay, given, (betas, epsilon) = o.weight_decay, o.options, adaptive(o)
    match o.name:
        case "sgd" | "momentum" | "nesterov":
            return torch.optim.SGD(
                parameters,
                o.learning_rate,
                given.get("momentum", 0.0),
                weight_decay=decay,
                nesterov=o.name == "nesterov",
            )
        case "adam":
            return torch.optim.Adam(parameters, o.learning_rate, betas, epsilon, decay)
        case "adamw":
            return torch.optim.AdamW(parameters, o.learning_rate, betas, epsilon, decay)
    return Lamb(parameters, o)


def rate_at(o: OptimizerConfig, steps: int, step: int) -> float:
    """The learning rate written out: linear warm-up, then constant, linear or half a cosine."""
    if step < o.warmup_steps:
        return o.learning_rate * (step + 1) / o.warmup_steps
    done = (step - o.warmup_steps) / (steps - o.warmup_steps)
    if o.schedule.name == "constant":
        return o.learning_rate
    left = 1 - done if o.schedule.name == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
    final = o.schedule.options.get("final_fraction", 0.0)
    return o.learning_rate * (final + (1 - final) * left)


def centralized(config: Config, monkeypatch: pytest.MonkeyPatch, noise_times: float = 1.0) -> Tensor:
    """Train all examples in one place with Opacus and return what is released, sorted by name."""
    data = datasets.load(config.data).train
    dtype = torch.float64 if config.model.dtype == "float64" else torch.float32
    inputs = examples.normalise(data.inputs, data, dtype)
    labels = torch.from_numpy(data.targets.copy())
    model = build_model(config, data, Classification(), config.seed)
    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="mean")
    o, p, t = config.optimizer, config.privacy, config.train
    assert p.noise_multiplier is not None
    inner = inner_optimizer(list(wrapped.parameters()), o)
    optimizer = DPOptimizer(
        inner,
        noise_multiplier=p.noise_multiplier,
        max_grad_norm=p.clip_norm,
        expected_batch_size=int(t.expected_batch_size),
        loss_reduction="mean",
    )
    root = seeds.derive(config.seed, "run")
    sampler = PoissonSampler(t.expected_batch_size / len(labels), len(labels))
    ids = torch.arange(len(labels)).numpy()
    total = sum(q.numel() for q in model.parameters())
    released = {name: q.detach().clone() for name, q in model.named_parameters()}
    for step in range(t.steps):
        drawn = torch.from_numpy(sampler.included(ids, seeds.derive(root, "draw", step)).nonzero()[0])
        values = torch.from_numpy(standard_normal(seeds.derive(root, "noise", step), total))
        parts = iter(values.split([q.numel() for q in model.parameters()]))

        def given(std: float, reference: Tensor, *_: object, parts=parts, **__: object) -> Tensor:  # type: ignore[no-untyped-def]
            return (noise_times * std * next(parts)).to(reference.dtype).view(reference.shape)

        monkeypatch.setattr(opacus_optimizer, "_generate_noise", given)
        inner.param_groups[0]["lr"] = rate_at(o, t.steps, step)
        optimizer.zero_grad()
        F.cross_entropy(wrapped(inputs[drawn]), labels[drawn]).backward()
        optimizer.step()
        kept = min(t.ema_decay, (1 + step) / (10 + step)) if t.ema_decay else 0.0
        for name, q in model.named_parameters():
            released[name] = kept * released[name] + (1 - kept) * q.detach()
    return torch.cat([released[name].flatten() for name in sorted(released)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("holders", "nodes"), [(1, 1), (25, 3)])
def test_thirty_steps_equal_opacus(
    dtype: str, holders: int, nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(
        f"model.dtype={dtype}",
        f"model.name={MODEL[dtype]}",
        f"federation.holders={holders}",
        f"federation.nodes={nodes}",
        "train.steps=30",
    )
    train(config, tmp_path)
    expected = centralized(config, monkeypatch)
    assert torch.max(torch.abs(final(tmp_path) - expected)) <= TOLERANCE[dtype]


RULES = {
    "sgd": ("optimizer.learning_rate=0.3",),
    "momentum": ("optimizer.learning_rate=0.1", "optimizer.options.momentum=0.8"),
    "nesterov": ("optimizer.learning_rate=0.1", "optimizer.options.momentum=0.8"),
    "adam": ("optimizer.learning_rate=0.01", "optimizer.options.beta1=0.8", "optimizer.options.beta2=0.95"),
    "adamw": ("optimizer.learning_rate=0.01", "optimizer.options.beta1=0.8", "optimizer.options.beta2=0.95"),
    "lamb": ("optimizer.learning_rate=0.01", "optimizer.options.beta1=0.8", "optimizer.options.epsilon=1e-6"),
}
COURSES = {
    "constant": (),
    "linear, decay, average": (
        *(
            "optimizer.schedule=linear",
            "optimizer.schedule.options.final_fraction=0.1",
            "optimizer.weight_decay=0.02",
        ),
        "train.ema_decay=0.7",
    ),
    "cosine, warm-up, average": (
        *("optimizer.schedule=cosine", "optimizer.warmup_steps=4"),
        "train.ema_decay=0.95",
    ),
}


def ruled(rule: str, course: str) -> Config:
    return small(
        "model.dtype=float64",
        "model.name=linear",
        "train.steps=10",
        "train.eval_every=10",
        f"optimizer.name={rule}",
        *RULES[rule],
        *COURSES[course],
    )


@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("rule", RULES)
def test_every_optimizer_schedule_and_average_equals_opacus(
    rule: str, course: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is released after the noise went through the rule, its state, the schedule and the average."""
    config = ruled(rule, course)
    train(config, tmp_path)
    expected = centralized(config, monkeypatch)
    assert torch.max(torch.abs(final(tmp_path) - expected)) <= 1e-9


def test_every_optimizer_and_schedule_is_compared() -> None:
    assert set(RULES) == set(OPTIMIZERS.own())
    assert {course.split(",")[0] for course in COURSES} == set(SCHEDULES.own())


def test_the_comparison_notices_noise_that_is_a_percent_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("train.steps=5")
    train(config, tmp_path)
    wrong = centralized(config, monkeypatch, noise_times=1.01)
    assert torch.max(torch.abs(final(tmp_path) - wrong)) > 10 * TOLERANCE["float32"]
